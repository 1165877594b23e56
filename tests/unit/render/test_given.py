import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ShotError
from storymem_dist.render import given
from storymem_dist.render.given import ClipReader, given_image
from tests.helpers.videos import numbered_frames, write_video

SAMPLER = SamplerSettings(num_frames=17, height=48, width=64)


def read_clip(path: Path) -> torch.Tensor:
    reader = ClipReader(path, SAMPLER)
    assert reader.read_part(1000.0)
    return reader.clip


def test_a_clip_of_the_right_size_and_rate_is_taken_as_it_is(tmp_path: Path) -> None:
    frames = [np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8) for number in range(7)]
    path = write_video(tmp_path / "a.mkv", frames, fps=16, codec="ffv1", pixel_format="bgr0")
    clip = read_clip(path)
    assert clip.dtype == torch.uint8 and clip.shape == (7, 3, 48, 64)
    assert np.array_equal(clip.permute(0, 2, 3, 1).numpy(), np.stack(frames))


def test_another_size_is_scaled_to_cover_and_cut_as_a_picture_is(tmp_path: Path) -> None:
    frames = numbered_frames(3, width=130, height=50)
    path = write_video(tmp_path / "a.mkv", frames, fps=16, codec="ffv1", pixel_format="bgr0")
    clip = read_clip(path)
    for number, frame in enumerate(frames):
        still = tmp_path / f"{number}.png"
        Image.fromarray(frame).save(still)
        difference = (clip[number].int() - given_image(still, SAMPLER).int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.1


@pytest.mark.parametrize("expected", [1, 3, 5, 9])
def test_a_clip_of_another_length_than_expected_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: int
) -> None:
    path = write_video(tmp_path / "a.mkv", 5, fps=16, codec="ffv1", pixel_format="bgr0")
    whole = read_clip(path)
    monkeypatch.setattr(given, "num_frames_at", lambda facts, fps: expected)
    assert torch.equal(read_clip(path), whole) and len(whole) == 5


def test_a_clip_that_turns_out_too_long_fails_its_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", 6, fps=16, codec="ffv1", pixel_format="bgr0")
    monkeypatch.setattr(given, "MAX_FRAMES", 5)
    with pytest.raises(ShotError, match="more than 5 frames at 16 frames per second; cut it into several shots"):
        read_clip(path)


def test_a_clip_that_is_read_in_parts_is_the_same(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 6, fps=16, codec="ffv1", pixel_format="bgr0")
    reader, parts = ClipReader(path, SAMPLER), 1
    while not reader.read_part(0.0):
        assert len(reader.clip) == parts
        parts += 1
    assert parts == 7 and torch.equal(reader.clip, read_clip(path))


def test_a_repeated_frame_is_scaled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.avi", 3, fps=4, codec="ffv1", pixel_format="bgr0")
    calls = []
    real = given.cover_size
    monkeypatch.setattr(given, "cover_size", lambda *arguments: calls.append(1) or real(*arguments))
    clip = read_clip(path)
    assert len(clip) == 12 and len(calls) == 3


@pytest.mark.parametrize("kind", ["transparent", "turned", "sixteen_bits", "palette"])
def test_a_still_of_any_kind_is_a_picture_of_the_clips_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "still.png"
    if kind == "transparent":
        Image.new("RGBA", (90, 60), (255, 0, 0, 0)).save(path)
        expected = (255, 255, 255)
    elif kind == "sixteen_bits":
        Image.fromarray(np.full((60, 90), 51_400, np.uint16)).save(path)
        expected = (200, 200, 200)
    elif kind == "palette":
        Image.new("RGB", (90, 60), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(path)
        expected = (10, 20, 30)
    else:
        path = tmp_path / "still.jpg"
        picture = Image.new("RGB", (60, 90), (255, 0, 0))
        picture.paste((0, 0, 255), (0, 45, 60, 90))
        exif = Image.Exif()
        exif[274] = 6
        picture.save(path, exif=exif, quality=95)
        image = given_image(path, dataclasses.replace(SAMPLER, height=32, width=48))
        assert image[2, 16, 4] > 200 and image[0, 16, -4] > 200, "turned by 90 degrees: blue is left, red is right"
        return
    image = given_image(path, SAMPLER)
    assert image.shape == (3, 48, 64) and (image.float().mean(dim=(1, 2)) - torch.tensor(expected)).abs().max() < 2
