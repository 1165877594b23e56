"""Latent sizes, token counts and temporal positions."""

import pytest
import torch

from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.errors import ConfigError
from tests.helpers.golden import load_golden


@pytest.mark.parametrize("size", load_golden("memory_condition")[1]["sizes"], ids=lambda size: str(size["seq_len"]))
def test_latent_sizes_and_token_counts_are_the_originals(size: dict) -> None:
    grid = LatentGrid(
        num_frames=size["frame_num"], height=size["pixel_h"], width=size["pixel_w"], num_memory=size["memory_count"]
    )
    assert grid.latent_shape == (16, size["lat_t"], size["lat_h"], size["lat_w"])
    assert grid.num_tokens == size["seq_len"]


@pytest.mark.parametrize(
    ("num_memory", "num_frames", "positions"),
    [
        (0, 9, [0, 1, 2]),
        (1, 5, [-5, 0, 1]),
        (3, 1, [-15, -10, -5, 0]),
        (10, 5, [-50, -45, -40, -35, -30, -25, -20, -15, -10, -5, 0, 1]),
    ],
)
def test_memory_lies_before_the_clip_five_latent_times_apart(
    num_memory: int, num_frames: int, positions: list[int]
) -> None:
    found = LatentGrid(num_frames=num_frames, height=16, width=32, num_memory=num_memory).temporal_positions()
    assert found.dtype == torch.int64
    assert found.tolist() == positions


def test_positions_are_those_of_the_corrected_release() -> None:
    _, manifest = load_golden("dit_memory_rope")
    with_memory = [case for case in manifest["cases"] if min(case["temporal_positions"]) < 0]
    assert with_memory
    for case in with_memory:
        positions = case["temporal_positions"]
        num_memory = sum(position < 0 for position in positions)
        num_frames = 4 * (len(positions) - num_memory - 1) + 1
        grid = LatentGrid(num_frames=num_frames, height=16, width=16, num_memory=num_memory)
        assert grid.temporal_positions().tolist() == positions


def test_dropping_memory_leaves_the_clip() -> None:
    grid = LatentGrid(num_frames=9, height=16, width=32, num_memory=2)
    latents = torch.arange(5.0).expand(16, 2, 4, 5).movedim(-1, 1)
    assert grid.clip_latents(latents)[0, :, 0, 0].tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 10}, "num_frames=10 is not allowed"),
        ({"height": 24}, "height=24 is not allowed; it must be a multiple of 16, such as 32"),
        ({"width": 8}, "width=8 is not allowed; it must be between 16 and"),
        ({"num_memory": -1}, "num_memory=-1 is not allowed"),
    ],
)
def test_sizes_that_are_no_whole_number_of_tokens_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatentGrid(**({"num_frames": 9, "height": 16, "width": 16} | values))
