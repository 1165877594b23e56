"""The size at which frames are compared: its bounds, and the resize to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storymem_dist.memory.frames import MAX_PIXELS, MIN_PIXELS, resize_for_selection, selection_size


@settings(deadline=None, derandomize=True, database=None)
@given(height=st.integers(16, 2160), width=st.integers(16, 2160))
def test_sides_are_multiples_of_28_within_the_bounds_for_any_size(height: int, width: int) -> None:
    new_height, new_width = selection_size(height, width)
    assert new_height % 28 == new_width % 28 == 0
    assert new_height * new_width >= MIN_PIXELS
    if max(height, width) <= 7 * min(height, width):  # a longer strip may exceed the maximum: no side is below 28
        assert new_height * new_width <= MAX_PIXELS


@pytest.mark.parametrize(("height", "width"), [(480, 832), (832, 480), (64, 96), (56, 84)])
def test_frames_are_resized_as_pillow_does_it_which_always_averages_when_it_shrinks(height: int, width: int) -> None:
    frames = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    resized = resize_for_selection(frames)
    assert resized.dtype == torch.uint8
    new_height, new_width = selection_size(height, width)
    for frame, ours in zip(frames, resized, strict=True):
        image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        pillows = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        expected = torch.frombuffer(bytearray(pillows.tobytes()), dtype=torch.uint8).view(new_height, new_width, 3)
        assert (ours.permute(1, 2, 0).int() - expected.int()).abs().max() <= 1
