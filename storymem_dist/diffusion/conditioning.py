"""Builds the condition of a memory-to-video shot: memory keyframes, given frames, and the mask that marks them.

Turns 8-bit images into the 20 extra input channels of the DiT (mask 4, latents 16), with the caller's VAE. Knows
nothing about where images come from or how keyframes are chosen.

Legend: C channels, F frames, H/W pixels, K memory keyframes, T latent times of the clip, h/w latent size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from storymem_dist.diffusion.latent_cache import LatentCache, content_key
from storymem_dist.diffusion.latent_grid import VAE_TIME_STRIDE, LatentGrid
from storymem_dist.errors import ConfigError, require_one_of
from storymem_dist.story.modes import CONDITIONED_MODES, MI2V, MM2V, NUM_GIVEN_FRAMES

MASK_CHANNELS = 4


class LatentEncoder(Protocol):
    """The encoder half of a VAE; pixels in [-1, 1], latents normalized, both float32."""

    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        """Encode one clip ``[3, F, H, W]`` to ``[16, T, h, w]``."""
        ...

    def encode_image(self, pixels_CHW: Tensor) -> Tensor:
        """Encode one image ``[3, H, W]``, as a one-frame clip, to ``[16, 1, h, w]``."""
        ...


class ConditionBuilder:
    """Builds the conditions of shots; what was encoded before is not encoded again (``LatentCache``)."""

    def __init__(self, vae: LatentEncoder, device: torch.device | str) -> None:
        self._vae = vae
        self._device = torch.device(device)
        self._latents = LatentCache()

    @torch.no_grad()
    def build(
        self,
        mode: str,
        grid: LatentGrid,
        memory_images: Sequence[Tensor],
        *,
        first_frame: Tensor | None = None,
        motion_frames: Tensor | None = None,
        num_fixed: int | None = None,
    ) -> Tensor:
        """The condition of one shot, float32 ``[20, K+T, h, w]`` on the builder's device: mask first, latents after.

        ``mode`` is "m2v" (nothing given), "mi2v" (``first_frame`` uint8 ``[3, H, W]``) or "mm2v" (``motion_frames``
        uint8 ``[5, 3, H, W]``). ``memory_images`` are K = ``grid.num_memory`` uint8 images ``[3, H, W]`` of any size.
        The mask is 1 on memory and on given latents, else 0; ``num_fixed`` marks memory from that index on with 2
        (the original program's ``fix_mem``, which its pipeline never sets).

        Raises ``ConfigError`` when images or frames do not fit ``mode`` or ``grid``.
        """
        require_one_of("mode", mode, CONDITIONED_MODES)
        if len(memory_images) != grid.num_memory:
            raise ConfigError(f"{len(memory_images)} memory images for a grid of num_memory={grid.num_memory}")
        given = _given_frames(mode, grid, first_frame, motion_frames)
        clip_latents = self._clip_latents(given, grid)
        memory_latents = [self._image_latents(image, grid) for image in memory_images]
        mask = _mask(NUM_GIVEN_FRAMES[mode], grid, num_fixed).to(self._device)
        return torch.cat([mask, torch.cat([*memory_latents, clip_latents], dim=1).float()])

    def _clip_latents(self, given_F3HW: Tensor | None, grid: LatentGrid) -> Tensor:
        """Latents of a clip that begins with the given frames, if there are any, and is mid grey after them."""
        size = (grid.num_frames, grid.height, grid.width)

        def encode() -> Tensor:
            pixels = torch.zeros(3, *size, device=self._device)
            for index, frame in enumerate(given_F3HW if given_F3HW is not None else ()):
                pixels[:, index] = prepare_image(frame.to(self._device), grid.height, grid.width)
            return self._vae.encode(pixels)

        content = None if given_F3HW is None else content_key(given_F3HW)
        return self._latents.get(("clip", size, content), self._device, encode)

    def _image_latents(self, image_CHW: Tensor, grid: LatentGrid) -> Tensor:
        size = (grid.height, grid.width)
        return self._latents.get(
            ("image", size, content_key(image_CHW)),
            self._device,
            lambda: self._vae.encode_image(prepare_image(image_CHW.to(self._device), *size)),
        )


def prepare_image(image_CHW: Tensor, height: int, width: int) -> Tensor:
    """Resize a uint8 image ``[3, H, W]`` to the clip's size: float32 ``[3, height, width]``, about [-1, 1].

    Bicubic without antialiasing and not clamped, as the model was trained: values overshoot at edges.
    """
    _check_image(image_CHW)
    pixels = image_CHW.float() / 255.0 * 2.0 - 1.0
    return F.interpolate(pixels[None], size=(height, width), mode="bicubic", align_corners=False)[0]


def cover_crop(image_CHW: Tensor, height: int, width: int) -> Tensor:
    """Scale a uint8 image ``[3, H, W]`` to cover ``height`` x ``width`` and cut out the middle: uint8, that size.

    For a user's reference images (MR2V), which may have any shape. Bicubic with antialiasing.
    """
    _check_image(image_CHW)
    size = cover_size(image_CHW.shape[1], image_CHW.shape[2], height, width)
    scaled = F.interpolate(image_CHW[None].float(), size=size, mode="bicubic", align_corners=False, antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)


def cover_size(image_height: int, image_width: int, height: int, width: int) -> tuple[int, int]:
    """Height and width to which an image is scaled so that it just covers ``height`` x ``width``."""
    scale = max(height / image_height, width / image_width)
    return max(height, round(image_height * scale)), max(width, round(image_width * scale))


def _mask(num_given_frames: int, grid: LatentGrid, num_fixed: int | None) -> Tensor:
    """``[4, K+T, h, w]``. The channels are the four frames that one latent packs; here they are always equal."""
    num_given = -(-(num_given_frames - 1) // VAE_TIME_STRIDE) + 1 if num_given_frames else 0
    mask = torch.zeros(MASK_CHANNELS, grid.num_latents, grid.latent_height, grid.latent_width)
    mask[:, : grid.num_memory + num_given] = 1.0
    if num_fixed is not None:
        mask[:, num_fixed : grid.num_memory] = 2.0
    return mask


def _given_frames(
    mode: str, grid: LatentGrid, first_frame: Tensor | None, motion_frames: Tensor | None
) -> Tensor | None:
    """The frames that the mode puts at the start of the clip, uint8 ``[n, 3, H, W]``, or None for a cut."""
    if (first_frame is not None) != (mode == MI2V):
        raise ConfigError(
            f"mode {mode} with first_frame={'given' if first_frame is not None else None}; mi2v needs it, no other "
            "mode takes it"
        )
    if (motion_frames is not None) != (mode == MM2V):
        raise ConfigError(
            f"mode {mode} with motion_frames={'given' if motion_frames is not None else None}; mm2v needs them, no "
            "other mode takes them"
        )
    given = first_frame[None] if first_frame is not None else motion_frames
    if given is None:
        return None
    expected = NUM_GIVEN_FRAMES[mode]
    if len(given) != expected:
        raise ConfigError(f"mode {mode} takes {expected} frames of the shot before it; given: {len(given)}")
    if grid.num_frames <= expected:
        raise ConfigError(f"num_frames={grid.num_frames} leaves nothing new in mode {mode}, which repeats {expected}")
    return given


def _check_image(image_CHW: Tensor) -> None:
    if image_CHW.dtype != torch.uint8 or image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        raise ConfigError(
            f"an image of {image_CHW.dtype} and shape {list(image_CHW.shape)} was given; images are uint8 [3, H, W]"
        )
