"""A ``TensorSource`` that shows another one in part, or with other numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from storymem_dist.weights.loading import TensorSource


class WrappedSource:
    """The tensors ``keys`` of ``stored``, as they are. Subclasses change what ``dtype`` and ``read`` return."""

    def __init__(self, stored: TensorSource, keys: Sequence[str]) -> None:
        self._stored = stored
        self._keys = tuple(keys)
        self.name = stored.name
        self.max_concurrent_reads = stored.max_concurrent_reads

    @property
    def bytes_read(self) -> int:
        """Bytes of stored data read."""
        return self._stored.bytes_read

    def keys(self) -> Sequence[str]:
        """Names of the weights that are shown."""
        return self._keys

    def shape(self, key: str) -> torch.Size:
        """Shape of the whole weight."""
        return self._stored.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """The type that ``read`` returns."""
        return self._stored.dtype(key)

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """Rows in fresh memory."""
        return self._stored.read(key, rows, pin_memory=pin_memory)
