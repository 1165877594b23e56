"""A device without memory, for tests of what is left after that."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def memory_for(num_allocations: int) -> Iterator[None]:
    """While the body runs, storages get memory this many times; after that, ``resize_`` raises out of memory."""
    left = num_allocations
    resize = torch.UntypedStorage.resize_

    def resize_while_there_is_memory(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
        nonlocal left
        left -= num_bytes > 0
        if left < 0:
            raise torch.OutOfMemoryError
        return resize(storage, num_bytes)

    with patch.object(torch.UntypedStorage, "resize_", resize_while_there_is_memory):
        yield
