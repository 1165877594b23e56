"""Reads transformers from GGUF files; the package ``gguf`` (an extra) parses them and turns blocks back into numbers.

Rows are read and dequantized a few at a time. Knows nothing about models.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError
from storymem_dist.weights.safetensors_file import PositionalReader

_MAGIC = b"GGUF"
_SHAPE_FIELD = "comfy.gguf.orig_shape."
"""Metadata of converters: the shape of a tensor that they had to reshape."""


def is_gguf(path: Path) -> bool:
    """Whether a file's content is GGUF, whatever its suffix."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """Where a tensor lies. ``plain`` is its type if it is stored as numbers, ``quantization`` its name in GGUF."""

    offset: int
    num_bytes: int
    shape: torch.Size
    plain: torch.dtype | None
    quantization: str


class GgufSource:
    """A ``TensorSource`` over one GGUF file: quantized tensors in fp32, others as stored.

    ``names`` takes all names in the file and returns what turns each into the model's.

    Raises:
        CheckpointError: the package ``gguf`` is missing or does not know a quantization; the file is damaged.
    """

    max_concurrent_reads = 4

    def __init__(self, path: Path, names: Callable[[Iterable[str]], Callable[[str], str]] = lambda _: str) -> None:
        self.name = str(path)
        self._gguf = _package(path)
        self._reader = PositionalReader(path)
        stored = _read_entries(self._gguf, path)
        rename = names(stored)
        self._entries = {rename(name): entry for name, entry in stored.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read."""
        return self._reader.bytes_read

    @property
    def quantizations(self) -> Sequence[str]:
        """The types of the tensors, as GGUF calls them."""
        return sorted({entry.quantization for entry in self._entries.values()})

    def keys(self) -> Sequence[str]:
        """Names in the order of their data."""
        return tuple(self._entries)

    def shape(self, key: str) -> torch.Size:
        """Shape of the whole tensor."""
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """The stored type, or fp32 where it is quantized."""
        return self._entries[key].plain or torch.float32

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """Rows in fresh memory."""
        entry = self._entries[key]
        start, stop, shape = 0, 1, entry.shape
        num_rows = shape[0] if shape else 1
        if rows is not None:
            start, stop, step = rows.indices(num_rows)
            assert step == 1 and start <= stop
            shape = torch.Size((stop - start, *shape[1:]))
        else:
            stop = num_rows
        row_bytes = entry.num_bytes // num_rows if num_rows else 0
        raw = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self._reader.fill(raw.numpy().data, entry.offset + start * row_bytes)
        if entry.plain is not None:
            values = raw.view(entry.plain).reshape(shape)
        else:
            blocks = raw.numpy().reshape(stop - start, row_bytes)
            kind = self._gguf.GGMLQuantizationType[entry.quantization]
            numbers = self._gguf.dequantize(blocks, kind) if len(blocks) else np.empty(0, np.float32)
            values = torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).reshape(shape)
        return values.pin_memory() if pin_memory else values


def _package(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{path}: a GGUF file is read with the package gguf, which is not installed: pip install "
            "'storymem_dist[gguf]' (or pip install gguf)"
        ) from None
    return gguf


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read_entries(gguf: Any, path: Path) -> dict[str, _Entry]:
    num_bytes = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        entries = {tensor.name: _entry(gguf, reader, tensor, path) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: a GGUF file that is damaged or truncated ({num_bytes} bytes), or of a version that the package "
            f"gguf does not read ({type(error).__name__}: {error})"
        ) from None
    if not entries:
        raise CheckpointError(f"{path}: a GGUF file without tensors; download it again")
    for name, entry in entries.items():
        if entry.offset + entry.num_bytes > num_bytes:
            raise CheckpointError(f"{path}: truncated: {name} ends behind the file's {num_bytes} bytes")
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def _entry(gguf: Any, reader: Any, tensor: Any, path: Path) -> _Entry:
    shape = torch.Size(int(size) for size in reversed(tensor.shape))
    if (field := reader.get_field(_SHAPE_FIELD + tensor.name)) is not None:
        original = torch.Size(int(field.parts[index][0]) for index in field.data)
        if prod(original) != prod(shape):
            raise CheckpointError(f"{path}: {tensor.name} of shape {list(shape)} cannot be {list(original)}")
        shape = original
    quantization = tensor.tensor_type.name
    plain = _PLAIN.get(quantization)
    if plain is None:
        block_bytes = _block_bytes(gguf, quantization)
        if block_bytes is None or tensor.n_bytes % (max(1, shape[:1].numel()) * block_bytes):
            raise CheckpointError(
                f"{path}: {tensor.name} is {quantization}, which the package gguf cannot turn into numbers by row; use "
                "another file of these weights, such as Q8_0"
            )
    return _Entry(
        offset=int(tensor.data_offset),
        num_bytes=int(tensor.n_bytes),
        shape=shape,
        plain=plain,
        quantization=quantization,
    )


@cache
def _block_bytes(gguf: Any, quantization: str) -> int | None:
    """Bytes of one block of a quantization, or None if the package cannot dequantize it."""
    kind = gguf.GGMLQuantizationType[quantization]
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return None
    return int(num_bytes)
