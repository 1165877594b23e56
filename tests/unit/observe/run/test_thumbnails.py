import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from storymem_dist.artifacts.video import VideoSettings, write_clip, write_png
from storymem_dist.observe.run.thumbnails import Thumbnails


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    levels = torch.tensor([20, 120, 220], dtype=torch.uint8)
    clip_FCHW = levels[:, None, None, None].expand(3, 3, 64, 96).contiguous()
    write_clip(tmp_path / "clip.mp4", clip_FCHW, 16, VideoSettings(preset="ultrafast"))
    write_png(tmp_path / "image.png", clip_FCHW[2])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    return tmp_path


def opened(jpeg: bytes | None) -> Image.Image:
    assert jpeg is not None
    return Image.open(io.BytesIO(jpeg))


def test_frames_of_a_clip_are_the_right_ones_and_keep_their_shape(folder: Path) -> None:
    thumbnails = Thumbnails(folder, 32)
    thumbnails.decode("clip.mp4", [0, 2])
    for index, level in ((0, 20), (1, 120), (2, 220)):
        image = opened(thumbnails.frame("clip.mp4", index))
        assert image.size == (48, 32)
        assert abs(image.convert("L").getpixel((24, 16)) - level) < 8


def test_an_image_is_shrunk_and_read_once(folder: Path) -> None:
    thumbnails = Thumbnails(folder, 16)
    first = thumbnails.image("image.png")
    assert opened(first).size == (24, 16)
    (folder / "image.png").unlink()
    assert thumbnails.image("image.png") == first


@pytest.mark.parametrize("path", ["missing", "broken"])
def test_what_cannot_be_read_has_no_thumbnail(folder: Path, path: str) -> None:
    thumbnails = Thumbnails(folder, 16)
    assert thumbnails.image(f"{path}.png") is None
    assert thumbnails.frame(f"{path}.mp4", 0) is None
    assert thumbnails.frame("clip.mp4", 99) is None and thumbnails.frame("clip.mp4", -1) is None
