import itertools
import os
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from storymem_dist.artifacts.video import (
    CODECS,
    VideoSettings,
    concat_clips,
    count_frames,
    read_clip,
    read_png,
    write_clip,
    write_png,
)
from storymem_dist.errors import ConfigError, RunFolderError


def moving_clip(num_frames: int, height: int = 64, width: int = 96, shift: int = 0) -> Tensor:
    """Smooth gradients that move: easy to compress, and every frame differs."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = [
        torch.stack([x + 3 * i + shift, 2 * y + i, 128 + 0 * x]).clamp(0, 255).to(torch.uint8)
        for i in range(num_frames)
    ]
    return torch.stack(frames)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_frames", [1, 5, 76, 81])
def test_a_clip_comes_back_with_all_its_frames_and_nearly_its_pixels(
    tmp_path: Path, codec: str, num_frames: int
) -> None:
    clip = moving_clip(num_frames)
    write_clip(tmp_path / "clip.mp4", clip, 16, VideoSettings(codec=codec, crf=10, preset="veryfast"))
    read = read_clip(tmp_path / "clip.mp4")
    assert read.shape == clip.shape and read.dtype == torch.uint8
    assert (read.float() - clip.float()).abs().mean() < 4
    assert count_frames(tmp_path / "clip.mp4") == num_frames


def test_pure_colours_keep_their_hue_in_the_players_matrix(tmp_path: Path) -> None:
    """A red written with another matrix than the file declares would come back orange in browsers."""
    red = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    write_clip(tmp_path / "clip.mp4", red, 16, VideoSettings(crf=1))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)  # BT.709, limited range
        luma = int(frame.to_ndarray()[0, 0])
    assert abs(luma - 63) <= 1  # 16 + 219 * 0.2126; with BT.601 it would be 81
    assert (read_clip(tmp_path / "clip.mp4").float() - red.float()).abs().max() <= 4


def test_the_file_has_16_frames_per_second_h264_yuv420p_and_its_index_first(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", moving_clip(81), 16, VideoSettings())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.duration * stream.time_base) == pytest.approx(81 / 16)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_frames_give_the_same_bytes_again_and_again(tmp_path: Path, codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 32, (40, 3, 64, 96), generator=generator).byte()
    clip = (moving_clip(40) ^ noise)[: 40 if codec == "libx264" else 8]
    seen = set()
    for number in range(12 if codec == "libx264" else 4):
        path = tmp_path / f"{number}.mp4"
        write_clip(path, clip, 16, VideoSettings(codec=codec))
        seen.add(path.read_bytes())
    assert len(seen) == 1


def test_a_process_that_may_use_one_core_only_gives_the_same_bytes(tmp_path: Path) -> None:
    clip = moving_clip(33)
    write_clip(tmp_path / "here.mp4", clip, 16, VideoSettings())
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        write_clip(tmp_path / "there.mp4", clip, 16, VideoSettings())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "here.mp4").read_bytes() == (tmp_path / "there.mp4").read_bytes()


@pytest.mark.parametrize("codec", CODECS)
def test_concatenated_clips_hold_exactly_the_frames_of_their_parts(tmp_path: Path, codec: str) -> None:
    lengths, paths = [81, 1, 80, 5, 76], []
    for number, length in enumerate(lengths):
        paths.append(tmp_path / f"{number}.mp4")
        write_clip(paths[-1], moving_clip(length, shift=20 * number), 16, VideoSettings(codec=codec, preset="fast"))
    assert concat_clips(paths, tmp_path / "story.mp4") == sum(lengths)
    whole = read_clip(tmp_path / "story.mp4")
    assert torch.equal(whole, torch.cat([read_clip(path) for path in paths]))
    with av.open(str(tmp_path / "story.mp4")) as container:
        stream = container.streams.video[0]
        ticks = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        steps = {after - before for before, after in itertools.pairwise(ticks)}
        assert ticks[0] == 0 and len(steps) == 1, "frames are evenly spaced across the seams"
        assert float(stream.duration * stream.time_base) == pytest.approx(sum(lengths) / 16)


def test_concatenating_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", moving_clip(9), 16, VideoSettings())
    write_clip(tmp_path / "b.mp4", moving_clip(5), 16, VideoSettings())
    both = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    concat_clips(both, tmp_path / "one.mp4")
    concat_clips(both, tmp_path / "two.mp4")
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


@pytest.mark.parametrize("other", [{"size": (64, 64)}, {"fps": 24}, {"settings": VideoSettings(crf=40)}])
def test_clips_that_do_not_match_are_refused_by_name(tmp_path: Path, other: dict[str, object]) -> None:
    height, width = other.get("size", (64, 96))
    write_clip(tmp_path / "a.mp4", moving_clip(5), 16, VideoSettings())
    clip = moving_clip(5, height, width)
    write_clip(tmp_path / "b.mp4", clip, other.get("fps", 16), other.get("settings", VideoSettings()))
    with pytest.raises(RunFolderError, match=r"b\.mp4 cannot be concatenated"):
        concat_clips([tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "story.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"], "nothing half-made is left"


def test_what_is_not_a_video_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    for read in (read_clip, count_frames, lambda path: concat_clips([path], tmp_path / "story.mp4")):
        with pytest.raises(RunFolderError, match=r"bad\.mp4 cannot be read as a video"):
            read(tmp_path / "bad.mp4")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 3, 60, 96, dtype=torch.uint8), "96x60.*multiples of 16"),
        (torch.zeros(2, 3, 64, 96), "uint8"),
        (torch.zeros(2, 64, 96, dtype=torch.uint8), "uint8"),
        (torch.zeros(0, 3, 64, 96, dtype=torch.uint8), "F >= 1"),
    ],
)
def test_frames_that_cannot_be_saved_are_refused(tmp_path: Path, frames: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_clip(tmp_path / "clip.mp4", frames, 16, VideoSettings())
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_cannot_be_written_raises_an_os_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"clip\.mp4"):
        write_clip(tmp_path / "absent" / "clip.mp4", moving_clip(1), 16, VideoSettings())


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("codec", "mpeg1", r"video\.codec='mpeg1'.*libx264"),
        ("crf", 52, r"video\.crf=52.*51"),
        ("crf", -1, r"video\.crf=-1"),
        ("preset", "instant", r"video\.preset"),
        ("pixel_format", "rgb24", r"video\.pixel_format"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path(setting: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VideoSettings(**{setting: value})


def test_png_images_come_back_bit_for_bit(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 33, 47), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    write_png(tmp_path / "a.png", image)
    assert torch.equal(read_png(tmp_path / "a.png"), image)


def test_a_broken_png_is_refused_by_name(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(RunFolderError, match=r"a\.png cannot be read"):
        read_png(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="uint8"):
        write_png(tmp_path / "b.png", torch.zeros(3, 8, 8))
