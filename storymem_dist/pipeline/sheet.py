"""Contact sheets: pictures in a grid with a line of text below each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

_SIDE = 256
_LINE = 18
_GAP = 6
_BACKGROUND, _TEXT, _MARK = (24, 24, 24), (230, 230, 230), (90, 170, 255)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Labelled:
    """A picture, uint8 ``[H, W, 3]``, and the line below it; a frame is drawn around a marked one."""

    image_HWC: Tensor
    label: str
    is_marked: bool = False


def picture_grid(pictures: Sequence[Labelled], *, nothing: str) -> Tensor:
    """Return the pictures in a grid of about as many columns as rows, uint8 ``[H, W, 3]``.

    The longer side of each is at most 256 pixels. Without pictures: a small one that says ``nothing``.
    """
    if not pictures:
        empty = Image.new("RGB", (_SIDE, 2 * _LINE), _BACKGROUND)
        ImageDraw.Draw(empty).text((_GAP, _LINE // 2), nothing, fill=_TEXT)
        return torch.from_numpy(np.array(empty))
    small = [_shrunk(one.image_HWC) for one in pictures]
    width, height = max(one.width for one in small), max(one.height for one in small)
    columns = math.ceil(math.sqrt(len(small)))
    rows = -(-len(small) // columns)
    cell_width, cell_height = width + _GAP, height + _LINE + _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (one, picture) in enumerate(zip(small, pictures, strict=True)):
        left, top = _GAP + number % columns * cell_width, _GAP + number // columns * cell_height
        sheet.paste(one, (left, top))
        if picture.is_marked:
            draw.rectangle((left - 2, top - 2, left + one.width + 1, top + one.height + 1), outline=_MARK, width=2)
        draw.text((left, top + one.height + 3), picture.label, fill=_TEXT)
    return torch.from_numpy(np.array(sheet))


def _shrunk(image_HWC: Tensor) -> Image.Image:
    image = Image.fromarray(image_HWC.contiguous().numpy())
    image.thumbnail((_SIDE, _SIDE))
    return image
