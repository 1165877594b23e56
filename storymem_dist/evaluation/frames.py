"""Frames as CLIP and ViCLIP see them: which ones, and at which size. The rules of VBench, without torchvision.

Shapes: F frames, H height, W width.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from storymem_dist.memory.scorers import CLIP_MEAN, CLIP_STD

NUM_MIDDLE_FRAMES = 8
"""What ViCLIP was trained on."""

CLIP_SIZE = 224

_RESIZE_BATCH = 4  # more at once fall out of the processor's cache: a third slower


def middle_frames(num_frames: int, count: int = NUM_MIDDLE_FRAMES) -> list[int]:
    """The frames in the middle of ``count`` equal parts of a clip; the last one again where it is shorter than that."""
    parts = min(count, num_frames)
    edges = [num_frames * part // parts for part in range(parts + 1)]
    chosen = [(start + end - 1) // 2 for start, end in pairwise(edges)]
    return chosen + chosen[-1:] * (count - parts)


def clip_pixels(frames_FCHW: Tensor, *, in_8_bits: bool) -> Tensor:
    """``float32 [F, 3, 224, 224]`` input of CLIP and ViCLIP from ``uint8 [F, 3, H, W]``.

    The shorter side becomes 224 (bicubic, without antialias), the middle is cut out, CLIP's mean and deviation are
    applied. ``in_8_bits``: VBench reads the frames of ViCLIP as 8-bit numbers, so the resize rounds to them, and those
    of the aesthetic score as floats, which it leaves as they are.
    """
    mean = torch.tensor(CLIP_MEAN, device=frames_FCHW.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=frames_FCHW.device).view(3, 1, 1)
    parts = [(_cut(part, in_8_bits) / 255 - mean) / std for part in frames_FCHW.split(_RESIZE_BATCH)]
    return torch.cat(parts)


def small_frames(frames_FCHW: Tensor) -> Tensor:
    """``uint8 [F, 3, 224, 224]`` of which ``clip_pixels(..., in_8_bits=True)`` makes the same as of ``frames_FCHW``."""
    return _cut(frames_FCHW, in_8_bits=True).to(torch.uint8)


def _cut(frames_FCHW: Tensor, in_8_bits: bool) -> Tensor:
    height, width = frames_FCHW.shape[-2:]
    short = min(height, width)
    size = CLIP_SIZE * height // short, CLIP_SIZE * width // short
    resized = frames_FCHW.float()
    if size != (height, width):
        resized = F.interpolate(resized, size=size, mode="bicubic", align_corners=False)
        if in_8_bits:
            resized = resized.clamp(0, 255).round()
    top, left = (round((side - CLIP_SIZE) / 2) for side in size)
    return resized[..., top : top + CLIP_SIZE, left : left + CLIP_SIZE]
