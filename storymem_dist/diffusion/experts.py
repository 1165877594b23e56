"""The two experts of Wan2.2: which one runs at a timestep, and where the weights of the other one are.

An ``ExpertPair`` chooses the expert; a ``Residency`` makes it ready. ``AllResident`` keeps all experts on the device,
``host_swap.HostSwap`` one at a time, ``block_stream.BlockStream`` as many blocks of one as there is room for. Knows
nothing about prompts, latents or ranks.
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from storymem_dist.diffusion.adapter_switch import AdapterSwitch, AdapterUse
from storymem_dist.diffusion.solver import NUM_TRAIN_TIMESTEPS
from storymem_dist.diffusion.step_cache import StepCache, step_cache_of
from storymem_dist.diffusion.text_cache import TextCache, text_cache_of
from storymem_dist.errors import ConfigError
from storymem_dist.models.adapters import Adapters
from storymem_dist.models.wan.presets import HIGH_NOISE, LOW_NOISE


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One expert: a ``WanDiT`` (or a module with its interface), its guidance scale and its caches."""

    name: str
    module: nn.Module
    guidance_scale: float
    step_cache: StepCache | None = None
    text_cache: TextCache | None = None

    def run(
        self, branch: str, x_BCTHW: Tensor, timestep_B: Tensor, context_BSE: Tensor, temporal_positions_T: Tensor
    ) -> Tensor:
        """One pass of guidance branch ``branch`` ("cond" or "uncond"); returns the velocity of ``WanDiT.forward``."""
        with ExitStack() as caches:
            for cache in self._caches:
                caches.enter_context(cache.during(branch))
            velocity: Tensor = self.module(x_BCTHW, timestep_B, context_BSE, temporal_positions_T)
            return velocity

    def forget(self) -> None:
        """Clear the caches; the next step is computed in full."""
        for cache in self._caches:
            cache.forget()

    @property
    def _caches(self) -> list[StepCache | TextCache]:
        return [cache for cache in (self.step_cache, self.text_cache) if cache is not None]

    @property
    def reused(self) -> bool:
        """Whether the latest step reuses an earlier one (lossy; see ``step_cache``)."""
        return self.step_cache is not None and self.step_cache.reused


class Residency(Protocol):
    """Decides where the experts' weights are."""

    def activate(self, name: str) -> None:
        """Make expert ``name`` ready on the device. Called before every step: cheap for an expert that is ready."""
        ...

    def end_shot(self) -> None:
        """Called after a shot: the experts are not needed before the next shot's first step."""
        ...

    def idle(self) -> None:
        """Free the experts' device memory until the next ``activate``, as far as this residency can.

        The shot after it uses as little device memory as this residency can.
        """
        ...

    def release(self) -> None:
        """Free all weights, on the device and in host memory."""
        ...


class AllResident:
    """All experts stay on the device until the first ``idle``.

    ``make_swap`` moves all of them to host memory and returns a residency with at most one expert on the device;
    ``idle`` switches to it permanently. Without ``make_swap``, ``idle`` does nothing.
    """

    def __init__(self, make_swap: Callable[[], Residency] | None = None) -> None:
        self._make_swap = make_swap
        self._swap: Residency | None = None

    def activate(self, name: str) -> None:
        """Nothing to do before the first ``idle``; then the swap's ``activate``."""
        if self._swap is not None:
            self._swap.activate(name)

    def end_shot(self) -> None:
        """Nothing to do before the first ``idle``; then the swap's ``end_shot``."""
        if self._swap is not None:
            self._swap.end_shot()

    def idle(self) -> None:
        """Switch to the swap if there is one."""
        if self._swap is None and self._make_swap is not None:
            self._swap = self._make_swap()
        if self._swap is not None:
            self._swap.idle()

    def release(self) -> None:
        """Free the experts."""
        self._make_swap = None
        if self._swap is not None:
            self._swap.release()


class ExpertPair:
    """High-noise and low-noise expert of one base model.

    The high-noise expert runs at timesteps >= ``boundary_ratio * 1000``, the other one below. A
    ``step_cache_threshold`` above 0 needs experts with a step cache around their blocks (``attach_step_cache``).
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
        adapters: AdapterSwitch | None = None,
    ) -> None:
        self._boundary = boundary_ratio * NUM_TRAIN_TIMESTEPS
        self._residency = residency or AllResident()
        self._step_cache_threshold = step_cache_threshold
        self._adapters = adapters or AdapterSwitch({HIGH_NOISE: high_noise, LOW_NOISE: low_noise})
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
        """The same experts in the same memory, with other sampling settings."""
        return ExpertPair(
            high_noise=self._experts[HIGH_NOISE].module,
            low_noise=self._experts[LOW_NOISE].module,
            boundary_ratio=boundary_ratio,
            guidance_scale_high=guidance_scale_high,
            guidance_scale_low=guidance_scale_low,
            residency=self._residency,
            step_cache_threshold=step_cache_threshold,
            adapters=self._adapters,
        )

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The experts' modules by name."""
        return {name: expert.module for name, expert in self._experts.items()}

    def use_adapters(self, adapters: Mapping[str, Adapters], device: torch.device) -> None:
        """Run the next shot on ``device`` with ``adapters``, by expert; empty: without any. Loads no expert."""
        self._adapters.use(adapters, device)

    @property
    def adapters_used(self) -> AdapterUse:
        """What the adapters of the latest ``use_adapters`` have cost so far."""
        return self._adapters.used

    def begin_shot(self) -> None:
        """Clear what the caches hold of the previous shot.

        Raises ``ConfigError`` when ``step_cache_threshold`` is above 0 and an expert has no step cache.
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
        """Name of the expert that runs at ``timestep`` (0..1000)."""
        return HIGH_NOISE if timestep >= self._boundary else LOW_NOISE

    def select(self, timestep: int) -> Expert:
        """The expert for ``timestep``, ready to run one step. Raises ``RuntimeError`` after ``release``."""
        name = self.name_at(timestep)
        if name not in self._experts:
            raise RuntimeError(f"the {name} expert was released")
        self._residency.activate(name)
        self._adapters.activate(name)
        for expert in self._experts.values():
            if expert.name != name:
                expert.forget()
            elif expert.step_cache is not None:
                expert.step_cache.begin_step()
        return self._experts[name]

    def end_shot(self) -> None:
        """Call it after a shot: frees what is not needed before the next shot's first step."""
        for expert in self._experts.values():
            expert.forget()
        self._adapters.idle()
        self._residency.end_shot()

    def idle(self) -> None:
        """Free device memory until the next ``select``, as far as the residency can."""
        for expert in self._experts.values():
            expert.forget()
        self._adapters.idle()
        self._residency.idle()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Free the experts; the pair cannot be used afterwards."""
        self._experts.clear()
        self._adapters.release()
        self._residency.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
