"""The formulas on known vectors, and measures that move the right way on made clips."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storymem_dist.evaluation import measures, metrics
from storymem_dist.evaluation.measures import agreement, colour_shares, describe, seam

E1, E2, E3 = torch.eye(3)
DIAGONAL = F.normalize(E1 + E2, dim=0)
HALF = math.sqrt(0.5)


def disc_clip(
    colour: tuple[int, int, int] = (220, 60, 40), *, num_frames: int = 12, start: int = 20, sky: int = 110
) -> Tensor:
    """``uint8 [F, 3, 96, 160]``: a striped disc that moves over a striped ground."""
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(160), indexing="ij")
    ground = torch.where((columns // 4 + rows // 4) % 2 == 0, sky, sky + 20)[None].expand(3, -1, -1)
    frames = []
    for index in range(num_frames):
        is_disc = (rows - 48) ** 2 + (columns - start - 2 * index) ** 2 < 500
        frames.append(torch.where(is_disc[None], torch.tensor(colour)[:, None, None], ground))
    return torch.stack(frames).to(torch.uint8)


def test_two_shots_have_one_pair() -> None:
    found = metrics.consistency(torch.stack([E1, DIAGONAL]), torch.stack([E1, E2]))
    assert (found.overall, found.top, found.num_pairs) == (pytest.approx(HALF), pytest.approx(HALF), 1)


def test_three_shots_by_hand() -> None:
    """Pairs 0-1: cos 45 degrees; 0-2: 0; 1-2: cos 45 degrees. Fewer than ten pairs: top 10 is all of them."""
    found = metrics.consistency(torch.stack([E1, DIAGONAL, E2]), torch.stack([E1, E1, E3]))
    assert found.overall == pytest.approx(2 * HALF / 3) and found.top == pytest.approx(2 * HALF / 3)
    assert found.num_pairs == 3


def test_one_shot_has_no_consistency() -> None:
    assert metrics.consistency(E1[None], E1[None]) == metrics.Consistency(overall=None, top=None, num_pairs=0)


def by_angle(degrees: list[float]) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_only_the_ten_most_relevant_of_fifteen_pairs_count() -> None:
    clips, texts = by_angle([0, 10, 25, 45, 70, 88]), by_angle([0, 40, 2, 44, 5, 81])
    pairs = list(combinations(range(6), 2))
    relevant = sorted(pairs, key=lambda pair: -float(texts[pair[0]] @ texts[pair[1]]))[:10]
    assert relevant != pairs[:10]
    wanted = sum(float(clips[a] @ clips[b]) for a, b in relevant) / 10
    found = metrics.consistency(clips, texts)
    assert found.top == pytest.approx(wanted) and found.num_pairs == 15
    assert found.overall == pytest.approx(sum(float(clips[a] @ clips[b]) for a, b in pairs) / 15)


def test_pairs_of_equal_relevance_come_in_the_order_of_the_story() -> None:
    """Twelve shots with one prompt: the first ten pairs are those of the first shot with the next ten."""
    clips = by_angle([3.0 * index for index in range(12)])
    texts = E1.expand(12, 3) + 1e-9 * torch.randn(12, 3, dtype=torch.float64)
    wanted = sum(math.cos(math.radians(3 * other)) for other in range(1, 11)) / 10
    assert metrics.consistency(clips, texts).top == pytest.approx(wanted)


def test_a_mean_is_of_what_is_known() -> None:
    assert metrics.mean([1.0, None, 3.0]) == 2.0 and metrics.mean([None]) is None
    assert metrics.finite(torch.tensor(torch.nan)) is None and metrics.finite(torch.tensor(2.5)) == 2.5


def test_more_blur_is_less_sharp_and_changes_what_the_aesthetic_model_sees() -> None:
    from storymem_dist.evaluation.frames import clip_pixels

    clip = disc_clip()
    sharpness, detail = [], []
    for width in (1, 3, 7):
        blurred = F.avg_pool2d(clip.float(), width, stride=1, padding=width // 2, count_include_pad=False)
        blurred = blurred.round().to(torch.uint8)
        sharpness.append(describe(blurred).sharpness.mean().item())
        detail.append(clip_pixels(blurred[:1], in_8_bits=False).diff(dim=-1).abs().mean().item())
    assert sharpness[0] > 2 * sharpness[1] > 4 * sharpness[2]
    assert detail[0] > detail[1] > detail[2]


def test_a_flickering_lamp_is_flicker_and_a_steady_fade_is_not() -> None:
    still = disc_clip(num_frames=1).expand(12, -1, -1, -1)
    lamp = still.clone()
    lamp[::2, :, :24, :40] += 40
    fade = still + 2 * torch.arange(12, dtype=torch.uint8)[:, None, None, None]
    assert describe(still).flicker == 0
    assert describe(fade).flicker < 1e-3
    assert describe(lamp).flicker == pytest.approx(40 * 4 / 64, rel=0.01)  # the lamp is 4 of the 64 parts
    assert metrics.finite(describe(still[:2]).flicker) is None


def test_a_hard_seam_is_harder_than_a_continued_movement() -> None:
    first = describe(disc_clip(num_frames=12, start=20))
    soft = seam(first, describe(disc_clip(num_frames=12, start=44)))
    jump = seam(first, describe(disc_clip(num_frames=12, start=100)))
    other = seam(first, describe(disc_clip((30, 200, 90), num_frames=12, start=44, sky=190)))
    assert soft == pytest.approx(1, abs=0.15)
    assert jump > 1.5 * soft and other > 3 * jump
    still = describe(disc_clip(num_frames=1))
    assert seam(still, still) == 1.0, "two clips of one frame have no steps"


def test_the_same_character_agrees_with_the_keyframes_and_another_one_less() -> None:
    keyframes = colour_shares(disc_clip()[:1])
    same, other = (describe(disc_clip(colour, start=70)).colours for colour in ((220, 60, 40), (40, 200, 70)))
    assert agreement(same, keyframes) > 0.98
    assert agreement(other, keyframes) < agreement(same, keyframes) - 0.05
    both = torch.cat([keyframes, colour_shares(disc_clip((40, 200, 70))[:1])])
    assert agreement(other, both) > 0.98, "the most similar keyframe counts"


def test_colours_are_shares_that_move_little_with_the_light() -> None:
    clip = disc_clip()
    shares = colour_shares(clip[:2])
    assert shares.shape == (2, measures.HUE_BINS * measures.SATURATION_BINS * measures.VALUE_BINS)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2))
    brighter = colour_shares((clip[:2].float() * 1.02).round().to(torch.uint8))
    assert agreement(shares, brighter) > 0.96
    grey = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    assert colour_shares(grey).count_nonzero() <= 2, "a grey has no hue"
