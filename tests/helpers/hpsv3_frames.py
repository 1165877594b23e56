"""The frames whose HPSv3 scores are kept in ``tests/fixtures/hpsv3/``."""

import torch
from torch import Tensor

SIZES = {
    "landscape": (336, 588),  # 480x832 at selection size
    "portrait": (588, 336),
    "square": (448, 448),
    "small": (84, 140),
    "odd": (250, 333),
}
"""Height and width."""

BATCHES = {
    "landscape": [("landscape", 0)],
    "landscapes": [("landscape", number) for number in range(3)],
    "portraits": [("portrait", number) for number in range(2)],
    "squares": [("square", number) for number in range(2)],
    "small": [("small", 0)],
    "odd": [("odd", 0)],
    "mixed": [("landscape", 0), ("square", 0), ("small", 0)],
}
"""Frames of each batch by size and number. Those of ``mixed`` need padding."""


def frame(height: int, width: int, number: int) -> Tensor:
    """A picture ``uint8 [3, H, W]`` of gradients, stripes and a disc, in whole numbers."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    across, down = columns * 255 // width, rows * 255 // height
    centre = (rows * 2 - height) ** 2 + (columns * 2 - width) ** 2
    disc = centre < (min(height, width) * (3 + number) // 6) ** 2
    red = (across * (number + 1)) % 256 + 0 * down
    green = torch.where(disc, 220 - 40 * number, down + 0 * across)
    blue = ((rows // 7 + columns // (5 + number)) % 2) * 180 + 0 * disc
    return torch.stack([red, green, blue]).clamp(0, 255).to(torch.uint8)
