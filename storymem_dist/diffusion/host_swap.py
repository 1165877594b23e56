"""Experts that take turns on the device: all wait in host memory, and the one that computes has a copy on the device.

Weights never change, so nothing is ever copied back. Memory on the host is page-locked when the device is a CUDA one.
Copies run on a stream of their own, block after block, while the first step with the expert runs: a block waits for
its own weights only. Works on any device that torch knows streams of (a CPU's do nothing). Knows nothing of prompts or
ranks; what sharded parameters need is in ``parallel.fsdp``.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from storymem_dist.models.wan.dit import BlockStack


class WeightsOnHost(Protocol):
    """One expert's weights, kept in host memory and copied onto the device for a while."""

    def enter_device(self) -> None:
        """Make the weights ready for forwards that are queued from now on."""
        ...

    def leave_device(self) -> None:
        """Free the copies on the device."""
        ...

    def drop(self) -> None:
        """Let go of the weights for good."""
        ...


class HostSwap:
    """A ``Residency`` with at most one expert on the device."""

    def __init__(self, weights: Mapping[str, WeightsOnHost]) -> None:
        self._weights = dict(weights)
        self._active: str | None = None

    def activate(self, name: str) -> None:
        """Bring ``name`` onto the device, after sending the other one away."""
        if name != self._active:
            self.idle()
            self._weights[name].enter_device()
            self._active = name

    def idle(self) -> None:
        """Send the active expert away; the device then holds none."""
        if self._active is not None:
            self._weights[self._active].leave_device()
        self._active = None

    def release(self) -> None:
        """Free the copies on device and host; the modules cannot be used afterwards."""
        for weights in self._weights.values():
            weights.drop()
        self._weights.clear()
        self._active = None


class HostWeights:
    """``WeightsOnHost`` of a module with plain parameters: moves them into host memory at once.

    A module whose ``blocks`` are a ``BlockStack`` may run before all of its weights have arrived.
    """

    def __init__(self, module: nn.Module, memory: "HostMemory", device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._copies: Any = self._streams.Stream()
        self._arrivals: dict[nn.Module, Any] = {}
        blocks = getattr(module, "blocks", None)
        stack = blocks if isinstance(blocks, BlockStack) else None
        if stack is not None:
            stack.before_block = self._wait_for
        self._parts = [_Part(part, tensors, memory) for part, tensors in _in_order_of_use(module, stack)]

    def enter_device(self) -> None:
        """Queue all copies; what runs before the first block is waited for on the current stream, and no more."""
        for part in self._parts:
            part.allocate(self._device)
        # Memory was taken from what the current stream used until now, so the copies come after all of that.
        self._copies.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._copies):
            for part in self._parts:
                part.fill()
                self._arrivals[part.module] = self._streams.Event()
                self._arrivals[part.module].record(self._copies)
        self._wait_for(self._parts[0].module)

    def leave_device(self) -> None:
        """Point every parameter at its host copy."""
        self._finish()
        for part in self._parts:
            part.leave()

    def drop(self) -> None:
        """Leave the module without storage."""
        self._finish()
        for part in self._parts:
            part.drop()
        self._parts.clear()

    def _wait_for(self, module: nn.Module) -> None:
        arrival = self._arrivals.pop(module, None)
        if arrival is not None:
            arrival.wait(self._streams.current_stream(self._device))

    def _finish(self) -> None:
        """Let no copy be under way when the current stream gets its target's memory."""
        self._streams.current_stream(self._device).wait_stream(self._copies)
        self._arrivals.clear()


def _in_order_of_use(module: nn.Module, stack: BlockStack | None) -> Iterable[tuple[nn.Module, list[Tensor]]]:
    """All parameters and buffers of ``module``: those outside its blocks first, then block by block."""
    inside = {id(tensor) for tensor in _tensors_of(stack)} if stack is not None else set()
    yield module, [tensor for tensor in _tensors_of(module) if id(tensor) not in inside]
    for block in stack or ():
        yield block, _tensors_of(block)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*chain(module.parameters(), module.buffers())]


class _Part:
    """What arrives together: some tensors of an expert, each with its host copy, under the module they are for."""

    def __init__(self, module: nn.Module, tensors: Iterable[Tensor], memory: "HostMemory") -> None:
        self.module = module
        self._host: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            host = memory.keep(tensor.detach())
            tensor.data = host  # at once, so that never more than one tensor exists twice
            self._host.append((tensor, host))

    def allocate(self, device: torch.device) -> None:
        for tensor, host in self._host:
            tensor.data = torch.empty_like(host, device=device)

    def fill(self) -> None:
        for tensor, host in self._host:
            tensor.data.copy_(host, non_blocking=True)

    def leave(self) -> None:
        for tensor, host in self._host:
            tensor.data = host

    def drop(self) -> None:
        for tensor, host in self._host:
            tensor.data = torch.empty(0, dtype=host.dtype)
        self._host.clear()


class HostMemory:
    """Hands out host tensors; page-locked ones, for ``device`` a CUDA one, are cut from large slabs.

    CUDA's page-locked allocator rounds every allocation up to a power of two, which nearly doubles matrices of 135 MiB;
    slabs of a power of two waste only their last part.
    """

    _SLAB_BYTES = 2**30
    _ALIGNMENT = 256

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A host copy of ``tensor``, contiguous."""
        num_bytes = tensor.numel() * tensor.element_size()
        if not self._pinned:
            return tensor.contiguous().to("cpu", copy=True)
        if self._used + num_bytes > self._slab.numel():
            size = max(self._SLAB_BYTES, num_bytes)
            self._slab, self._used = torch.empty(size, dtype=torch.uint8, pin_memory=True), 0
        part = self._slab[self._used : self._used + num_bytes].view(tensor.dtype).view(tensor.shape)
        self._used += -(-num_bytes // self._ALIGNMENT) * self._ALIGNMENT
        return part.copy_(tensor)
