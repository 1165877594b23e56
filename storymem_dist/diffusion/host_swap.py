"""Experts that take turns on the device: host memory keeps both, and the active one is copied to the device.

Weights never change, so nothing is copied back: device memory is allocated before the expert runs and freed after it.
For a CUDA device, host memory is page-locked. Copies run block by block on their own stream, while the expert's first
step runs: a block waits for its own weights only. Works on any device for which torch has streams (those of a CPU do
nothing). Knows nothing about prompts, ranks or sharding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from storymem_dist.models.wan.dit import BlockStack

_SLAB_BYTES = 2**30
_ALIGNMENT = 256


HostWeightsT = TypeVar("HostWeightsT", bound="HostWeights")


class HostSwap(Generic[HostWeightsT]):
    """A ``Residency`` with at most one expert on the device, and none between the denoise loops of two shots."""

    def __init__(self, weights: Mapping[str, HostWeightsT]) -> None:
        self._weights = dict(weights)
        self._active: str | None = None

    def activate(self, name: str) -> None:
        """Bring ``name`` to the device, after freeing the other expert there."""
        if name != self._active:
            self._leave()
            self._active = name  # set first: if memory runs out half-way, ``idle`` frees what was allocated
            self._enter(self._weights[name])

    def end_shot(self) -> None:
        """Free the device: the next shot begins with the other expert, and work between shots can use the memory."""
        self._leave()

    def idle(self) -> None:
        """Free the active expert's device memory; the device then holds no expert."""
        self._leave()

    def release(self) -> None:
        """Free the copies on device and host; the modules cannot be used afterwards."""
        self._leave()
        self._weights.clear()

    def _enter(self, weights: HostWeightsT) -> None:
        weights.enter_device()

    def _leave(self) -> None:
        if self._active is not None:
            self._weights[self._active].leave_device()
        self._active = None


class HostWeights:
    """The weights of one expert in host memory; its parameters have no device memory until ``enter_device``.

    Parameters on ``device`` stay the same objects; those in host memory are replaced by parameters there. ``local_of``
    returns the part of a parameter that this process holds. With ``by_block``, a module whose ``blocks`` are a
    ``BlockStack`` may run before all of its weights have arrived. Without it, the module waits for all weights; this is
    for code that reads weights ahead on its own streams. Attributes that are neither parameters nor buffers are not
    touched.
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
        self._stack = blocks if by_block and isinstance(blocks, BlockStack) else None
        if self._stack is not None:
            self._stack.before_block = self._wait_for
        self._module = module
        self._parts = {
            part: [_Kept(place, memory, device, local_of) for place in places]
            for part, places in _in_order_of_use(module, self._stack)
        }

    def enter_device(self) -> None:
        """Queue all copies. The current stream waits only for the weights that are used before the first block."""
        self._bring(list(self._parts))
        self._wait_for(self._module)

    def leave_device(self) -> None:
        """Free the device memory, after all copies and all reads of the weights."""
        if not self._by_block:
            self._streams.synchronize(self._device)
        self._streams.current_stream(self._device).wait_stream(self._copies)
        self._arrivals.clear()
        for kept in chain.from_iterable(self._parts.values()):
            kept.free()

    def _bring(self, parts: Sequence[nn.Module]) -> None:
        """Give ``parts`` memory and queue their copies, in order."""
        for part in parts:
            for kept in self._parts[part]:
                kept.allocate()
        # The current stream may still use the memory that was allocated, so the copies wait for that stream.
        self._copies.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._copies):
            for part in parts:
                for kept in self._parts[part]:
                    kept.fill()
                self._arrivals[part] = self._streams.Event()
                self._arrivals[part].record(self._copies)

    def _drop(self, part: nn.Module) -> None:
        """Take the memory of ``part``, after its copy and all reads that were queued before."""
        self._wait_for(part)
        for kept in self._parts[part]:
            kept.free()

    def _wait_for(self, part: nn.Module) -> None:
        arrival = self._arrivals.pop(part, None)
        if arrival is not None:
            arrival.wait(self._streams.current_stream(self._device))


def _in_order_of_use(module: nn.Module, stack: BlockStack | None) -> Iterator[tuple[nn.Module, list["_Place"]]]:
    """All parameters and buffers of ``module``: those outside its blocks first, then block by block."""
    inside = {id(place.tensor) for place in _places_in(stack)} if stack is not None else set()
    yield module, [place for place in _places_in(module) if id(place.tensor) not in inside]
    for block in stack or ():
        yield block, _places_in(block)


def _places_in(module: nn.Module) -> list["_Place"]:
    """Where the parameters and buffers of ``module`` are, each once."""
    places = {
        id(tensor): _Place(owner=owner, name=name, tensor=tensor)
        for owner in module.modules()
        for name, tensor in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
    }
    return list(places.values())


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A parameter or buffer, and the module that holds it under ``name``."""

    owner: nn.Module
    name: str
    tensor: Tensor

    def on(self, device: torch.device) -> Tensor:
        """The tensor if it is on ``device``, else a new one without values there that takes its place."""
        tensor = self.tensor
        if tensor.device.type != device.type:
            tensor = torch.empty_like(tensor, device=device)
            if isinstance(self.tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
            setattr(self.owner, self.name, tensor)
        return tensor


class _Kept:
    """A tensor whose values are kept in host memory; its own storage is allocated and freed."""

    def __init__(
        self, place: _Place, memory: "HostMemory", device: torch.device, local_of: Callable[[Tensor], Tensor]
    ) -> None:
        self._host = memory.keep(local_of(place.tensor))
        self._tensor = local_of(place.on(device))
        self._num_bytes = self._tensor.untyped_storage().nbytes()
        self.free()  # at once, so that only one tensor at a time exists twice

    def allocate(self) -> None:
        self._tensor.untyped_storage().resize_(self._num_bytes)

    def fill(self) -> None:
        self._tensor.copy_(self._host, non_blocking=True)

    def free(self) -> None:
        self._tensor.untyped_storage().resize_(0)


class HostMemory:
    """Host tensors; for a CUDA ``device`` they are page-locked and cut from large slabs.

    CUDA's page-locked allocator may round every allocation up to a power of two, which nearly doubles matrices of
    135 MiB. Slabs whose size is a power of two waste only their last part.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous host copy of ``tensor``; ``tensor`` itself if it came from ``empty_like``."""
        if not self._pinned:
            return tensor.contiguous().to("cpu", copy=True)
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.is_pinned():
            return tensor
        return self.empty_like(tensor).copy_(tensor)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Host memory for a contiguous tensor of the shape and dtype of ``tensor``, which may be on any device."""
        if not self._pinned:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        num_bytes = tensor.numel() * tensor.element_size()
        if self._used + num_bytes > self._slab.numel():
            self._slab, self._used = _page_locked(_slab_for(num_bytes)), 0
        part = self._slab[self._used : self._used + num_bytes].view(tensor.dtype).view(tensor.shape)
        self._used += _aligned(num_bytes)
        return part


def page_locked_bytes(sizes: Iterable[int]) -> int:
    """Bytes that a ``HostMemory`` of a CUDA device takes for tensors of ``sizes`` bytes, in this order."""
    total = slab = used = 0
    for num_bytes in sizes:
        if used + num_bytes > slab:
            slab, used = _slab_for(num_bytes), 0
            total += slab
        used += _aligned(num_bytes)
    return total


def _page_locked(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _slab_for(num_bytes: int) -> int:
    return max(_SLAB_BYTES, 1 << (num_bytes - 1).bit_length())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
