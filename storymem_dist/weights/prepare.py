"""Writes prepared weights: reads every weight of both experts once, merges LoRAs, casts and writes, on the CPU.

Works on a few rows at a time, so it needs little memory for a model of any size. ``weights/prepared.py`` describes the
format. Knows nothing about jobs or devices.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError, require_one_of
from storymem_dist.files import file_digest, locked_folder, replace_folder
from storymem_dist.models.quantized_linear import Float8Linear
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.checkpoints import NATIVE, WanCheckpoint
from storymem_dist.weights.loading import RowRange, TensorSource, row_ranges, stream_rows
from storymem_dist.weights.lora import ScaledLora
from storymem_dist.weights.prepared import SCALE_SUFFIX, STORED_DTYPES, PreparedManifest, is_prepared
from storymem_dist.weights.safetensors_file import SafetensorsWriter, write_safetensors

ExpertProgress = Callable[[str, int, int], None]
"""Called with an expert's name, the bytes read so far and the total bytes of that expert."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_PACKAGES = ("storymem_dist", "torch", "safetensors")


def prepare_checkpoint(
    source: WanCheckpoint,
    loras: Mapping[str, Sequence[ScaledLora]],
    output: Path,
    *,
    dtype: str = "bfloat16",
    storymem_folder: str | None = None,
    progress: ExpertProgress | None = None,
) -> PreparedManifest:
    """Merge, cast and write both experts to the new folder ``output``, which appears only when it is complete.

    Text encoder, VAE and tokenizer are hard-linked where the file system allows it, else copied.

    Args:
        loras: for each expert, in order; the first is StoryMem's if ``storymem_folder`` (its folder's name) is given.
        dtype: one of ``STORED_DTYPES``.

    Raises:
        CheckpointError: ``output`` holds other files, the source is itself prepared, or a LoRA does not fit.
    """
    require_one_of("dtype", dtype, STORED_DTYPES)
    if source.prepared is not None:
        raise CheckpointError(f"{source.root}: these weights are prepared already; prepare from the original ones")
    for expert in EXPERTS:
        source.check_loras(loras[expert])
    if output.exists() and not is_prepared(output) and any(output.iterdir()):
        raise CheckpointError(f"{output}: exists and holds other files than prepared weights; give a new folder")
    with locked_folder(output):
        fresh = output.with_name(f".{output.name}.preparing")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        manifest = _empty_manifest(source, loras, dtype, storymem_folder)
        manifest.write(fresh)
        files: dict[str, Mapping[str, Any]] = {}
        for expert in EXPERTS:
            folder = fresh / NATIVE.expert_folders[expert]
            written = _write_expert(folder, source, expert, loras[expert], dtype, progress)
            files |= {f"{folder.name}/{name}": facts for name, facts in written.items()}
        for part, origin in _parts(source).items():
            files |= _link_part(origin, fresh, manifest.parts[part])
        manifest = replace(manifest, complete=True, files=files)
        manifest.write(fresh)
        replace_folder(output, fresh)
    return manifest


def _empty_manifest(
    source: WanCheckpoint, loras: Mapping[str, Sequence[ScaledLora]], dtype: str, storymem_folder: str | None
) -> PreparedManifest:
    return PreparedManifest(
        complete=False,
        kind=source.kind,
        dtype=dtype,
        storymem_lora=storymem_folder,
        source={"path": str(source.root.resolve()), "identity": source.identity, "layout": source.layout}
        | {name: str(path.resolve()) for name, path in source.given.given().items()},
        loras={
            expert: [
                lora.describe() | {"is_storymem": storymem_folder is not None and index == 0}
                for index, lora in enumerate(loras[expert])
            ]
            for expert in EXPERTS
        },
        parts={part: _place_of(part, path, source.root) for part, path in _parts(source).items()},
        files={},
        versions={package: importlib.metadata.version(package) for package in _PACKAGES},
    )


def _write_expert(
    folder: Path,
    source: WanCheckpoint,
    expert: str,
    loras: Sequence[ScaledLora],
    dtype: str,
    progress: ExpertProgress | None,
) -> dict[str, Mapping[str, Any]]:
    """One safetensors file per block, one for the rest, an index and ``config.json``; returns name -> facts."""
    folder.mkdir()
    tensors = source.expert(expert)
    targets = _target_dtypes(source.dit_config, dtype)
    groups = _group_by_block(targets)
    ranges = [
        found
        for keys in groups.values()
        for key in keys
        for found in row_ranges(tensors, key, 0, tensors.shape(key)[0], torch.device("cpu"))
    ]
    total = sum(found.num_bytes for found in ranges)
    done = 0
    facts: dict[str, Mapping[str, Any]] = {}
    weight_map: dict[str, str] = {}
    stream = stream_rows(tensors, ranges, loras)
    for name, keys in groups.items():
        entries = dict(_entries(tensors, keys, targets))
        digest = hashlib.sha256()
        with write_safetensors(folder / name, entries, digest=digest) as writer:
            for key in keys:
                done += _write_weight(writer, stream, key, tensors.shape(key)[0], targets[key])
                if progress is not None:
                    progress(expert, done, total)
        weight_map |= dict.fromkeys(entries, name)
        facts[name] = {"num_bytes": (folder / name).stat().st_size, "sha256": digest.hexdigest()}
    index, config = folder / "diffusion_pytorch_model.safetensors.index.json", folder / "config.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    config.write_text(json.dumps(asdict(source.dit_config) | {"model_type": source.kind}, indent=1))
    return facts | {path.name: _facts(path) for path in (index, config)}


def _target_dtypes(config: DiTConfig, dtype: str) -> dict[str, torch.dtype]:
    """The dtype in which each weight is stored: that of the model, or float8 for the linears of the blocks."""
    with torch.device("meta"):
        model = WanDiT(config, dtype=torch.float32 if dtype == "float32" else torch.bfloat16)
    targets = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if dtype == "float8":
        for name, parameter in model.named_parameters():
            if _BLOCK.match(name) and parameter.ndim == 2 and parameter.dtype == torch.bfloat16:
                targets[name] = torch.float8_e4m3fn
    return targets


def _group_by_block(targets: Mapping[str, torch.dtype]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key in targets:
        block = _BLOCK.match(key)
        name = f"block-{int(block[1]):03d}.safetensors" if block else "outside-blocks.safetensors"
        groups.setdefault(name, []).append(key)
    return groups


def _entries(
    source: TensorSource, keys: Sequence[str], targets: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, tuple[torch.dtype, torch.Size]]]:
    for key in keys:
        yield key, (targets[key], source.shape(key))
        if targets[key] == torch.float8_e4m3fn:
            yield key + SCALE_SUFFIX, (torch.float32, source.shape(key)[:1])


def _write_weight(
    writer: SafetensorsWriter, stream: Iterator[tuple[RowRange, Tensor]], key: str, num_rows: int, target: torch.dtype
) -> int:
    """Write one weight (and its scales), whose rows are next in the stream; returns the bytes read for it."""
    num_bytes, row = 0, 0
    scales: list[Tensor] = []
    while row < num_rows:
        found, rows = next(stream)
        assert (found.key, found.rows.start) == (key, row)
        if target == torch.float8_e4m3fn:
            values, row_scales = Float8Linear.quantize(rows.float())
            scales.append(row_scales)
            writer.write(key, values)
        else:
            writer.write(key, rows.to(target))
        num_bytes += found.num_bytes
        row = found.rows.stop
    if scales:
        writer.write(key + SCALE_SUFFIX, torch.cat(scales))
    return num_bytes


def _parts(source: WanCheckpoint) -> dict[str, Path]:
    return {"vae": source.vae_path, "text_encoder": source.text_encoder_path, "tokenizer": source.tokenizer_path}


def _place_of(part: str, path: Path, root: Path) -> str:
    """Where a part goes in the prepared folder: to the same place, or to a folder of its own if it lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else f"{part}/{path.name}"


def _link_part(origin: Path, target: Path, relative: str) -> dict[str, Mapping[str, Any]]:
    """Link (or copy) a file or folder to ``relative`` under ``target``; returns the facts of its files."""
    paths = [origin] if origin.is_file() else sorted(path for path in origin.rglob("*") if path.is_file())
    facts = {}
    for path in paths:
        name = (Path(relative) / path.relative_to(origin)).as_posix()
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target / name)
        except OSError:
            shutil.copy(path, target / name)
        facts[name] = _facts(target / name)
    return facts


def _facts(path: Path) -> Mapping[str, Any]:
    return {"num_bytes": path.stat().st_size, "sha256": file_digest(path)}
