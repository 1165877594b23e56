"""The part of ``lossy_errors`` that renders pictures: memory shots of the trained nano model, judged and compared.

The model knows what its pictures should show, so the question is not only how much a setting changes them, but whether
they still show it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import ConditionBuilder
from storymem_dist.diffusion.denoise import PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.seeds import initial_noise
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.diffusion.solver import Solver
from storymem_dist.weights.checkpoints import WanCheckpoint
from storymem_dist.weights.text_encoder import load_text_encoder
from storymem_dist.weights.vae import load_vae
from tools.nano import world
from tools.nano.exam import KINDS, psnr, sentence
from tools.nano.judge import judge

GUIDANCE, STEPS = 2.0, 16
"""What nano is made for."""

_MEMORY_FRAMES = (0, 8, 16)
_NO_NEGATIVE = ""


@dataclass(frozen=True, kw_only=True)
class PictureShot:
    """A memory shot to render: its inputs, and what it should show."""

    wanted: dict[str, str]
    prompt: PromptEmbeds
    condition: Tensor
    noise: Tensor


class Pictures:
    """``num`` memory shots with drawn memory, and the clips that the exact computation makes of them."""

    def __init__(self, checkpoint: WanCheckpoint, num: int, seed: int, device: torch.device) -> None:
        self._device = device
        self._vae = load_vae(checkpoint.vae_path, device)
        self._grid = LatentGrid(
            num_frames=world.FRAMES, height=world.HEIGHT, width=world.WIDTH, num_memory=len(_MEMORY_FRAMES)
        )
        g = torch.Generator().manual_seed(seed)
        colours, shapes = torch.arange(num) % len(world.COLOURS), torch.arange(num) // len(world.COLOURS) % 3
        clips = world.sample_clips(num, g, colour=colours, shape=shapes)
        pixels, _ = world.render(clips)
        conditions = ConditionBuilder(self._vae, device)
        encoder = load_text_encoder(checkpoint, device, torch.float32)
        self._shots = []
        for index in range(num):
            images = [((pixels[index, :, frame] + 1) * 127.5).round().byte() for frame in _MEMORY_FRAMES]
            shown = {kind: names[int(getattr(clips, kind)[index])] for kind, names in world.KINDS.items()}
            place = int(torch.randint(len(world.BACKGROUNDS), (1,), generator=g))
            wanted = shown | {"motion": world.MOTIONS[index % 6], "background": tuple(world.BACKGROUNDS)[place]}
            text, negative = encoder.encode([sentence(g, wanted, named=False), _NO_NEGATIVE])
            self._shots.append(
                PictureShot(
                    wanted=wanted,
                    prompt=PromptEmbeds(prompt_LE=text, negative_LE=negative),
                    condition=conditions.build("m2v", self._grid, images),
                    noise=initial_noise(seed + index, self._grid.latent_shape),
                )
            )
        self._exact: list[Tensor] = []

    def render_exact(self, experts: ExpertPair) -> None:
        """Make the clips that others are compared with."""
        self._exact = [self._render(experts, shot)[0] for shot in self._shots]

    def compare(self, experts: ExpertPair, guided_steps: range | None = None) -> dict[str, float | str]:
        """Share of the four words of each clip that the judge sees, dB against the exact clips, steps reused."""
        right, decibels, reused = 0, 0.0, 0
        for shot, exact in zip(self._shots, self._exact, strict=True):
            clip, num_reused = self._render(experts, shot, guided_steps)
            found = judge(clip)
            right += sum(shot.wanted[kind] == getattr(found, kind) for kind in KINDS)
            decibels += psnr(clip, exact)
            reused += num_reused
        num = len(self._shots)
        return {
            "pictures right": right / (num * len(KINDS)),
            "pictures, dB": decibels / num,
            "pictures, steps reused": f"{reused / num:.1f} of {STEPS}",
        }

    def _render(self, experts: ExpertPair, shot: PictureShot, guided_steps: range | None = None) -> tuple[Tensor, int]:
        infos: list[StepInfo] = []
        solver = Solver("unipc", num_steps=STEPS, flow_shift=SamplerSettings().flow_shift_m2v)
        latents = denoise(
            experts,
            LocalGuidance(),
            solver,
            shot.noise,
            shot.condition,
            shot.prompt,
            self._grid,
            device=self._device,
            on_step=infos.append,
            guided_steps=guided_steps,
        )
        clip = self._vae.decode(self._grid.clip_latents(latents)).cpu()
        return clip, sum(info.reused for info in infos)
