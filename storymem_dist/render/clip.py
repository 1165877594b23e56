"""One clip on one replica: condition, denoise, decode.

Every rank of the replica calls the same methods with the same arguments and gets the same pixels. Knows modes, seeds
and which base model a mode needs; nothing of stories, memory banks or files.

Legend: B batch, C channels, F frames, H/W pixels, T latent frames, h/w latent sizes, L tokens, E text channels.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import ConditionBuilder, LatentEncoder
from storymem_dist.diffusion.denoise import DenoiseState, PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import Guidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.seeds import initial_noise
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.diffusion.solver import Solver
from storymem_dist.story.modes import KIND_OF_MODE, M2V

Stage = Callable[[str], AbstractContextManager[object]]
"""Marks a part of the work by name: ``with stage("decode"): ...``."""


def no_stage(name: str) -> AbstractContextManager[object]:
    """A ``Stage`` that does nothing."""
    return nullcontext()


class ClipVae(LatentEncoder, Protocol):
    """The methods of the VAE that a clip needs; pixels in [-1, 1], latents normalized, both float32."""

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Decode ``[16, T, h, w]`` to ``[3, F, H, W]``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """Everything that determines one clip except weights. ``sampler`` gives sizes, steps and guidance, not the seed.

    ``mode`` is "t2v", "m2v", "mi2v" (with ``first_frame`` uint8 ``[3, H, W]``) or "mm2v" (with ``motion_frames`` uint8
    ``[5, 3, H, W]``). ``memory_images`` are uint8 ``[3, H, W]``, oldest first. ``fingerprint`` ties step checkpoints to
    this clip.
    """

    mode: str
    prompt: PromptEmbeds
    seed: int
    sampler: SamplerSettings
    memory_images: Sequence[Tensor] = ()
    first_frame: Tensor | None = None
    motion_frames: Tensor | None = None
    fingerprint: str = ""

    @property
    def grid(self) -> LatentGrid:
        """Sizes in latent space."""
        return LatentGrid(
            num_frames=self.sampler.num_frames,
            height=self.sampler.height,
            width=self.sampler.width,
            num_memory=len(self.memory_images),
        )


class ClipSampler:
    """Turns requests into pixels, with one base model's experts in memory at a time.

    ``load_experts(kind)`` loads the experts of "t2v" or "m2v"; the previous ones are released first.
    """

    def __init__(
        self,
        *,
        load_experts: Callable[[str], ExpertPair],
        guidance: Guidance,
        vae: ClipVae,
        device: torch.device | str,
    ) -> None:
        self._load_experts = load_experts
        self._guidance = guidance
        self._vae = vae
        self._device = torch.device(device)
        self._conditions = ConditionBuilder(vae, device)
        self._experts: ExpertPair | None = None
        self.kind: str | None = None

    def prepare(self, kind: str) -> ExpertPair:
        """Load the experts of ``kind`` ("t2v" or "m2v") unless they are loaded. Collective over the replica."""
        if self._experts is None or kind != self.kind:
            self.release()
            self._experts = self._load_experts(kind)
            self.kind = kind
        return self._experts

    def release(self) -> None:
        """Drop the loaded experts."""
        experts, self._experts, self.kind = self._experts, None, None
        if experts is not None:
            experts.release()

    def sample(
        self,
        request: ClipRequest,
        *,
        stage: Stage = no_stage,
        resume: DenoiseState | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        checkpoint_every_steps: int = 0,
        on_checkpoint: Callable[[DenoiseState], None] | None = None,
        low_memory: bool = False,
    ) -> Tensor:
        """Return the clip, float32 ``[3, F, H, W]`` in [-1, 1], with the given frames at the start of a continuation.

        ``low_memory`` keeps on the device only the expert that is computing, and none while the VAE works.

        Raises ``DenoiseStopped`` when ``should_stop`` returns True, ``ShotError`` when latents are not finite.
        """
        grid, kind, settings = request.grid, KIND_OF_MODE[request.mode], request.sampler
        experts = self.prepare(kind)
        if low_memory:
            experts.idle()
        experts = experts.with_sampling(
            boundary_ratio=settings.boundary_ratio(kind),
            guidance_scale_high=settings.guidance_scale_high,
            guidance_scale_low=settings.guidance_scale_low,
            step_cache_threshold=settings.step_cache_threshold,
        )
        condition = None
        if kind == M2V:
            with stage("condition"):
                condition = self._conditions.build(
                    request.mode,
                    grid,
                    request.memory_images,
                    first_frame=request.first_frame,
                    motion_frames=request.motion_frames,
                )
        solver = Solver(
            settings.solver,
            num_steps=settings.num_inference_steps,
            flow_shift=settings.flow_shift(kind),
            sigmas=settings.sigmas,
        )
        with stage("denoise"):
            latents = denoise(
                experts,
                self._guidance,
                solver,
                initial_noise(request.seed, grid.latent_shape, settings.noise_device),
                condition,
                request.prompt,
                grid,
                device=self._device,
                fingerprint=request.fingerprint,
                resume=resume,
                on_step=on_step,
                should_stop=should_stop,
                checkpoint_every_steps=checkpoint_every_steps,
                on_checkpoint=on_checkpoint,
            )
        experts.end_shot()
        if low_memory:
            experts.idle()
        with stage("decode"):
            return self._vae.decode(grid.clip_latents(latents))


def to_uint8(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, rounded to the nearest level."""
    return pixels.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
