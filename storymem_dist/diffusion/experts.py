"""The two experts of Wan2.2, which of them works at a timestep, and where their weights are while they do not.

An ``ExpertPair`` chooses; a ``Residency`` makes the chosen expert ready. Everything placed on one device has
``AllResident``; ``HostSwap`` keeps one expert on the device and both in host memory. Sharded or lazily loaded experts
bring a residency of their own. Knows nothing of prompts, latents or ranks.
"""

import gc
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from storymem_dist.diffusion.solver import NUM_TRAIN_TIMESTEPS
from storymem_dist.diffusion.step_cache import StepCache, step_cache_of
from storymem_dist.diffusion.text_cache import TextCache, text_cache_of
from storymem_dist.errors import ConfigError

HIGH_NOISE = "high_noise"
LOW_NOISE = "low_noise"
EXPERTS = (HIGH_NOISE, LOW_NOISE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One expert, ready to run: a ``WanDiT`` (or what stands for it) and the guidance scale that it is used with."""

    name: str
    module: nn.Module
    guidance_scale: float
    step_cache: StepCache | None = None
    text_cache: TextCache | None = None

    def run(
        self, branch: str, x_BCTHW: Tensor, timestep_B: Tensor, context_BSE: Tensor, temporal_positions_T: Tensor
    ) -> Tensor:
        """One pass of guidance branch ``branch`` ("cond" or "uncond"): the velocity, as ``WanDiT.forward`` gives it."""
        with ExitStack() as caches:
            for cache in self._caches:
                caches.enter_context(cache.during(branch))
            velocity: Tensor = self.module(x_BCTHW, timestep_B, context_BSE, temporal_positions_T)
            return velocity

    def forget(self) -> None:
        """Free what the caches hold; the next step is computed in full."""
        for cache in self._caches:
            cache.forget()

    @property
    def _caches(self) -> list[StepCache | TextCache]:
        return [cache for cache in (self.step_cache, self.text_cache) if cache is not None]

    @property
    def reused(self) -> bool:
        """Whether the step that began last reuses an earlier one (lossy; see ``step_cache``)."""
        return self.step_cache is not None and self.step_cache.reused


class Residency(Protocol):
    """Decides where the experts' weights are."""

    def activate(self, name: str) -> None:
        """Make expert ``name`` ready for forwards on the device; called before every step, so it must be cheap then."""
        ...

    def idle(self) -> None:
        """Take the experts off the device until the next ``activate``, as far as this residency can."""
        ...

    def release(self) -> None:
        """Let go of all weights, on the device and in host memory."""
        ...


class AllResident:
    """Both experts already are where they run, and stay there, unless they are asked to idle.

    With plain (unsharded) ``experts`` and their ``device``, ``idle`` moves both into host memory, and from then on only
    the one that computes is on the device. Without, ``idle`` does nothing.
    """

    def __init__(self, experts: Mapping[str, nn.Module] | None = None, device: torch.device | str = "cpu") -> None:
        self._experts = experts
        self._device = device
        self._swap: HostSwap | None = None

    def activate(self, name: str) -> None:
        """Nothing to do, or as ``HostSwap`` after the first ``idle``."""
        if self._swap is not None:
            self._swap.activate(name)

    def idle(self) -> None:
        """See the class."""
        if self._experts is not None and self._swap is None:
            self._swap = HostSwap(self._experts, self._device)
        if self._swap is not None:
            self._swap.idle()

    def release(self) -> None:
        """Let go of the experts."""
        self._experts = None
        if self._swap is not None:
            self._swap.release()


class ExpertPair:
    """High-noise and low-noise expert of one base model.

    The high-noise expert works at timesteps >= ``boundary_ratio * 1000``, the other below. A
    ``step_cache_threshold`` above 0 is for experts with a step cache around their blocks (``attach_step_cache``).
    """

    def __init__(
        self,
        *,
        high_noise: nn.Module,
        low_noise: nn.Module,
        boundary_ratio: float,
        guidance_scale_high: float,
        guidance_scale_low: float,
        residency: Residency | None = None,
        step_cache_threshold: float = 0.0,
    ) -> None:
        self._boundary = boundary_ratio * NUM_TRAIN_TIMESTEPS
        self._residency = residency or AllResident()
        self._step_cache_threshold = step_cache_threshold
        self._experts = {
            name: Expert(
                name=name,
                module=module,
                guidance_scale=scale,
                step_cache=step_cache_of(module),
                text_cache=text_cache_of(module),
            )
            for name, module, scale in (
                (HIGH_NOISE, high_noise, guidance_scale_high),
                (LOW_NOISE, low_noise, guidance_scale_low),
            )
        }

    def with_sampling(
        self,
        *,
        boundary_ratio: float,
        guidance_scale_high: float,
        guidance_scale_low: float,
        step_cache_threshold: float = 0.0,
    ) -> "ExpertPair":
        """The same experts, in the same memory, chosen and guided in another way."""
        return ExpertPair(
            high_noise=self._experts[HIGH_NOISE].module,
            low_noise=self._experts[LOW_NOISE].module,
            boundary_ratio=boundary_ratio,
            guidance_scale_high=guidance_scale_high,
            guidance_scale_low=guidance_scale_low,
            residency=self._residency,
            step_cache_threshold=step_cache_threshold,
        )

    def begin_shot(self) -> None:
        """Forget what caches hold of another shot.

        Raises ``ConfigError`` when steps are to be reused and an expert has no step cache.
        """
        for expert in self._experts.values():
            if expert.text_cache is not None:
                expert.text_cache.forget()
            if expert.step_cache is not None:
                expert.step_cache.begin_shot(self._step_cache_threshold)
            elif self._step_cache_threshold:
                raise ConfigError(
                    f"sampler.step_cache_threshold={self._step_cache_threshold} needs experts with a step cache; the "
                    f"{expert.name} expert was built without one"
                )

    def name_at(self, timestep: int) -> str:
        """Name of the expert that works at ``timestep`` (0..1000)."""
        return HIGH_NOISE if timestep >= self._boundary else LOW_NOISE

    def select(self, timestep: int) -> Expert:
        """The expert for ``timestep``, made ready to run one step."""
        name = self.name_at(timestep)
        if name not in self._experts:
            raise RuntimeError(f"the {name} expert was released")
        self._residency.activate(name)
        for expert in self._experts.values():
            if expert.name != name:
                expert.forget()
            elif expert.step_cache is not None:
                expert.step_cache.begin_step()
        return self._experts[name]

    def idle(self) -> None:
        """Make room on the device until the next ``select``, as far as the residency can."""
        for expert in self._experts.values():
            expert.forget()
        self._residency.idle()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Drop the experts and free what they held; the pair cannot be used afterwards."""
        self._experts.clear()
        self._residency.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class HostSwap:
    """One expert on ``device`` at a time; both stay in host memory, page-locked when the device is a CUDA one.

    Weights never change, so an expert that leaves the device is not copied back: its parameters point at the host copy
    again. Copies in are queued on the current stream and need no synchronisation. Not for sharded parameters.
    """

    def __init__(self, experts: Mapping[str, nn.Module], device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._active: str | None = None
        memory = _HostMemory(pinned=self._device.type == "cuda")
        self._weights = {name: _HostWeights(module, memory) for name, module in experts.items()}

    def activate(self, name: str) -> None:
        """Bring ``name`` onto the device, after sending the other one away."""
        if name == self._active:
            return
        if self._active is not None:
            self._weights[self._active].leave_device()
        self._weights[name].enter_device(self._device)
        self._active = name

    def idle(self) -> None:
        """Send the active expert away; the device then holds neither."""
        if self._active is not None:
            self._weights[self._active].leave_device()
        self._active = None

    def release(self) -> None:
        """Free the device and host copies; the modules are left without storage."""
        for weights in self._weights.values():
            weights.drop()
        self._weights.clear()
        self._active = None


class _HostWeights:
    """The host copies of one module's parameters and buffers, and the switch between host and device."""

    def __init__(self, module: nn.Module, memory: "_HostMemory") -> None:
        self._host: list[tuple[Tensor, Tensor]] = []
        for tensor in chain(module.parameters(), module.buffers()):
            host = memory.keep(tensor.detach())
            tensor.data = host  # at once, so that never more than one tensor exists twice
            self._host.append((tensor, host))

    def enter_device(self, device: torch.device) -> None:
        for tensor, host in self._host:
            tensor.data = torch.empty_like(host, device=device).copy_(host, non_blocking=True)

    def leave_device(self) -> None:
        for tensor, host in self._host:
            tensor.data = host

    def drop(self) -> None:
        for tensor, host in self._host:
            tensor.data = torch.empty(0, dtype=host.dtype)
        self._host.clear()


class _HostMemory:
    """Hands out host tensors cut from large slabs.

    CUDA's page-locked allocator rounds every allocation up to a power of two, which nearly doubles matrices of 135 MiB;
    slabs of a power of two waste only their last part.
    """

    _SLAB_BYTES = 2**30
    _ALIGNMENT = 256

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
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
