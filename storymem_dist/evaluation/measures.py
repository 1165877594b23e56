"""Measures of a clip that need no weights: sharpness, flicker, seams and the agreement of keyframes.

They are this project's own: numbers of one measure compare runs of this project with each other, at one size of frame,
and with nothing that others published. A clip is described once; what compares clips works on the descriptions.

Shapes: F frames, H height, W width, N described frames, K bins of colour.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from storymem_dist.evaluation.frames import middle_frames
from storymem_dist.memory.frames import resize_for_selection
from storymem_dist.memory.scorers import LUMA, SharpnessQuality, rgb_to_hsv

LUMA_STEP = 4
"""Every fourth pixel of every fourth row is read for means of luma: they are means over hundreds of pixels."""

FLICKER_GRID = (8, 8)
"""Flicker is looked for in parts of the frame: a lamp that flickers in a corner hardly changes the whole."""

SEAM_GRID = (48, 80)
"""Frames at a join are compared at this size: noise and encoding are averaged out, a jump of a character is not."""

SEAM_NEIGHBOURS = 4
"""Steps from frame to frame on either side of a join that say how much the picture moves there anyway."""

SEAM_FLOOR = 0.5
"""Levels of luma that a step counts at least: between still pictures any seam would be infinitely hard."""

HUE_BINS, SATURATION_BINS, VALUE_BINS = 12, 4, 4
"""Bins of colour. Pixels count for the two nearest bins of each axis, so that a small change of light moves little."""

COLOUR_SIDE = 64
"""Longest side at which colours are counted."""

_FULL_HUE, _FULL = 180, 255  # 8-bit HSV in OpenCV's convention


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipDescription:
    """What the measures need of a clip.

    ``sharpness``: of each of the 8 middle frames, float64. ``flicker``: one number, NaN below three frames. ``head``
    and ``tail``: the first and last ``SEAM_NEIGHBOURS + 1`` frames' luma at ``SEAM_GRID``. ``colours``: shares of the
    colour bins in each of the 8 middle frames, ``[8, K]``.
    """

    sharpness: Tensor
    flicker: Tensor
    head: Tensor
    tail: Tensor
    colours: Tensor


def describe(frames_FCHW: Tensor) -> ClipDescription:
    """Describe a clip of ``uint8 [F, 3, H, W]`` frames."""
    middle = frames_FCHW[middle_frames(len(frames_FCHW))]
    at_join = SEAM_NEIGHBOURS + 1
    sharpness = SharpnessQuality()
    return ClipDescription(
        sharpness=torch.tensor([sharpness.score(one) for one in resize_for_selection(middle)], dtype=torch.float64),
        flicker=_flicker(frames_FCHW),
        head=_small_luma(frames_FCHW[:at_join]),
        tail=_small_luma(frames_FCHW[-at_join:]),
        colours=colour_shares(middle),
    )


def _flicker(frames_FCHW: Tensor) -> Tensor:
    """Mean distance of a part's luma from the middle between the frames before and after, in levels of 0 to 255.

    A steady change (a pan, a fade) lies on the line between its neighbours and counts nothing.
    """
    sparse = frames_FCHW[..., ::LUMA_STEP, ::LUMA_STEP].float()
    parts_FHW = F.adaptive_avg_pool2d(_luma(sparse)[:, None], FLICKER_GRID)[:, 0].double()
    if len(parts_FHW) < 3:
        return torch.tensor(torch.nan, dtype=torch.float64)
    return (parts_FHW[1:-1] - (parts_FHW[:-2] + parts_FHW[2:]) / 2).abs().mean()


def _small_luma(frames_FCHW: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(_luma(frames_FCHW.float())[:, None], SEAM_GRID)[:, 0]


def _luma(frames_FCHW: Tensor) -> Tensor:
    return torch.einsum("c,fchw->fhw", torch.tensor(LUMA), frames_FCHW)


def seam(before: ClipDescription, after: ClipDescription) -> float:
    """How much harder the join of two clips is than the steps around it: about 1 where it cannot be seen.

    The mean difference of the two frames that meet, over that of the ``SEAM_NEIGHBOURS`` steps before and after.
    """
    steps = torch.cat([before.tail.diff(dim=0), after.head.diff(dim=0)]).abs().mean(dim=(1, 2))
    usual = max(steps.mean().item() if len(steps) else 0.0, SEAM_FLOOR)
    join = (after.head[0] - before.tail[-1]).abs().mean().item()
    return max(join, SEAM_FLOOR) / usual


def colour_shares(frames_NCHW: Tensor) -> Tensor:
    """Share of each colour bin in ``uint8 [N, 3, H, W]`` frames: ``float32 [N, K]``, sums of 1.

    The bins hold hue, saturation and value. Hue counts less the greyer a pixel is: a grey has none.
    """
    height, width = frames_NCHW.shape[-2:]
    shrink = max(1.0, max(height, width) / COLOUR_SIDE)
    size = max(1, round(height / shrink)), max(1, round(width / shrink))
    small = F.interpolate(frames_NCHW.float(), size=size, mode="area").round().to(torch.uint8)
    hue, saturation, value = rgb_to_hsv(small).flatten(2).double().unbind(1)
    shares = torch.zeros(len(small), HUE_BINS * SATURATION_BINS * VALUE_BINS, dtype=torch.float64)
    for hue_bin, hue_weight in _nearest(hue / _FULL_HUE * HUE_BINS, HUE_BINS, wraps=True):
        for saturation_bin, saturation_weight in _nearest(saturation / _FULL * (SATURATION_BINS - 1), SATURATION_BINS):
            for value_bin, value_weight in _nearest(value / _FULL * (VALUE_BINS - 1), VALUE_BINS):
                is_grey = saturation_bin == 0
                bins = ((~is_grey) * hue_bin * SATURATION_BINS + saturation_bin) * VALUE_BINS + value_bin
                shares.scatter_add_(1, bins, hue_weight * saturation_weight * value_weight)
    return (shares / shares.sum(dim=1, keepdim=True)).float()


def _nearest(place: Tensor, count: int, *, wraps: bool = False) -> list[tuple[Tensor, Tensor]]:
    """The two bins next to each place, and how near each is: weights that add up to 1."""
    low = place.floor()
    nearness = place - low
    first, second = low.long(), low.long() + 1
    if wraps:
        first, second = first % count, second % count
    return [(first.clamp(max=count - 1), 1 - nearness), (second.clamp(max=count - 1), nearness)]


def agreement(colours: Tensor, earlier: Tensor) -> float:
    """How much of each frame is coloured as in the earlier frame most like it, 0 to 1: mean over ``colours [N, K]``.

    ``earlier [M, K]``, M >= 1: the keyframes of the shots before. Two frames agree in the sum of the smaller shares.
    """
    common_NM = torch.minimum(colours[:, None], earlier[None]).sum(dim=-1)
    return common_NM.max(dim=1).values.mean().item()
