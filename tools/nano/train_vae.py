"""Trains the small Wan VAE on crops of the world, then on whole pictures."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from tools.nano import vae_passes, world
from tools.nano.training import Ranks, Schedule, Training

LATENT_NOISE = 0.15
"""Deviation of the noise on latents in training, in units of the latents' own."""


def new_vae(base_dim: int, seed: int) -> Any:
    """An ``AutoencoderKLWan`` with random weights whose residual branches begin small."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderKLWan(base_dim=base_dim, z_dim=vae_passes.NUM_LATENT_CHANNELS)
    vae.train()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if name.endswith("conv2.weight"):
                p.mul_(0.2)
    return vae


def is_filter(_name: str, p: Tensor) -> bool:
    """Whether Muon takes a weight: filters with at least 16 rows and columns."""
    return p.ndim >= 4 and min(p.shape[0], p[0].numel()) >= 16


def train_vae(
    work: Path,
    *,
    steps: int,
    base_dim: int,
    whole_from: float,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    save_every: float,
) -> None:
    """Train to ``steps``, from ``work/vae.pt`` on if it is there.

    From the share ``whole_from`` of the steps on, pictures are whole.
    """
    vae = new_vae(base_dim, seed).to(device)
    if device.type == "cpu":
        vae_passes.channels_last(vae)
    schedule = Schedule(steps=steps, lr=1e-3, muon_lr=0.02, warm_up=40, hold=0.3, least=0.02)
    extra = {"base_dim": base_dim}
    training = Training(vae, is_filter, schedule, average=0.995, clip_all=True, extra=extra)
    training.go_on_from(work / "vae.pt")

    def loss_of(step: int, g: torch.Generator) -> Tensor:
        pixels, edge = _batch(step, step / steps, whole_from, g)
        times = (pixels.shape[2] - 1) // 4 + 1
        noise = torch.randn(
            len(pixels), vae_passes.NUM_LATENT_CHANNELS, times, pixels.shape[3] // 8, pixels.shape[4] // 8, generator=g
        )
        pixels, edge, noise = pixels.to(device), edge.to(device), noise.to(device)
        pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16):
            latents = vae_passes.encode(vae, pixels)
            found = vae_passes.decode(vae, latents + (LATENT_NOISE * noise).to(latents.dtype))
        return _loss(pixels, edge, found.float(), latents.float())

    training.run(loss_of, ranks=ranks, seed=seed, state=work / "vae.pt", save_every=save_every)


def _batch(step: int, share: float, whole_from: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, then clips: short ones first, the product's 17 frames later; crops, then whole pictures."""
    whole, kind = share > whole_from, step % 4
    if kind == 0 or (share < 0.1 and kind < 3):
        return _drawn(6 if whole else 16, 1, None if whole else 48, g)
    if share < 0.35:
        return _drawn(3, 5, 48, g)
    if whole:
        return _drawn(1, 17 if kind == 3 else 9, None, g)
    return _drawn(3, 9, 40, g) if kind == 1 else _drawn(2, 17, 40, g)


def _drawn(num: int, num_frames: int, size: int | None, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels and signed distances of ``num`` clips; ``size``: only a window near the character."""
    clips = world.sample_clips(num, g, anywhere=bool(torch.rand(1, generator=g) < 0.5))
    start = (torch.rand(num, generator=g) * (world.FRAMES - num_frames + 1)).long()
    frames = start[:, None] + torch.arange(num_frames)[None]
    if size is None:
        return world.render(clips, frames)
    middle = clips.path[torch.arange(num), frames[:, num_frames // 2]]
    left = middle[:, 0] - size / 2 + (torch.rand(num, generator=g) - 0.5) * 36
    top = middle[:, 1] - size / 2 + (torch.rand(num, generator=g) - 0.5) * 36
    left, top = left.round().clamp(0, world.WIDTH - size), top.round().clamp(0, world.HEIGHT - size)
    return world.render(clips, frames, top, left, size, size)


def _loss(wanted: Tensor, edge: Tensor, found: Tensor, latents: Tensor) -> Tensor:
    """L1, squares, and gradients in space and time; the character and its edge count five times."""
    weight = 1 + 4 * (edge < 2.0).float()[:, None]
    diff = found - wanted
    loss = (weight * diff.abs()).mean() + 2 * (weight * diff**2).mean()
    for dim in (-1, -2):
        loss = loss + 0.5 * (weight.narrow(dim, 1, wanted.shape[dim] - 1) * diff.diff(dim=dim).abs()).mean()
    if wanted.shape[2] > 1:
        loss = loss + 0.5 * (weight[:, :, 1:] * diff.diff(dim=2).abs()).mean()
    return loss + 3e-4 * latents.square().mean()
