"""LoRA files for the DiT: which weights they change, by how much, and adding that to rows of a weight.

Accepts the key styles of published files (PEFT with and without adapter name, ``diffusion_model.`` and ``transformer.``
prefixes, ``lora_down``/``lora_up``, diffusers module names, the underscore names of kohya-style trainers). Rejects a
file with any other key: a half-applied LoRA would be a silent error. Knows nothing about how base weights are stored.

Source of scales: alpha / rank is the usual rule (``alpha``); rsLoRA (arXiv 2312.03732) uses alpha / sqrt(rank).
StoryMem's files are rsLoRA with alpha = rank = 128, so their scale is 11.3137; the files do not store this.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError, ConfigError, WeightsNotFound, require_at_least, require_one_of
from storymem_dist.files import file_identity
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.story.modes import CONTINUATIONS, MI2V, MM2V
from storymem_dist.weights.key_maps import native_dit_key
from storymem_dist.weights.loading import ROW_BLOCK, SafetensorsSource, StateDictSource, TensorSource, read_state_dict
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.state_dict import check_no_keys

SCALE_RULES = ("rslora", "alpha", "none")
STORYMEM_FOLDERS = {MI2V: "Wan2.2-MI2V-A14B", MM2V: "Wan2.2-MM2V-A14B"}
STORYMEM_REPO = "Kevin-thu/StoryMem"

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.")
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_KOHYA = re.compile(r"lora_unet_blocks_(\d+)_(?:(self_attn|cross_attn)_([qkvo])|ffn_([02]))")
_DOWN_HALVES = ("A", "down")


@dataclass(kw_only=True, slots=True)
class LoraSettings:
    """One LoRA to merge on top of the base weights.

    ``scale_rule``: ``rslora`` = alpha / sqrt(rank), ``alpha`` = alpha / rank, ``none`` = 1. The scale is multiplied by
    ``strength``. ``alpha`` None means the file's own alpha if it stores one, else the rank. ``expert`` is the expert to
    change, or ``both``.
    """

    path: str
    scale_rule: str = "alpha"
    strength: float = 1.0
    alpha: float | None = None
    expert: str = "both"

    def __post_init__(self) -> None:
        require_one_of("model.loras.scale_rule", self.scale_rule, SCALE_RULES)
        require_one_of("model.loras.expert", self.expert, (*EXPERTS, "both"))
        if not math.isfinite(self.strength):
            raise ConfigError(f"model.loras.strength={self.strength!r} is not allowed; it must be a finite number")
        if self.alpha is not None:
            require_at_least("model.loras.alpha", self.alpha, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraModule:
    """The two halves of one target: names in the file, sizes, and the alpha stored with it (None: not stored)."""

    down_key: str
    up_key: str
    rank: int
    in_features: int
    out_features: int
    alpha: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """An opened and checked LoRA file; no weights read. ``modules`` has native module names (``blocks.0.ffn.2``)."""

    path: Path
    source: TensorSource
    modules: Mapping[str, LoraModule]
    identity: str


class ScaledLora:
    """A LoRA file with its scale: a ``WeightDelta`` for ``load_dit_weights``.

    Products are fp32, over fixed blocks of rows, so a weight's bits do not depend on the rows that a caller wants.
    """

    def __init__(
        self, file: LoraFile, *, scale_rule: str = "alpha", alpha: float | None = None, strength: float = 1.0
    ) -> None:
        require_one_of("scale_rule", scale_rule, SCALE_RULES)
        self.file = file
        self.name = str(file.path)
        self._rule, self._alpha, self._strength = scale_rule, alpha, strength
        self._shapes = {
            f"{name}.weight": torch.Size((module.out_features, module.in_features))
            for name, module in file.modules.items()
        }
        self._down: tuple[str, torch.device, Tensor] | None = None

    @property
    def identity(self) -> str:
        """Changes with the file's content and with the scale."""
        described = f"{self.file.identity} {self._rule} {self._alpha} {self._strength}"
        return hashlib.sha256(described.encode()).hexdigest()

    def describe(self) -> dict[str, str | float | None]:
        """File, scale and identity as plain values for manifests and reports."""
        return {
            "path": str(self.file.path.resolve()),
            "file_identity": self.file.identity,
            "identity": self.identity,
            "scale_rule": self._rule,
            "alpha": self._alpha,
            "strength": self._strength,
        }

    def scale(self, module_name: str) -> float:
        """The factor of the product of the two halves, strength included."""
        if self._rule == "none":
            return self._strength
        module = self.file.modules[module_name]
        alpha = next((value for value in (self._alpha, module.alpha) if value is not None), module.rank)
        return self._strength * alpha / (math.sqrt(module.rank) if self._rule == "rslora" else module.rank)

    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes of the changed weights, by native weight name."""
        return self._shapes

    def add_to(self, rows: Tensor, key: str, first_row: int) -> None:
        """Add ``scale * up @ down``, rows ``first_row ...``, to fp32 ``rows [n, in_features]`` in place."""
        name = key.removesuffix(".weight")
        module, scale = self.file.modules[name], self.scale(name)
        down = self._down_half(module, rows.device)
        row, end = first_row, first_row + rows.shape[0]
        while row < end:
            block = row // ROW_BLOCK * ROW_BLOCK
            stop = min(end, block + ROW_BLOCK)
            up = self.file.source.read(module.up_key, slice(block, min(block + ROW_BLOCK, module.out_features)))
            delta = up.to(rows.device).float() @ down
            rows[row - first_row : stop - first_row].add_(delta[row - block : stop - block], alpha=scale)
            row = stop

    def _down_half(self, module: LoraModule, device: torch.device) -> Tensor:
        """The down half in fp32. The last one is kept, because a weight arrives in several chunks."""
        if self._down is None or self._down[:2] != (module.down_key, device):
            down = self.file.source.read(module.down_key).to(device).float()
            self._down = (module.down_key, device, down)
        return self._down[2]


def open_lora(path: str | Path) -> LoraFile:
    """Open a LoRA (``.safetensors``, or ``.pth``/``.pt``/``.bin`` with tensors only) and check every key in it.

    Raises:
        WeightsNotFound: there is no such file.
        CheckpointError: a key is unknown or left over, a half is missing, or sizes contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsNotFound(f"LoRA {path}: no such file; allowed: a .safetensors or .pth file")
    source: TensorSource
    if path.suffix == ".safetensors":
        source = SafetensorsSource(str(path), [SafetensorsFile(path)])
    else:
        source = StateDictSource(str(path), read_state_dict(path))
    return LoraFile(path=path, source=source, modules=_group_by_module(source), identity=file_identity(path))


def open_loras(settings: Sequence[LoraSettings], expert: str) -> list[ScaledLora]:
    """The LoRAs of a list that belong to ``expert``, opened, in order."""
    return [
        ScaledLora(open_lora(one.path), scale_rule=one.scale_rule, alpha=one.alpha, strength=one.strength)
        for one in settings
        if one.expert in (expert, "both")
    ]


def storymem_lora(path: str | Path, continuation: str) -> dict[str, ScaledLora]:
    """The StoryMem LoRA of both experts for a continuation mode, with its rsLoRA scale.

    ``path`` is the folder with StoryMem's two LoRA folders, or the one folder itself. ``none`` uses the MI2V LoRA.

    Raises:
        WeightsNotFound: a folder or file is missing; the message names the command that fetches it.
        CheckpointError: ``path`` is the folder of the other mode, or a file is wrong.
    """
    require_one_of("sampler.continuation", continuation, CONTINUATIONS)
    root, wanted = Path(path), STORYMEM_FOLDERS[MM2V if continuation == MM2V else MI2V]
    folder = root if root.resolve().name in STORYMEM_FOLDERS.values() else root / wanted
    if folder.resolve().name != wanted:
        raise CheckpointError(
            f"StoryMem LoRA {folder}: this is {folder.resolve().name}, but continuation={continuation} needs {wanted}"
        )
    return {expert: ScaledLora(open_lora(_storymem_file(folder, expert)), scale_rule="rslora") for expert in EXPERTS}


def _storymem_file(folder: Path, expert: str) -> Path:
    for suffix in (".safetensors", ".pth"):
        if (path := folder / f"backbone_{expert}{suffix}").is_file():
            return path
    raise WeightsNotFound(
        f"StoryMem LoRA {folder / f'backbone_{expert}.safetensors'}: no such file; get it with: "
        f'hf download {STORYMEM_REPO} --include "{folder.name}/*" --local-dir {folder.parent}'
    )


def _group_by_module(source: TensorSource) -> dict[str, LoraModule]:
    downs: dict[str, str] = {}
    ups: dict[str, str] = {}
    alphas: dict[str, float] = {}
    not_understood: list[str] = []
    keys = source.keys()
    for key in keys:
        if match := _HALF.fullmatch(key):
            halves, name = (downs if match["half"] in _DOWN_HALVES else ups), _module_name(match["module"])
            if name in halves:
                raise CheckpointError(f"{source.name}: {halves[name]!r} and {key!r} are for the same weight, {name}")
            halves[name] = key
        elif match := _ALPHA.fullmatch(key):
            alphas[_module_name(match["module"])] = float(source.read(key))
        else:
            not_understood.append(key)
    if not downs and not ups:
        raise CheckpointError(
            f"{source.name}: not a LoRA: none of its {len(keys)} keys ends in lora_A.weight or lora_down.weight"
        )
    for problem, names in (
        ("keys are not understood", not_understood),
        ("lora_B (lora_up) is missing for", [key for name, key in downs.items() if name not in ups]),
        ("lora_A (lora_down) is missing for", [key for name, key in ups.items() if name not in downs]),
        ("alphas belong to no target", [name for name in alphas if name not in downs]),
    ):
        check_no_keys(f"{source.name}: {problem}", names)
    return {name: _module(source, key, ups[name], alphas.get(name)) for name, key in downs.items()}


def _module(source: TensorSource, down_key: str, up_key: str, alpha: float | None) -> LoraModule:
    down, up = source.shape(down_key), source.shape(up_key)
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise CheckpointError(
            f"{source.name}: {down_key} {list(down)} and {up_key} {list(up)} do not form a product; allowed: "
            "[rank, in] and [out, rank] of a linear layer"
        )
    return LoraModule(
        down_key=down_key, up_key=up_key, rank=down[0], in_features=down[1], out_features=up[0], alpha=alpha
    )


def _module_name(stored: str) -> str:
    """The native name of a module from any of the accepted styles."""
    if kohya := _KOHYA.fullmatch(stored):
        block, attention, letter, ffn = kohya.groups()
        return f"blocks.{block}.{attention}.{letter}" if attention else f"blocks.{block}.ffn.{ffn}"
    while prefix := next((prefix for prefix in _PREFIXES if stored.startswith(prefix)), None):
        stored = stored.removeprefix(prefix)
    return native_dit_key(f"{stored}.weight").removesuffix(".weight")
