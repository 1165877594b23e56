"""The files and folders in which LoRAs come: tensors by name, and the plain values that come with them.

A file is read by its content, whatever its suffix: safetensors, or what ``torch.save`` wrote, whose tensors may lie one
or two levels deep. A folder is one of peft (``adapter_model``, ``adapter_config.json``) or of diffusers. Knows nothing
about what the tensors mean.
"""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.loading import SafetensorsSource, StateDictSource, TensorSource
from storymem_dist.weights.lora import layouts
from storymem_dist.weights.lora.scale import ALPHA_NAMES, RANK_NAMES
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.torch_file import is_safetensors, read_torch
from storymem_dist.weights.wrapped_source import WrappedSource

CONFIG_NAME = "adapter_config.json"
FOLDER_STEMS = ("adapter_model", "pytorch_lora_weights")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_NESTED_TENSORS = (
    *("state_dict", "module", "lora", "lora_state_dict", "model", "weights", "network", "params", "generator"),
    *("ema", "ema_state_dict", "model_ema", "params_ema", "generator_ema"),
)
_NESTED_VALUES = ("config", "lora_config", "peft_config", "adapter_config", "metadata")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def find_file(path: Path) -> Path:
    """The file of a LoRA that is given as a file or as a folder of peft or diffusers.

    Raises:
        WeightsNotFound: there is nothing at ``path``, or no LoRA, or more than one.
    """
    if not path.is_dir():
        if not path.is_file():
            raise WeightsNotFound(f"LoRA {path}: no such file; allowed: a .safetensors or .pth file, or a PEFT folder")
        return path
    for stem in FOLDER_STEMS:
        for suffix in SUFFIXES:
            if (file := path / f"{stem}{suffix}").is_file():
                return file
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        named = ", ".join(file.name for file in files[:4])
        raise WeightsNotFound(f"LoRA {path}: this folder holds several ({named}); name one of them")
    if next(path.glob("*.distcp"), None) is not None:
        raise WeightsNotFound(
            f"LoRA {path}: a checkpoint that torch wrote in parts (.distcp); make one file of it with: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(path))} lora.pt"
        )
    if adapters := sorted({file.parent.name for file in path.glob(f"*/{FOLDER_STEMS[0]}.*")}):
        named = ", ".join(f"{name}/" for name in adapters[:4])
        raise WeightsNotFound(f"LoRA {path}: a folder of adapters by name ({named}); name one of these folders")
    raise WeightsNotFound(
        f"LoRA {path}: this folder holds no LoRA; a PEFT folder holds adapter_model.safetensors and {CONFIG_NAME}"
    )


def backbone_file(folder: Path, expert: str) -> Path | None:
    """The file of one expert in a folder like StoryMem's, if it is there."""
    paths = (folder / f"backbone_{expert}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def backbone_files(path: Path) -> dict[str, Path]:
    """The files of a folder like StoryMem's by expert; empty for anything else."""
    return {expert: file for expert in EXPERTS if (file := backbone_file(path, expert))}


def open_tensors(path: Path) -> tuple[TensorSource, Mapping[str, Any]]:
    """The tensors of a file, and the header's or the file's plain values. Raises ``CheckpointError``."""
    if is_safetensors(path):
        file = SafetensorsFile(path)
        source: TensorSource = SafetensorsSource(str(path), [file])
        metadata: Mapping[str, Any] = file.metadata
    else:
        tensors, metadata = _tensors_and_values(path, read_torch(path))
        source = StateDictSource(str(path), tensors)
    keys = source.keys()
    tops = [key for key in keys if key in (*ALPHA_NAMES, *RANK_NAMES)]
    metadata = {**metadata, **{key: number(source, key) for key in tops}}
    if tops:
        source = WrappedSource(source, [key for key in keys if key not in tops])
    for key in keys:
        if source.dtype(key) not in _FLOATS and not layouts.is_alpha(key) and key not in tops:
            stored = str(source.dtype(key)).removeprefix("torch.")
            raise CheckpointError(f"{path}: {key} is stored as {stored}; LoRAs hold floating-point numbers")
    return source, metadata


def _tensors_and_values(path: Path, loaded: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of what ``torch.save`` wrote, also one level deeper, and the plain values next to them."""
    values: dict[str, Any] = {}
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        values |= {str(key): value for key, value in loaded.items() if isinstance(value, int | float | str)}
        for name in _NESTED_VALUES:
            inner = loaded.get(name)
            if isinstance(inner, Mapping) and not any(isinstance(value, Tensor) for value in inner.values()):
                values |= {str(key): value for key, value in inner.items() if not isinstance(value, Tensor)}
        tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        nested = {name: loaded[name] for name in _NESTED_TENSORS if isinstance(loaded.get(name), Mapping)}
        _check_one_copy(path, nested)
        deeper = next(iter(nested.values()), None)
        if tensors and (deeper is None or any(value.numel() != 1 for value in tensors.values())):
            for key, value in tensors.items():
                if value.layout != torch.strided or value.is_quantized:
                    raise CheckpointError(f"{path}: {key} is a sparse or quantized tensor; LoRAs hold dense ones")
            return tensors, values
        values |= {key: value.item() for key, value in tensors.items()}
        loaded = deeper
    raise CheckpointError(f"{path}: not a LoRA: there are no named tensors in it")


def _check_one_copy(path: Path, nested: Mapping[str, Mapping[Any, Any]]) -> None:
    """Raise ``CheckpointError`` if one key has other values in two dictionaries, such as trained and averaged ones."""
    (first, values), *others = nested.items() or [("", {})]
    for name, other in others:
        for key, tensor in values.items():
            copy = other.get(key)
            if isinstance(tensor, Tensor) and isinstance(copy, Tensor) and not torch.equal(tensor, copy):
                raise CheckpointError(
                    f"{path}: holds {key} twice with different values, in {first!r} and in {name!r}; save the one to "
                    "use as a file of its own"
                )


def adapter_config(file: Path) -> Mapping[str, Any] | None:
    """What lies next to a file as ``adapter_config.json``, unless another file is the one that it describes."""
    config = file.with_name(CONFIG_NAME)
    described = [file.with_name(f"{FOLDER_STEMS[0]}{suffix}") for suffix in SUFFIXES]
    if not config.is_file() or (file not in described and any(other.is_file() for other in described)):
        return None
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{config}: cannot be read as JSON ({type(error).__name__}); it gives the scale"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{config}: not a JSON object; it gives the scale of {file.name}")
    return values


def number(source: TensorSource, key: str) -> float:
    """A tensor of one finite number."""
    if source.shape(key).numel() != 1:
        raise CheckpointError(f"{source.name}: {key} has shape {list(source.shape(key))}; it must be one number")
    value = float(source.read(key).reshape(()).float())
    if not math.isfinite(value):
        raise CheckpointError(f"{source.name}: {key} is {value}; it must be a finite number")
    return value
