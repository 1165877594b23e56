"""Encodes drawn clips with the trained VAE: clip latents, memory images, conditions of continued shots."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from storymem_dist.files import replacing
from tools.nano import vae_passes, world
from tools.nano.training import Ranks

NUM_IMAGES = 2
"""Memory images of each clip."""

TASKS = {"cut": 0, "continued": 1, "motion": 5}
"""Frames that a clip of each kind is given."""

_CHUNK = 4


def shard_path(work: Path, number: int) -> Path:
    """Where a shard lies."""
    return work / f"latents_{number:03d}.pt"


def blank_path(work: Path) -> Path:
    """Where the latents of an empty clip lie."""
    return work / "latents_blank.pt"


def write_shards(
    work: Path, *, shards: int, clips: dict[str, int], seed: int, device: torch.device, ranks: Ranks
) -> None:
    """Write the missing ones of ``shards`` shards, shared among the ranks.

    ``clips`` says how many clips of each kind of ``TASKS`` a shard has.
    """
    vae = trained_vae(work, device)
    if ranks.rank == 0 and not blank_path(work).exists():
        empty = torch.zeros(1, 3, world.FRAMES, world.HEIGHT, world.WIDTH)
        _write(blank_path(work), _encode(vae, empty, device)[0])
    for number in range(ranks.rank, shards, ranks.size):
        if not shard_path(work, number).exists():
            g = torch.Generator().manual_seed(1000 * (seed + 1) + number)
            _write(shard_path(work, number), {kind: _clips(vae, kind, num, g, device) for kind, num in clips.items()})
    ranks.wait()


def trained_vae(work: Path, device: torch.device) -> Any:
    """The ``AutoencoderKLWan`` with its averaged weights."""
    state = torch.load(work / "vae.pt", weights_only=True)
    vae: Any = AutoencoderKLWan(base_dim=state["extra"]["base_dim"], z_dim=vae_passes.NUM_LATENT_CHANNELS)
    vae.load_state_dict(state["averaged"])
    vae = vae.eval().requires_grad_(False).to(device)
    if device.type == "cpu":
        vae_passes.channels_last(vae)
    return vae


def _clips(vae: Any, kind: str, num: int, g: torch.Generator, device: torch.device) -> dict[str, Any]:
    """``clips`` (their parameters), ``latents``, and ``images`` ``[num, 2, 16, 1, h, w]`` or ``conditions``."""
    given_frames = TASKS[kind]
    clips = world.sample_clips(num, g, anywhere=given_frames > 0)
    if kind == "motion":
        clips = world.after_another(clips, world.sample_clips(num, g, anywhere=True))
    latents, images, conditions = [], [], []
    for start in range(0, num, _CHUNK):
        pixels, _ = world.render(clips[slice(start, start + _CHUNK)])
        latents.append(_encode(vae, pixels, device))
        if given_frames:
            given = torch.zeros_like(pixels)
            given[:, :, :given_frames] = pixels[:, :, :given_frames]
            conditions.append(_encode(vae, given, device))
        else:
            each = torch.arange(len(pixels))
            frames = torch.randint(world.FRAMES, (NUM_IMAGES, len(pixels)), generator=g)
            images.append(torch.stack([_encode(vae, pixels[each, :, f][:, :, None], device) for f in frames], 1))
    found: dict[str, Any] = {"clips": asdict(clips), "latents": torch.cat(latents).half()}
    if given_frames:
        found["conditions"] = torch.cat(conditions).half()
    else:
        found["images"] = torch.cat(images).half()
    return found


@torch.no_grad()
def _encode(vae: Any, pixels: Tensor, device: torch.device) -> Tensor:
    pixels = pixels.to(device).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast(device.type, torch.bfloat16):
        return vae_passes.encode(vae, pixels).float().cpu()


def _write(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        torch.save(value, temporary)
