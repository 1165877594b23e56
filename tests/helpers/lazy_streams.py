"""CUDA streams that finish as late as they may, on a CPU: work on other streams runs only when something waits for it.

Stands for ``torch.get_device_module``. Memory holds NaN from its allocation until it is written. So three faults show:
a read that comes too early, an allocation on another stream than the current one, and a copy into memory that does not
wait for earlier work of the current stream.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TAKE_MEMORY = {torch.ops.aten.empty_like.default, torch.ops.aten.empty.memory_format}
_NAN_BYTE = 255  # in every floating-point format


class LazyStreams(TorchDispatchMode):
    """While it is entered, copies on other streams than the current one are put off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.num_copied = 0
        self._now = self._side = _LazyStream()
        self._num_ops = 0
        self._ops_waited_for = -1
        resize = torch.UntypedStorage.resize_

        def resize_and_poison(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
            assert self._side is self._now, "memory is taken and given back on the current stream"
            self._num_ops += 1
            had = storage.nbytes()
            resize(storage, num_bytes)
            return storage.fill_(_NAN_BYTE) if num_bytes > had else storage

        monkeypatch.setattr(torch.UntypedStorage, "resize_", resize_and_poison)
        monkeypatch.setattr(torch, "get_device_module", lambda device: self)

    def Stream(self) -> "_LazyStream":
        return _LazyStream(self)

    def Event(self) -> "_LazyEvent":
        return _LazyEvent()

    def current_stream(self, device: torch.device) -> "_LazyStream":
        return self._now

    @contextmanager
    def stream(self, side: "_LazyStream") -> Iterator[None]:
        self._side = side
        try:
            yield
        finally:
            self._side = self._now

    def waits_for_now(self) -> None:
        self._ops_waited_for = self._num_ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._side is self._now:
            self._num_ops += 1
            return func(*args, **(kwargs or {}))
        assert func not in _TAKE_MEMORY, "memory is taken on the current stream"
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        assert self._ops_waited_for == self._num_ops, "the memory may still be in use on the current stream"
        self._side.queue.append(lambda: self._copy(func, args, kwargs or {}))
        return args[0]

    def _copy(self, func: Any, args: Any, kwargs: Any) -> None:
        __tracebackhide__ = True  # pytest would print a tensor without memory, and crash
        self.num_copied += 1
        assert args[0].untyped_storage().nbytes(), "the memory was given to others before the copy was over"
        func(*args, **kwargs)


class _LazyStream:
    """Runs nothing before it must; the current one runs everything at once."""

    def __init__(self, streams: LazyStreams | None = None) -> None:
        self.queue: list[Callable[[], None]] = []
        self.num_run = 0
        self._streams = streams

    def run_until(self, end: int) -> None:
        while self.num_run < end:
            self.queue[self.num_run]()
            self.num_run += 1

    def wait_stream(self, other: "_LazyStream") -> None:
        other.run_until(len(other.queue))
        if self._streams is not None:
            self._streams.waits_for_now()


class _LazyEvent:
    def record(self, stream: _LazyStream) -> None:
        self._stream, self._end = stream, len(stream.queue)

    def wait(self, stream: _LazyStream) -> None:
        self._stream.run_until(self._end)
