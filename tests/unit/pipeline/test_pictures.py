"""What other programs hand over as pictures, and what they get."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storymem_dist.artifacts.video import VideoSettings, count_frames, read_clip, write_clip
from storymem_dist.errors import ConfigError
from storymem_dist.pipeline import StoryMemory, frames_to_images, save_video, to_frames

CLIP = torch.randint(0, 256, (3, 32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_clip_goes_to_comfyui_and_back_without_a_change() -> None:
    images = frames_to_images(CLIP)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    assert torch.equal(to_frames(images), CLIP)


@pytest.mark.parametrize(
    "given",
    [
        CLIP,
        CLIP.numpy(),
        CLIP[None],
        CLIP.half() / 255,
        torch.cat([CLIP, CLIP[..., :1]], dim=3),
        [Image.fromarray(frame.numpy()) for frame in CLIP],
        [CLIP[:2], CLIP[2]],
    ],
    ids=["uint8", "numpy", "of the old pack", "half", "with alpha", "PIL", "a list"],
)
def test_every_form_of_a_clip_means_the_same(given: object) -> None:
    assert torch.equal(to_frames(given), CLIP)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(0, 8, 8, 3),
        torch.zeros(2, 2, 8, 8, 3),
        np.zeros((4, 4)),
        CLIP.long(),
        "a",
        None,
        [],
    ],
)
def test_anything_else_is_refused_in_one_sentence(given: object) -> None:
    with pytest.raises(ConfigError, match=r"a video is a|at least one is needed"):
        to_frames(given)  # type: ignore[arg-type]


def test_values_outside_the_range_and_no_numbers_become_the_nearest_color() -> None:
    assert to_frames(torch.tensor([[[-1.0, 2.0, float("nan")]]])).flatten().tolist() == [0, 255, 0]


def test_a_video_of_several_clips_has_the_frames_of_all_and_the_bytes_of_the_renderer(tmp_path: Path) -> None:
    save_video(CLIP, tmp_path / "one.mp4", fps=12)
    write_clip(tmp_path / "expected.mp4", CLIP.permute(0, 3, 1, 2), 12, VideoSettings())
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()
    assert count_frames(save_video((clip for clip in (CLIP, frames_to_images(CLIP))), tmp_path / "two.mp4")) == 6
    with pytest.raises(ConfigError, match="a clip of 48x16 pixels cannot follow one of 48x32"):
        save_video([CLIP, CLIP[:, :16]], tmp_path / "mixed.mp4")
    assert not (tmp_path / "mixed.mp4").exists()


@pytest.mark.parametrize("size", [(54, 96), (1080, 1920)])
def test_a_video_may_have_any_even_size(size: tuple[int, int], tmp_path: Path) -> None:
    saved = read_clip(save_video(torch.full((1, *size, 3), 200, dtype=torch.uint8), tmp_path / "a.mp4"))
    assert saved.shape == (1, 3, *size) and abs(int(saved[0, 0, -1, -1]) - 200) < 4, "nothing is padded or cut"


@pytest.mark.parametrize(
    ("video", "fps", "message"),
    [
        (CLIP[:, :31], 16, "a clip of 48x31 pixels cannot be saved; width and height must be even"),
        (CLIP, 0, "fps=0 is not allowed"),
        (None, 16, "a video is a NoneType"),
        ([], 16, "no clip was given"),
    ],
)
def test_what_no_video_can_be_is_one_sentence(video: Any, fps: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        save_video(video, tmp_path / "a.mp4", fps)
    assert not any(tmp_path.iterdir())


def test_a_contact_sheet_shows_every_keyframe_also_of_different_sizes() -> None:
    memory = StoryMemory().with_references([CLIP[0], torch.zeros(600, 400, 3, dtype=torch.uint8)])
    sheet = memory.contact_sheet()
    assert sheet.dtype == torch.uint8 and sheet.shape[2] == 3
    assert sheet.shape[0] < 400 and sheet.float().std() > 5
    assert StoryMemory().contact_sheet().float().std() > 1, "it says that there is nothing"
