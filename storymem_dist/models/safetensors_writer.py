"""Writes one safetensors file tensor by tensor, or row by row: what is in memory is what is being written.

The data starts at a multiple of ``DATA_ALIGNMENT`` bytes, so tensors whose sizes are multiples of a page stay on page
boundaries. Files appear under their name only when they are complete.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from storymem_dist.models.safetensors_file import DTYPES

DATA_ALIGNMENT = 4096
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """A context manager; ``write`` takes rows in the order of ``entries``. Leaving with rows missing is an error.

    Args:
        path: the file to make; written beside (``.partial``) and renamed at the end.
        entries: dtype and shape of every tensor, in the order of their data.
        metadata: strings for the header.
        digest: a ``hashlib`` object that is to see every byte of the file.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, torch.Size]],
        metadata: Mapping[str, str] | None = None,
        digest: "hashlib._Hash | None" = None,
    ) -> None:
        self.path = path
        self._digest = digest
        self._partial = path.with_name(f"{path.name}.partial")
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
        self._file = self._partial.open("wb")
        self._append(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, key: str, rows: Tensor) -> None:
        """Append the next rows of ``key`` (or all of it), in its dtype."""
        dtype = self._entries[key][0]
        assert rows.dtype == dtype, f"{key} is announced as {dtype}, not {rows.dtype}"
        assert self._written + rows.nbytes <= self._ends[key], f"{key} is out of order or longer than announced"
        self._append(rows.contiguous().flatten().view(torch.uint8).numpy().data)
        self._written += rows.nbytes

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if self._digest is not None:
            self._digest.update(data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._partial.unlink()
            return
        assert self._written == self._num_bytes, f"{self.path}: {self._written} of {self._num_bytes} bytes were written"
        self._partial.replace(self.path)
