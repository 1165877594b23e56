"""The size at which frames are compared and scored. Knows nothing about scorers or keyframes.

Shapes: N frames, C channels (3), H height, W width.
"""

import math

import torch.nn.functional as F
from torch import Tensor

PATCH = 28
MIN_PIXELS = 37_632
MAX_PIXELS = 256 * PATCH * PATCH
"""Sides are multiples of 28 and the area lies between 48 and 256 patches: the rule of Qwen2-VL's image processor, on
which HPSv3 is built, with StoryMem's bounds."""


def selection_size(height: int, width: int) -> tuple[int, int]:
    """``(height, width)`` near the given aspect, multiples of 28, within ``MIN_PIXELS`` and ``MAX_PIXELS``.

    336 x 588 for 480 x 832.
    """
    new_height = max(PATCH, round(height / PATCH) * PATCH)
    new_width = max(PATCH, round(width / PATCH) * PATCH)
    if new_height * new_width > MAX_PIXELS:
        shrink = math.sqrt(height * width / MAX_PIXELS)
        new_height = max(PATCH, math.floor(height / shrink / PATCH) * PATCH)
        new_width = max(PATCH, math.floor(width / shrink / PATCH) * PATCH)
    elif new_height * new_width < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        new_height = math.ceil(height * grow / PATCH) * PATCH
        new_width = math.ceil(width * grow / PATCH) * PATCH
    return new_height, new_width


def resize_for_selection(frames_NCHW: Tensor) -> Tensor:
    """``uint8 [N, 3, H, W]`` resized to ``selection_size`` in 8 bits, bilinear with antialias; on the CPU."""
    height, width = selection_size(*frames_NCHW.shape[-2:])
    return F.interpolate(frames_NCHW.cpu(), size=(height, width), mode="bilinear", antialias=True)
