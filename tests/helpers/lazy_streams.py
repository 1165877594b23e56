"""Streams at their laziest, on a CPU: what is queued beside the current stream runs only when somebody waits for it.

Stands for ``torch.get_device_module``. Memory is full of NaN until it is written, so whoever reads too early is found
out; a copy that is queued without waiting for what the current stream did before is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LazyStreams(TorchDispatchMode):
    """While it is entered, copies on other streams than the current one are put off."""

    def __init__(self) -> None:
        super().__init__()
        self.num_copied = 0
        self._now = self._side = _LazyStream()
        self._num_ops = 0
        self._ops_waited_for = -1

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
        if self._side is not self._now and func is torch.ops.aten.copy_.default:
            assert self._ops_waited_for == self._num_ops, "the memory may still be in use on the current stream"
            self._side.queue.append(lambda: self._copy(func, args, kwargs or {}))
            return args[0]
        if self._side is self._now:
            self._num_ops += 1
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty_like.default, torch.ops.aten.empty.memory_format):
            _poison(result)
        return result

    def _copy(self, func: Any, args: Any, kwargs: Any) -> None:
        self.num_copied += 1
        func(*args, **kwargs)


def _poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))


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
