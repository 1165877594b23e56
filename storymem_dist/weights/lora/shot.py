"""LoRAs of one shot: what they are in its fingerprint, and as adapters that are added while the experts run.

The same files, scales and checks as for LoRAs that are merged (``model.loras``). Knows nothing of devices or ranks.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storymem_dist.errors import CheckpointError
from storymem_dist.files import file_identity
from storymem_dist.models.adapters import Adapter, dtype_of, filled_rank
from storymem_dist.weights.lora.container import CONFIG_NAME, backbone_files, find_file
from storymem_dist.weights.lora.merge import ScaledLora
from storymem_dist.weights.lora.settings import LoraSettings, explain_missing, lora_settings

_KEY_DIGITS = 12


def shot_loras(given: Any) -> tuple[LoraSettings, ...]:
    """The settings of ``Shot.options.loras``: a list of LoRAs, a single one, or None. Raises ``ConfigError``."""
    several = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return tuple(lora_settings(one, f"loras, entry {number}") for number, one in enumerate(several, start=1))


def lora_inputs(given: Any) -> list[dict[str, Any]]:
    """What ``Shot.options.loras`` is in a fingerprint: settings, and files by their content, as JSON values.

    Empty without LoRAs.

    Raises:
        ConfigError: a setting is wrong.
        WeightsNotFound, CheckpointError: a file is missing or cannot be read.
    """
    inputs = []
    for one in shot_loras(given):
        explain_missing(one.path)
        try:
            files = [_identity(file) for file in _files_of(Path(one.path))]
        except OSError as error:
            raise CheckpointError(f"LoRA {one.path}: cannot be read: {error.strerror or error}") from None
        inputs.append({**{key: value for key, value in asdict(one).items() if key != "path"}, "files": files})
    return inputs


def lora_key(inputs: Sequence[Mapping[str, Any]]) -> str:
    """A short digest of ``lora_inputs``: shots with equal ones need the same adapters. Empty without LoRAs."""
    if not inputs:
        return ""
    return hashlib.sha256(json.dumps(list(inputs), sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def _files_of(path: Path) -> list[Path]:
    """All files that decide what a LoRA is."""
    if backbones := backbone_files(path):
        return list(backbones.values())
    file = find_file(path)
    return [file, *(config for config in [file.with_name(CONFIG_NAME)] if config.is_file())]


def _identity(file: Path) -> str:
    facts = file.stat()
    return _identity_once(file, facts.st_size, facts.st_mtime_ns, facts.st_ino)


@lru_cache(maxsize=4096)
def _identity_once(file: Path, *unchanged: int) -> str:
    return file_identity(file)


def read_adapters(loras: Sequence[ScaledLora], dit: nn.Module) -> dict[str, Adapter]:
    """The adapters that add all of ``loras`` to modules of ``dit``, in host memory; ``dit`` gives dtypes only.

    Products of halves stay products: those of several LoRAs become one, of the sum of their ranks. Scales are in ``up``
    (computed in fp32, then cast). What is multiplied by zero is left out.

    Raises:
        CheckpointError: a tensor holds NaN or Inf, also after it is cast.
    """
    found: dict[str, dict[str, Any]] = {}
    for lora in loras:
        if lora.strength == 0:
            continue
        for name in lora.file.modules:
            of_module = found.setdefault(name, {})
            for part, half in zip(("down", "up"), lora.halves(name, dtype_of(dit.get_submodule(name))), strict=True):
                of_module.setdefault(part, []).append(half)
        for key in lora.shapes():
            change = lora.exact_change(key)
            if change is not None:
                name, _, field = key.rpartition(".")
                of_module = found.setdefault(name, {})
                of_module[field] = of_module.get(field, 0) + change
    adapters = {}
    for name, parts in found.items():
        dtype = dtype_of(dit.get_submodule(name))
        for part, axis in (("down", 0), ("up", 1)):
            if part in parts:
                parts[part] = torch.cat(parts[part], axis)
        changes = {field: value.to(dtype).contiguous() for field, value in parts.items()}
        adapters[name] = Adapter(**changes)
    return adapters


def adapter_bytes(loras: Sequence[ScaledLora], dit: nn.Module, *, compiled: bool = False) -> int:
    """Bytes of ``read_adapters(loras, dit)``, from headers alone; ``compiled``: as compiled blocks get them."""
    used = [lora for lora in loras if lora.strength]
    ranks: dict[str, int] = {}
    sizes: dict[str, int] = {}
    total = 0
    for lora in used:
        for name, module in lora.file.modules.items():
            ranks[name] = ranks.get(name, 0) + module.rank
            sizes[name] = module.in_features + module.out_features
        products = {f"{name}.weight" for name in lora.file.modules}
        changed = {key for key in lora.shapes() if key not in products} | set(lora.file.patches)
        total += sum(lora.shapes()[key].numel() * dtype_of(_owner(dit, key)).itemsize for key in changed)
    in_blocks = [rank for name, rank in ranks.items() if name.startswith("blocks.")]
    filled = filled_rank(max(in_blocks)) if compiled and in_blocks else 0
    for name, rank in ranks.items():
        held = filled if filled and name.startswith("blocks.") else rank
        total += held * sizes[name] * dtype_of(dit.get_submodule(name)).itemsize
    return total


def _owner(dit: nn.Module, key: str) -> nn.Module:
    """The module of a parameter."""
    return dit.get_submodule(key.rpartition(".")[0])
