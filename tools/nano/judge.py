"""Says what a clip shows: colour, shape, motion, background. Fixed rules, no learning; checked on drawn clips."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.nano import world

UNCLEAR = "unclear"
"""What the judge says where it sees none of the words of a kind."""

_FILL = [torch.tensor(rgb).float() for rgb in world.COLOURS.values()]
NUM_COLOURS = len(_FILL)


def _lab_like(rgb: Tensor) -> Tensor:
    """RGB 0..255 to opponent colours (brightness counts half): ``[..., 3]``."""
    r, g, b = rgb.unbind(-1)
    return torch.stack([(r + g + b) / 6, (r - g) * 0.7, (r + g - 2 * b) * 0.4], -1)


_BG_ROWS = [[row for row in rows if row is not None] for rows in world.BACKGROUNDS.values()]
_REFERENCE = torch.stack(
    [
        *_FILL,
        *(torch.tensor(row).float() for rows in _BG_ROWS for row in rows),
        torch.tensor(world.OUTLINE).float(),
        torch.tensor(world.EYE).float(),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a clip shows, in the words of ``world.KINDS``, or ``unclear``.

    ``visible`` is the share of frames with a character.
    """

    colour: str
    shape: str
    motion: str
    background: str
    visible: float


def judge(pixels: Tensor) -> Verdict:
    """Judge a clip ``[3, F, H, W]`` in [-1, 1]."""
    rgb = ((pixels.permute(1, 2, 3, 0).float() + 1) * 127.5).clamp(0, 255)
    frames, height, width, _ = rgb.shape
    distance = torch.cdist(_lab_like(rgb).reshape(1, -1, 3), _lab_like(_REFERENCE)[None])[0]
    nearest, best = distance.argmin(1).view(frames, height, width), distance.amin(1).view(frames, height, width)
    fill = torch.where((nearest < NUM_COLOURS) & (best < 45), nearest, torch.full_like(nearest, -1))
    counts = torch.stack([(fill == i).flatten(1).sum(1) for i in range(NUM_COLOURS)])  # [6, F]
    colour = int(counts.sum(1).argmax())
    mask = (fill == colour).float()
    ys, xs = torch.arange(height).float() + 0.5, torch.arange(width).float() + 0.5
    mass = mask.flatten(1).sum(1).clamp_min(1e-6)
    cx = (mask.sum(1) * xs).sum(1) / mass
    cy = (mask.sum(2) * ys).sum(1) / mass
    return Verdict(
        colour=tuple(world.COLOURS)[colour],
        shape=_shape(fill == colour, counts[colour], cx, cy),
        motion=_motion(mask.flatten(1).sum(1) > 40, cx, cy),
        background=_background(rgb, cx, cy),
        visible=float((counts[colour] > 60).float().mean()),
    )


def _motion(seen: Tensor, cx: Tensor, cy: Tensor) -> str:
    """The motion of the middle of the coloured pixels, in the frames where enough of them are ``seen``."""
    if int(seen.sum()) < 8:
        return UNCLEAR
    t = torch.nonzero(seen).flatten()
    edge = max(2, len(t) // 8)
    head, middle, tail = t[:edge], t[len(t) * 3 // 8 : len(t) * 5 // 8 + 1], t[-edge:]
    dx, dy = (cx[tail].mean() - cx[head].mean()).item(), (cy[tail].mean() - cy[head].mean()).item()
    lift = ((cy[head].mean() + cy[tail].mean()) / 2 - cy[middle].mean()).item()
    if abs(dx) > 12 and abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    if lift > 8 and lift > 0.7 * abs(dy):
        return "jump"
    if abs(dy) > 10:
        return "down" if dy > 0 else "up"
    return UNCLEAR if abs(dx) > 6 or abs(dy) > 6 or lift > 5 else "still"


def _shape(mask: Tensor, count: Tensor, cx: Tensor, cy: Tensor) -> str:
    """The shape whose drawing, eyes and outline left out, overlaps best with the coloured pixels of a few frames."""
    frames = torch.nonzero(count > 60).flatten()
    if not len(frames):
        return UNCLEAR
    frames = frames[torch.linspace(0, len(frames) - 1, min(5, len(frames))).long()]
    height, width = mask.shape[1:]
    ys, xs = (torch.arange(height) + 0.5)[:, None], (torch.arange(width) + 0.5)[None]
    votes = torch.zeros(len(world.SHAPES))
    for f in frames.tolist():
        for shape in range(len(world.SHAPES)):
            best = 0.0
            for radius in (8.5, 10.0, 11.0, 12.0, 13.0):
                for shift in (-1.5, 0.0, 1.5):
                    r = torch.tensor(radius)
                    dx, dy = xs - cx[f], ys - cy[f] - shift
                    drawn = world.shape_distance(torch.tensor(shape), r, dx, dy) + 1.6 < 0
                    tri = float(shape == 2)
                    ex, ey = r * (0.38 - 0.12 * tri), r * (-0.15 + 0.25 * tri)
                    drawn &= ((dx.abs() - ex) ** 2 + (dy - ey) ** 2).sqrt() - 0.27 * r > 0
                    both = (drawn & mask[f]).sum().item()
                    best = max(best, both / max(1, (drawn | mask[f]).sum().item()))
            votes[shape] += best
    return world.SHAPES[int(votes.argmax())]


def _background(rgb: Tensor, cx: Tensor, cy: Tensor) -> str:
    """Nearest background by the mean colour of a band of sky and a band of ground, away from the character."""
    height, width = rgb.shape[1:3]
    ys, xs = torch.arange(height).float()[None, :, None], torch.arange(width).float()[None, None, :]
    far = ((xs - cx[:, None, None]).abs() > 17) | ((ys - cy[:, None, None]).abs() > 17)

    def band(low: int, high: int) -> Tensor:
        part = far & (ys >= low) & (ys < high)
        return _lab_like((rgb * part[..., None]).sum((0, 1, 2)) / part.sum().clamp_min(1))

    sky, ground = band(18, 30), band(height - 12, height)

    def distance(name: str) -> float:
        above, below, floor = (torch.tensor(row).float() for row in world.BACKGROUNDS[name][:3])
        return ((sky - _lab_like(above * 0.45 + below * 0.55)).norm() + (ground - _lab_like(floor)).norm()).item()

    return min(world.BACKGROUNDS, key=distance)
