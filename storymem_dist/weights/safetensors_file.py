"""Safetensors files: checks the header, reads single rows into fresh memory, and writes row by row.

Knows nothing about models: keys are just names.

Reads use ``pread``, not a memory map. Views of a map alias the file (an in-place operation on one changes later reads),
touched pages count as memory of the process, and a truncated file kills the process with SIGBUS. ``pread`` copies
exactly the requested bytes, from any thread.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError
from storymem_dist.files import replacing

# The 8-byte little-endian header length that starts every file, and the format's own bound on it.
_PREFIX = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
# Linux moves at most this many bytes in one read call.
_MAX_READ_BYTES = 0x7FFF_F000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

DATA_ALIGNMENT = 4096
"""Written data starts at a multiple of this, so tensors whose sizes are multiples of a page stay on page boundaries."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int
    num_bytes: int


class PositionalReader:
    """Fills buffers from places in a file, from any thread.

    The descriptor is opened on the first read and lives as long as the object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on. Raises ``CheckpointError`` if the file ends before."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done : done + _MAX_READ_BYTES]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: the file became shorter while it was being read")
            done += count
        with self._lock:
            self.bytes_read += done

    def close(self) -> None:
        """Close the descriptor; a later read opens it again."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()


class SafetensorsFile:
    """A safetensors file whose header was read and found to fit the file's size.

    Opening reads the header alone.

    Raises:
        CheckpointError: the file is not safetensors, is truncated, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size
        self.header, data_start = _read_header(path, self.num_bytes)
        self.metadata: dict[str, str] = self.header.get("__metadata__", {})
        self._entries = _parse_entries(path, self.header, data_start, self.num_bytes)
        self._reader = PositionalReader(path)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        """Keys in the order of their data in the file, so that a loop over them reads forward."""
        return iter(self._entries)

    def __getitem__(self, key: str) -> TensorEntry:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self._reader.bytes_read

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """Rows of one tensor along its first dimension, in memory of their own, as stored (no cast).

        ``rows`` needs step 1 and lies inside the tensor; None reads all. May be called from several threads.
        """
        entry = self._entries[key]
        offset, shape = entry.offset, entry.shape
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            assert step == 1 and start <= stop
            row_bytes = entry.num_bytes // shape[0] if shape[0] else 0
            offset += start * row_bytes
            shape = torch.Size((stop - start, *shape[1:]))
        raw = torch.empty(prod(shape) * entry.dtype.itemsize, dtype=torch.uint8, pin_memory=pin_memory)
        self._reader.fill(raw.numpy().data, offset)
        return raw.view(entry.dtype).reshape(shape)

    def close(self) -> None:
        """Close the descriptor; a later read opens it again."""
        self._reader.close()


_OTHER_FORMATS: Mapping[bytes, str] = {
    b"GGUF": "a GGUF file, which is read for transformers only; use the .safetensors file of the same weights",
    b"version https://git-lfs": "a Git LFS pointer instead of the file; fetch it with: git lfs pull",
    b"<!DOCTYPE": "a web page instead of the file; download it again",
    b"<!doctype": "a web page instead of the file; download it again",
    b"<html": "a web page instead of the file; download it again",
}
"""What people have under the name of a file of weights, by its first bytes."""


def refuse_other_formats(path: Path) -> None:
    """Raise ``CheckpointError`` if the first bytes of a file, whatever its suffix, are of a format that is not read."""
    with path.open("rb") as file:
        start = file.read(max(map(len, _OTHER_FORMATS)))
    for magic, what in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {what}")


def _read_header(path: Path, num_bytes: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset of the data behind it."""
    refuse_other_formats(path)
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise CheckpointError(f"{path}: not a safetensors file, or truncated: it holds {num_bytes} bytes")
        (header_bytes,) = _PREFIX.unpack(prefix)
        if header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file (it starts with {prefix!r})")
        if _PREFIX.size + header_bytes > num_bytes:
            raise CheckpointError(
                f"{path}: truncated: its header alone needs {_PREFIX.size + header_bytes} bytes, "
                f"the file has {num_bytes}; download it again"
            )
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is not a JSON object)")
    return header, _PREFIX.size + header_bytes


def _parse_entries(path: Path, header: dict[str, Any], data_start: int, num_bytes: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    data_end = data_start
    for key, value in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[value["dtype"]], torch.Size(value["shape"])
            start, stop = (data_start + offset for offset in value["data_offsets"])
            if min(shape, default=0) < 0 or not data_start <= start <= stop:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
            raise CheckpointError(f"{path}: the header's entry for {key!r} cannot be used: {value!r}") from None
        if stop - start != prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: {key!r} of shape {list(shape)} and type {value['dtype']} needs "
                f"{prod(shape) * dtype.itemsize} bytes; the header gives it {stop - start}"
            )
        entries[key] = TensorEntry(dtype=dtype, shape=shape, offset=start, num_bytes=stop - start)
        data_end = max(data_end, stop)
    if data_end != num_bytes:
        state = "truncated" if num_bytes < data_end else "longer than its header says"
        raise CheckpointError(
            f"{path}: {state}: its header describes {data_end} bytes, the file has {num_bytes}; download it again"
        )
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


class SafetensorsWriter:
    """Writes one file tensor by tensor, or row by row; made by ``write_safetensors``."""

    def __init__(
        self,
        file: BinaryIO,
        entries: Mapping[str, tuple[torch.dtype, torch.Size]],
        metadata: Mapping[str, str] | None,
        digest: "hashlib._Hash | None",
    ) -> None:
        self._file = file
        self._digest = digest
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._ends: dict[str, int] = {}
        end = 0
        for key, (dtype, shape) in entries.items():
            start, end = end, end + shape.numel() * dtype.itemsize
            header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._ends[key] = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(len(encoded) + 8) % DATA_ALIGNMENT)
        self._num_bytes = end
        self._written = 0
        self._entries = entries
        self._append(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, key: str, rows: Tensor) -> None:
        """Append the next rows of ``key`` (or all of it), in its dtype; keys come in the order of the entries."""
        dtype = self._entries[key][0]
        assert rows.dtype == dtype, f"{key} is announced as {dtype}, not {rows.dtype}"
        assert self._written + rows.nbytes <= self._ends[key], f"{key} is out of order or longer than announced"
        self._append(rows.contiguous().flatten().view(torch.uint8).numpy().data)
        self._written += rows.nbytes

    def check_complete(self) -> None:
        """Assert that all rows of all entries are written."""
        assert self._written == self._num_bytes, f"{self._written} of {self._num_bytes} bytes were written"

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if self._digest is not None:
            self._digest.update(data)


@contextmanager
def write_safetensors(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, torch.Size]],
    metadata: Mapping[str, str] | None = None,
    digest: "hashlib._Hash | None" = None,
) -> Iterator[SafetensorsWriter]:
    """Yield a writer for the file ``path``, which appears under its name only when it is complete.

    Args:
        path: the file to make.
        entries: dtype and shape of every tensor, in the order of their data. All of them must be written.
        metadata: strings for the header.
        digest: a ``hashlib`` object, updated with every byte of the file.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = SafetensorsWriter(file, entries, metadata, digest)
        yield writer
        writer.check_complete()
