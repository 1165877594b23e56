"""Experts that take turns on the device: host memory keeps both, and the active one is copied to the device.

Weights never change, so nothing is copied back: device memory is allocated before the expert runs and freed after it.
For a CUDA device, host memory is page-locked. Copies run block by block on their own stream, while the expert's first
step runs: a block waits for its own weights only. Works on any device for which torch has streams (those of a CPU do
nothing). Knows nothing about prompts, ranks or sharding.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from storymem_dist.models.wan.dit import BlockStack


class HostSwap:
    """A ``Residency`` with at most one expert on the device, and none between the denoise loops of two shots."""

    def __init__(self, weights: Mapping[str, "HostWeights"]) -> None:
        self._weights = dict(weights)
        self._active: str | None = None

    def activate(self, name: str) -> None:
        """Copy ``name`` to the device, after freeing the other expert there."""
        if name != self._active:
            self.idle()
            self._active = name  # set first: if memory runs out half-way, ``idle`` frees what was allocated
            self._weights[name].enter_device()

    def end_shot(self) -> None:
        """As ``idle``: the next shot begins with the other expert, and work between shots can use the memory."""
        self.idle()

    def idle(self) -> None:
        """Free the active expert's device memory; the device then holds no expert."""
        if self._active is not None:
            self._weights[self._active].leave_device()
        self._active = None

    def release(self) -> None:
        """Free the copies on device and host; the modules cannot be used afterwards."""
        self.idle()
        self._weights.clear()


class HostWeights:
    """The weights of one expert in host memory; its parameters have no device memory until ``enter_device``.

    Parameters stay the same objects on the same ``device``. ``local_of`` returns the part of a parameter that this
    process holds. With ``by_block``, a module whose ``blocks`` are a ``BlockStack`` may run before all of its weights
    have arrived. Without it, the module waits for all weights; this is for code that reads weights ahead on its own
    streams.
    """

    def __init__(
        self,
        module: nn.Module,
        memory: "HostMemory",
        device: torch.device,
        *,
        local_of: Callable[[Tensor], Tensor] = Tensor.detach,
        by_block: bool = True,
    ) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._copies: Any = self._streams.Stream()
        self._arrivals: dict[nn.Module, Any] = {}
        self._by_block = by_block
        blocks = getattr(module, "blocks", None)
        stack = blocks if by_block and isinstance(blocks, BlockStack) else None
        if stack is not None:
            stack.before_block = self._wait_for
        self._parts = {
            part: [_Kept(local_of(tensor), memory) for tensor in tensors]
            for part, tensors in _in_order_of_use(module, stack)
        }

    def enter_device(self) -> None:
        """Queue all copies. The current stream waits only for the weights that are used before the first block."""
        for kept in chain.from_iterable(self._parts.values()):
            kept.allocate()
        # The current stream may still use the memory that was allocated, so the copies wait for that stream.
        self._copies.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._copies):
            for part, tensors in self._parts.items():
                for kept in tensors:
                    kept.fill()
                self._arrivals[part] = self._streams.Event()
                self._arrivals[part].record(self._copies)
        self._wait_for(next(iter(self._parts)))

    def leave_device(self) -> None:
        """Free the device memory, after all copies and all reads of the weights."""
        if not self._by_block:
            self._streams.synchronize(self._device)
        self._streams.current_stream(self._device).wait_stream(self._copies)
        for kept in chain.from_iterable(self._parts.values()):
            kept.free()

    def _wait_for(self, part: nn.Module) -> None:
        arrival = self._arrivals.pop(part, None)
        if arrival is not None:
            arrival.wait(self._streams.current_stream(self._device))


def _in_order_of_use(module: nn.Module, stack: BlockStack | None) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """All parameters and buffers of ``module``: those outside its blocks first, then block by block."""
    inside = {id(tensor) for tensor in _tensors_of(stack)} if stack is not None else set()
    yield module, [tensor for tensor in _tensors_of(module) if id(tensor) not in inside]
    for block in stack or ():
        yield block, _tensors_of(block)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*chain(module.parameters(), module.buffers())]


class _Kept:
    """A tensor whose values are kept in host memory; its own storage is allocated and freed."""

    def __init__(self, tensor: Tensor, memory: "HostMemory") -> None:
        self._tensor = tensor
        self._num_bytes = tensor.untyped_storage().nbytes()
        self._host = memory.keep(tensor)
        self.free()  # at once, so that only one tensor at a time exists twice

    def allocate(self) -> None:
        self._tensor.untyped_storage().resize_(self._num_bytes)

    def fill(self) -> None:
        self._tensor.copy_(self._host, non_blocking=True)

    def free(self) -> None:
        self._tensor.untyped_storage().resize_(0)


class HostMemory:
    """Makes host copies of tensors; for a CUDA ``device`` they are page-locked and cut from large slabs.

    CUDA's page-locked allocator rounds every allocation up to a power of two, which nearly doubles matrices of 135 MiB.
    Slabs whose size is a power of two waste only their last part.
    """

    _SLAB_BYTES = 2**30
    _ALIGNMENT = 256

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous host copy of ``tensor``."""
        num_bytes = tensor.numel() * tensor.element_size()
        if not self._pinned:
            return tensor.contiguous().to("cpu", copy=True)
        if self._used + num_bytes > self._slab.numel():
            size = max(self._SLAB_BYTES, num_bytes)
            self._slab, self._used = torch.empty(size, dtype=torch.uint8, pin_memory=True), 0
        part = self._slab[self._used : self._used + num_bytes].view(tensor.dtype).view(tensor.shape)
        self._used += -(-num_bytes // self._ALIGNMENT) * self._ALIGNMENT
        return part.copy_(tensor)
