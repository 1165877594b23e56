"""Rotary tables and rotations follow the formula of the paper, for any temporal positions."""

import math

import pytest
import torch

from storymem_dist.models.rope import apply_rope, rope_split, rope_tables


@pytest.mark.parametrize(
    ("head_dim", "split"), [(128, (44, 42, 42)), (20, (8, 6, 6)), (16, (8, 4, 4)), (24, (8, 8, 8))]
)
def test_a_head_is_split_as_in_the_original(head_dim: int, split: tuple[int, int, int]) -> None:
    assert rope_split(head_dim) == split


def test_tables_hold_every_axis_position_times_its_frequency() -> None:
    positions, height, width, head_dim = [-50, -5, 0, 20], 3, 2, 20
    cos, sin = rope_tables(torch.tensor(positions), height, width, head_dim, device="cpu")
    assert cos.dtype == sin.dtype == torch.float32
    row = 0
    for t in positions:
        for y in range(height):
            for x in range(width):
                angles = [
                    position * 10000 ** -(2 * k / channels)
                    for position, channels in zip((t, y, x), (8, 6, 6), strict=True)
                    for k in range(channels // 2)
                ]
                expected = torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]])
                torch.testing.assert_close(torch.stack([cos[row], sin[row]]), expected, rtol=0, atol=6e-8)
                row += 1
    assert row == len(cos)


@pytest.mark.parametrize("compiled", [False, True])
def test_adjacent_pairs_are_rotated_as_a_plane(compiled: bool) -> None:
    x = torch.randn(2, 24, 3, 20, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(torch.arange(4), 3, 2, 20, device="cpu")
    rotate = torch.compile(apply_rope, fullgraph=True, backend="eager") if compiled else apply_rope
    rotated = rotate(x, cos, sin)
    for k in range(10):
        c, s = cos[:, k, None], sin[:, k, None]
        even, odd = x[..., 2 * k], x[..., 2 * k + 1]
        torch.testing.assert_close(rotated[..., 2 * k], even * c - odd * s)
        torch.testing.assert_close(rotated[..., 2 * k + 1], even * s + odd * c)


def test_rotation_of_half_precision_is_computed_and_returned_in_fp32() -> None:
    x = torch.randn(1, 24, 3, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope_tables(torch.arange(4), 3, 2, 20, device="cpu")
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin))


def test_scores_of_rotated_queries_and_keys_depend_on_position_differences_only() -> None:
    q, k = torch.randn(2, 1, 24, 1, 20, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    scores = []
    for start in (-40, 13):
        cos, sin = rope_tables(torch.arange(4) + start, 3, 2, 20, device="cpu")
        scores.append(torch.einsum("blnh,bsnh->bnls", apply_rope(q, cos, sin), apply_rope(k, cos, sin)))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


def test_tables_are_no_views() -> None:
    """A graph would depend on the sizes of what they view."""
    for table in rope_tables(torch.arange(3), 4, 5, 16, device="cpu"):
        assert table._base is None and table.is_contiguous()
