"""One clip on one replica: condition, denoise, decode.

Every rank of the replica calls the same methods with the same arguments and gets the same pixels. Knows modes, seeds
and which base model a mode needs; nothing of stories, memory banks or files.

Legend: B batch, C channels, F frames, H/W pixels, T latent frames, h/w latent sizes, L tokens, E text channels.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from storymem_dist.diffusion.adapter_switch import AdapterUse
from storymem_dist.diffusion.conditioning import ConditionBuilder, LatentEncoder
from storymem_dist.diffusion.denoise import DenoiseState, PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import Guidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.seeds import initial_noise
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.diffusion.solver import Solver
from storymem_dist.events import LorasUsed
from storymem_dist.hardware import GIB
from storymem_dist.models.adapters import Adapters
from storymem_dist.models.compile import compilations_marked
from storymem_dist.story.modes import KIND_OF_MODE, M2V

Stage = Callable[[str], AbstractContextManager[object]]
"""Marks a part of the work by name: ``with stage("decode"): ...``."""


def no_stage(name: str) -> AbstractContextManager[object]:
    """A ``Stage`` that does nothing."""
    return nullcontext()


class ReadLoras(Protocol):
    """Reads a shot's LoRAs (``render.loras.LoraShelf``)."""

    num_reads: int

    def __call__(self, kind: str, loras: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Adapters]:
        """Return the adapters of the experts of ``kind``, by expert, in host memory. Collective over the replica."""
        ...


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
    this clip. ``loras`` are for this clip alone, as ``ShotOptions.loras``, and ``lora_key`` is their digest.
    """

    mode: str
    prompt: PromptEmbeds
    seed: int
    sampler: SamplerSettings
    memory_images: Sequence[Tensor] = ()
    first_frame: Tensor | None = None
    motion_frames: Tensor | None = None
    fingerprint: str = ""
    loras: Sequence[Mapping[str, Any]] = ()
    lora_key: str = ""

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

    ``load_experts(kind)`` loads the experts of "t2v" or "m2v"; the previous ones are released first. ``read_loras`` is
    needed for requests with LoRAs. ``is_alone``: no other rank takes part in these clips. ``conditions`` keeps what was
    encoded for other samplers of the same ranks.
    """

    def __init__(
        self,
        *,
        load_experts: Callable[[str], ExpertPair],
        guidance: Guidance,
        vae: ClipVae,
        device: torch.device | str,
        read_loras: ReadLoras | None = None,
        is_alone: bool = True,
        conditions: ConditionBuilder | None = None,
    ) -> None:
        self._load_experts = load_experts
        self._guidance = guidance
        self._vae = vae
        self._device = torch.device(device)
        self._is_alone = is_alone
        self._conditions = conditions or ConditionBuilder(vae, device)
        self._read_loras, self._had_read = read_loras, False
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

    def loras_used(self, story_id: str, shot_id: str, num_loras: int, seconds: float) -> LorasUsed:
        """What the LoRAs of the latest request have cost; ``seconds``: of the stage ``loras``."""
        used = AdapterUse() if self._experts is None else self._experts.adapters_used
        return LorasUsed(
            story_id=story_id,
            shot_id=shot_id,
            num_loras=num_loras,
            elapsed_seconds=seconds,
            device_seconds=used.seconds,
            device_gib=used.device_bytes / GIB,
            already_read=self._had_read,
        )

    def _use_loras(self, experts: ExpertPair, kind: str, request: ClipRequest, stage: Stage) -> None:
        """Give the experts the LoRAs of this request, and take away those of an earlier one."""
        if not request.loras:
            experts.use_adapters({}, self._device)
            return
        assert self._read_loras is not None, "this sampler was made for requests without LoRAs"
        num_reads = self._read_loras.num_reads
        with stage("loras"):
            experts.use_adapters(self._read_loras(kind, request.loras, request.lora_key), self._device)
        self._had_read = self._read_loras.num_reads == num_reads

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
        self._use_loras(experts, kind, request, stage)
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
        with stage("denoise"), compilations_marked(stage):
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
                checkpoint_last=not self._is_alone,
                guided_steps=settings.guided_steps,
            )
        if low_memory:
            experts.idle()
        experts.end_shot()
        with stage("decode"):
            return self._decode(grid.clip_latents(latents), experts)

    def _decode(self, latents_CTHW: Tensor, experts: ExpertPair) -> Tensor:
        """Decode; where memory runs out and no other rank takes part, free the experts and decode again.

        Ranks that decode together wait for each other, so the one that ran out cannot go on alone: their processes
        start again, and resume from the checkpoint after the last step.
        """
        try:
            return self._vae.decode(latents_CTHW)
        except torch.OutOfMemoryError:
            if not self._is_alone:
                raise
        # outside the handler, because the exception holds what was decoded so far
        experts.idle()
        return self._vae.decode(latents_CTHW)


def to_uint8(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, rounded to the nearest level."""
    return pixels.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
