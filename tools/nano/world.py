"""The small world: a character with eyes (5 colours x 3 shapes) that does one of 6 things before one of 5 backgrounds.

Everything is drawn by signed distances with soft edges, many clips at once. Pixels are RGB in [-1, 1]. Knows nothing of
models.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

HEIGHT, WIDTH, FRAMES = 64, 96, 17
COLOURS = {
    "red": (225, 45, 45),
    "yellow": (250, 220, 40),
    "green": (40, 165, 70),
    "blue": (50, 90, 230),
    "purple": (150, 60, 200),
}
SHAPES = ("ball", "box", "triangle")
MOTIONS = ("left", "right", "up", "down", "jump", "still")
Rgb = tuple[int, int, int]
# sky above, sky at the horizon, ground, hill on the horizon, disk in the sky
BACKGROUNDS: dict[str, tuple[Rgb, Rgb, Rgb, Rgb | None, Rgb | None]] = {
    "meadow": ((150, 205, 245), (208, 233, 250), (150, 205, 120), (122, 184, 104), None),
    "desert": ((250, 214, 150), (255, 238, 200), (225, 186, 122), (236, 203, 146), (255, 250, 228)),
    "sea": ((170, 225, 235), (226, 245, 248), (70, 150, 190), None, (250, 252, 252)),
    "night": ((18, 20, 50), (42, 42, 88), (32, 36, 58), (26, 28, 48), (240, 235, 200)),
    "snow": ((180, 192, 210), (214, 221, 232), (245, 247, 250), (229, 233, 240), None),
}
OUTLINE, EYE = (25, 22, 30), (250, 250, 250)
MARGIN = 13.0
"""How near the middle of a character comes to the left and right edge."""

KINDS = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS, "background": tuple(BACKGROUNDS)}
"""What a clip shows, by kind, in the order of the numbers in ``Clips``."""


def _pixels(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float32) / 127.5 - 1


_PALETTE = _pixels(list(COLOURS.values()))
_ABSENT = (0, 0, 0)
_SCENERY = _pixels([[row or _ABSENT for row in rows] for rows in BACKGROUNDS.values()])  # [5, 5, 3]
_HAS_HILL = torch.tensor([rows[3] is not None for rows in BACKGROUNDS.values()])
_HAS_DISK = torch.tensor([rows[4] is not None for rows in BACKGROUNDS.values()])


@dataclass
class Clips:
    """Parameters of B clips: numbers ``[B]`` in ``KINDS``, sizes in pixels.

    ``disk`` and ``hill`` are ``[B, 3]`` (x, y or width, size); ``path`` is ``[B, F, 2]``: x and y of the character's
    middle in each frame.
    """

    colour: Tensor
    shape: Tensor
    motion: Tensor
    background: Tensor
    radius: Tensor
    horizon: Tensor
    hill: Tensor
    disk: Tensor
    path: Tensor

    def __getitem__(self, index: slice | Tensor) -> "Clips":
        return Clips(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def _bottom(shape: Tensor, radius: Tensor) -> Tensor:
    return radius * torch.tensor([1.0, 0.88, 0.68])[shape]


def sample_clips(
    num: int,
    g: torch.Generator,
    *,
    anywhere: bool = False,
    colour: Tensor | None = None,
    shape: Tensor | None = None,
) -> Clips:
    """Draw ``num`` clips at random, with a ``colour`` and ``shape`` of choice.

    ``anywhere``: the character may start where an earlier shot left it, and stops at the edge of the picture. Otherwise
    it has room for its whole motion.
    """

    def u(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num, generator=g)

    def pick(n: int) -> Tensor:
        return torch.randint(n, (num,), generator=g)

    colour = pick(len(COLOURS)) if colour is None else colour
    shape = pick(len(SHAPES)) if shape is None else shape
    motion, background = pick(len(MOTIONS)), pick(len(BACKGROUNDS))
    radius = u(9.5, 12.5)
    ground = 60 - u(0, 6) - _bottom(shape, radius)
    time = torch.linspace(0, 1, FRAMES)[None]
    far, high, rise = u(34, 46), u(18, 26), u(24, 30)
    free_x = u(MARGIN + 1, WIDTH - MARGIN - 1)
    room = WIDTH - 2 * MARGIN - 2 - far
    x0 = torch.where(motion == 1, MARGIN + 1 + u(0, 1) * room, free_x)
    x0 = torch.where(motion == 0, WIDTH - MARGIN - 1 - u(0, 1) * room, x0)
    top = ground - rise
    y0 = torch.where(motion == 3, top, ground)
    if anywhere:
        x0 = free_x
        in_air = torch.rand(num, generator=g) < 0.3
        y0 = torch.where(in_air, ground - u(0, 1) * (ground - 15), ground)
    dx = (motion == 1).float() - (motion == 0).float()
    x = (x0[:, None] + dx[:, None] * far[:, None] * time).clamp(MARGIN, WIDTH - MARGIN)
    y = y0[:, None] + torch.where(motion == 3, rise, torch.zeros(num))[:, None] * time
    y = y - torch.where(motion == 2, rise, torch.zeros(num))[:, None] * time
    y = y - torch.where(motion == 4, high, torch.zeros(num))[:, None] * 4 * time * (1 - time)
    y = torch.minimum(y, torch.maximum(ground, y0)[:, None]).clamp_min(14)
    disk = torch.stack([u(12, WIDTH - 12), u(9, 16), u(5, 7)], 1)
    hill = torch.stack([u(10, WIDTH - 10), u(16, 26), u(7, 12)], 1)
    return Clips(colour, shape, motion, background, radius, u(38, 46), hill, disk, torch.stack([x, y], -1))


def after_another(clips: Clips, before: Clips) -> Clips:
    """The clips, each begun by the last five frames of another motion, as a shot continued from motion frames is."""
    start = clips.path[:, :1]
    begun = start + before.path[:, -5:] - before.path[:, -1:]
    begun = torch.minimum(begun.clamp_min(MARGIN), torch.tensor([WIDTH - MARGIN, 60.0]))
    begun = torch.cat([begun[:, :4], start], 1)
    at = torch.linspace(0, FRAMES - 1, FRAMES - 4)
    low = at.long().clamp_max(FRAMES - 2)
    share = (at - low)[None, :, None]
    rest = clips.path[:, low] * (1 - share) + clips.path[:, low + 1] * share
    return replace(clips, path=torch.cat([begun, rest[:, 1:]], 1))


def shape_distance(shape: Tensor, radius: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance to the character's outer edge; ``shape`` and ``radius`` broadcast against dx, dy."""
    ball = (dx * dx + dy * dy).sqrt() - radius
    half, corner = 0.88 * radius, 0.22 * radius
    qx, qy = dx.abs() - half + corner, dy.abs() - half + corner
    box = (qx.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2).sqrt() + torch.maximum(qx, qy).clamp_max(0) - corner
    inner = 0.68 * radius
    triangle = torch.maximum(dy, 0.8660254 * dx.abs() - 0.5 * dy) - inner
    return torch.where(shape == 0, ball, torch.where(shape == 1, box, triangle))


def _over(picture: Tensor, colour: Tensor, distance: Tensor) -> Tensor:
    """Paint ``colour`` [B,3,...] where ``distance`` [B,...] is negative, with a soft edge of a pixel."""
    alpha = (0.5 - distance).clamp(0, 1)[:, None]
    return picture + alpha * (colour - picture)


def render(
    clips: Clips,
    frames: Tensor | None = None,
    top: Tensor | None = None,
    left: Tensor | None = None,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> tuple[Tensor, Tensor]:
    """Pixels ``[B, 3, F, height, width]`` and the character's signed distance ``[B, F, height, width]``.

    ``frames`` ``[B, F]`` chooses frames; ``top`` and ``left`` ``[B]`` choose a window.
    """
    num = len(clips.colour)
    zero = torch.zeros(num)
    ys = (torch.arange(height) + 0.5)[None, :, None] + (zero if top is None else top)[:, None, None]
    xs = (torch.arange(width) + 0.5)[None, None, :] + (zero if left is None else left)[:, None, None]
    rows = _SCENERY[clips.background][..., None, None]  # [B, 5, 3, 1, 1]
    b = (slice(None), None, None)
    fade = (ys / clips.horizon[b]).clamp(0, 1)[:, None]
    picture = rows[:, 0] + fade * (rows[:, 1] - rows[:, 0])
    picture = picture.expand(num, 3, height, width)
    big = 1e3
    disk = ((xs - clips.disk[:, 0][b]) ** 2 + (ys - clips.disk[:, 1][b]) ** 2).sqrt() - clips.disk[:, 2][b]
    picture = _over(picture, rows[:, 4], torch.where(_HAS_DISK[clips.background][b], disk, torch.full_like(disk, big)))
    wide, tall = clips.hill[:, 1][b], clips.hill[:, 2][b]
    hill = ((((xs - clips.hill[:, 0][b]) / wide) ** 2 + ((ys - clips.horizon[b]) / tall) ** 2).sqrt() - 1) * tall
    picture = _over(picture, rows[:, 3], torch.where(_HAS_HILL[clips.background][b], hill, torch.full_like(hill, big)))
    picture = _over(picture, rows[:, 2], (clips.horizon[b] - ys).expand(num, height, width))
    path = clips.path if frames is None else clips.path.gather(1, frames[..., None].expand(-1, -1, 2))
    num_frames = path.shape[1]
    picture = picture[:, :, None].expand(num, 3, num_frames, height, width)
    f = (slice(None), None, None, None)
    dx, dy = xs[:, None] - path[:, :, 0, None, None], ys[:, None] - path[:, :, 1, None, None]
    radius, shape = clips.radius[f], clips.shape[f]
    edge = shape_distance(shape, radius, dx, dy)
    line, eye = _pixels(OUTLINE)[None, :, None, None, None], _pixels(EYE)[None, :, None, None, None]
    picture = _over(picture, line, edge)
    picture = _over(picture, _PALETTE[clips.colour][..., None, None, None], edge + 1.6)
    is_triangle = (shape == 2).float()
    ex, ey = radius * (0.38 - 0.12 * is_triangle), radius * (-0.15 + 0.25 * is_triangle)
    gaze = ((clips.motion == 1).float() - (clips.motion == 0).float())[f] * 0.1 * radius
    lift = ((clips.motion == 3).float() - (clips.motion == 2).float())[f] * 0.1 * radius
    white = ((dx.abs() - ex) ** 2 + (dy - ey) ** 2).sqrt() - 0.27 * radius
    picture = _over(picture, eye, white)
    pupil = torch.minimum((dx - gaze - ex).abs(), (dx - gaze + ex).abs())
    pupil = (pupil**2 + (dy - ey - lift) ** 2).sqrt() - 0.15 * radius
    return _over(picture, line, pupil), edge
