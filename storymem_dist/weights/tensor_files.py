"""Opens the files of one model, whatever their packaging, as tensors under the model's own names.

Files are safetensors (with an index, a variant such as ``fp16``, or alone) or GGUF, in 32, 16 or 8 bits, with or
without ComfyUI's prefixes; what a file is, its content says. Knows nothing about which parts a checkpoint has.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.weights.eight_bit_source import with_full_numbers
from storymem_dist.weights.gguf_file import GgufSource, is_gguf
from storymem_dist.weights.key_maps import native_dit_key, native_vae_key
from storymem_dist.weights.loading import SafetensorsSource, TensorSource
from storymem_dist.weights.safetensors_file import SafetensorsFile

DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
VAE_PREFIXES = ("first_stage_model.", "model.", "vae.")
_INDEX = re.compile(r"(?P<model>.+)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_VARIANT = re.compile(r".+\.(?P<variant>fp16|bf16|fp32|fp8\w*)(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedTensors:
    """The tensors of one model, and the files that hold them."""

    source: TensorSource
    paths: Sequence[Path]


def without_prefix(keys: Iterable[str], prefixes: Sequence[str]) -> Callable[[str], str]:
    """What removes the first of ``prefixes`` that any key has, from the keys that have it."""
    named = list(keys)
    prefix = next((one for one in prefixes if any(key.startswith(one) for key in named)), "")
    return lambda key: key.removeprefix(prefix)


def dit_names(keys: Iterable[str]) -> Callable[[str], str]:
    """What turns the keys of a transformer's files into native ones."""
    strip = without_prefix(keys, DIT_PREFIXES)
    return lambda key: native_dit_key(strip(key))


def vae_names(keys: Iterable[str]) -> Callable[[str], str]:
    """What turns the keys of a VAE's file into native ones."""
    strip = without_prefix(keys, VAE_PREFIXES)
    bare = [strip(key) for key in keys]
    return (lambda key: native_vae_key(strip(key))) if "quant_conv.weight" in bare else strip


def open_dit(path: Path, fetch_command: str) -> OpenedTensors:
    """A transformer from a folder or a single file, under native names.

    Raises:
        WeightsNotFound: a file is missing; the message ends with ``fetch_command``.
        CheckpointError: a file is damaged, or of a format that is not read.
    """
    if path.is_dir() and (gguf := _only_gguf(path)):
        path = gguf
    if path.is_file() and is_gguf(path):
        return OpenedTensors(source=GgufSource(path, dit_names), paths=[path])
    files = [SafetensorsFile(path)] if path.is_file() else sharded_files(path, fetch_command)
    return _opened(path, files, dit_names)


def open_vae_file(path: Path) -> TensorSource:
    """A VAE from a safetensors file, under native names. Raises ``CheckpointError``."""
    return _opened(path, [SafetensorsFile(path)], vae_names).source


def open_text_encoder_file(path: Path) -> TensorSource:
    """A text encoder from a safetensors file, under the names of the file. Raises ``CheckpointError``."""
    return _opened(path, [SafetensorsFile(path)], lambda keys: str).source


def _opened(
    path: Path, files: Sequence[SafetensorsFile], names: Callable[[list[str]], Callable[[str], str]]
) -> OpenedTensors:
    rename = names([key for file in files for key in file])
    source = with_full_numbers(SafetensorsSource(str(path), files, rename))
    return OpenedTensors(source=source, paths=[file.path for file in files])


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without safetensors files. Raises ``CheckpointError`` if there are several."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors*")):
        return None
    if len(files) > 1:
        raise CheckpointError(f"{folder}: several GGUF files: {', '.join(file.name for file in files)}; keep one")
    return files[0]


def sharded_files(folder: Path, fetch_command: str) -> list[SafetensorsFile]:
    """The safetensors files of one model: those its index names, or the single file where there is no index.

    Files without a variant come before those with one, as for diffusers and transformers.

    Raises:
        WeightsNotFound: a shard is missing (the message has its number), or there are none.
        CheckpointError: a file is damaged, index and files contradict each other, or several variants could be meant.
    """
    indexes = {match["variant"]: path for path in sorted(folder.iterdir()) if (match := _INDEX.fullmatch(path.name))}
    singles = _singles(folder)
    if indexes:
        return _indexed_files(folder, indexes[_variant(folder, indexes)], fetch_command)
    if not singles:
        raise WeightsNotFound(f"{folder}: there are no .safetensors files; complete it with: {fetch_command}")
    chosen = singles[_variant(folder, singles)]
    if len(chosen) > 1:
        raise WeightsNotFound(f"{folder}: there are several shards but no index; complete it with: {fetch_command}")
    return [SafetensorsFile(chosen[0])]


def variant_of(folder: Path) -> str | None:
    """The variant of the files that a folder of diffusers or transformers holds; None: its files have none."""
    indexes = {match["variant"]: path for path in sorted(folder.iterdir()) if (match := _INDEX.fullmatch(path.name))}
    found = indexes or _singles(folder)
    return _variant(folder, found) if found else None


def _singles(folder: Path) -> dict[str | None, list[Path]]:
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _VARIANT.fullmatch(path.name)
        found.setdefault(match["variant"] if match else None, []).append(path)
    return found


def _variant(folder: Path, found: dict[str | None, Any]) -> str | None:
    if None in found:
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: files of several variants: {', '.join(map(str, sorted(map(str, found))))}; keep one of them"
        )
    return next(iter(found))


def _indexed_files(folder: Path, index: Path, fetch_command: str) -> list[SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: not an index of safetensors files: it has no weight_map")
    names = sorted(set(weight_map.values()))
    for number, name in enumerate(names, start=1):
        if not (folder / name).is_file():
            raise WeightsNotFound(
                f"shard {number} of {len(names)} is missing: {folder / name}; complete it with: {fetch_command}"
            )
    opened = {name: SafetensorsFile(folder / name) for name in names}
    for key, name in weight_map.items():
        if key not in opened[name]:
            raise CheckpointError(f"{index}: lists {key} in {name}, which does not hold it")
    return list(opened.values())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ``WeightsNotFound`` without a file, ``CheckpointError`` for any other content."""
    if not path.is_file():
        raise WeightsNotFound(f"{path}: no such file; the download is incomplete")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value
