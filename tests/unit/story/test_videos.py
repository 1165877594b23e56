from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from storymem_dist.errors import StoryboardError
from storymem_dist.story.videos import num_frames_at, read_frames, video_facts
from tests.helpers.videos import number_of, numbered_frames, write_video

EXACT = {"codec": "ffv1", "pixel_format": "bgr0"}


def numbers(path: Path, fps: int) -> list[int]:
    return [number_of(frame) for frame in read_frames(path, fps)]


def notes_of(path: Path, fps: int = 24) -> tuple[int, list[str]]:
    notes: list[str] = []
    return sum(1 for _ in read_frames(path, fps, notes.append)), notes


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mp4", "libx264", "yuv444p"),
        ("a.mov", "libx264rgb", "rgb24"),
        ("a.mp4", "libx264", "yuv422p10le"),
        ("a.mkv", "ffv1", "gray"),
        ("a.mkv", "ffv1", "yuv420p16le"),
        ("a.mkv", "ffv1", "gbrp12le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.mpg", "mpeg2video", "yuv420p"),
        ("a.mov", "qtrle", "argb"),
        ("a.gif", "gif", "rgb8"),
        ("a.y4m", "rawvideo", "yuv420p"),
    ],
)
def test_every_container_and_pixel_format_gives_the_same_picture(
    tmp_path: Path, name: str, codec: str, pixel_format: str
) -> None:
    container = "yuv4mpegpipe" if name.endswith("y4m") else None
    path = write_video(
        tmp_path / name, codec=codec, pixel_format=pixel_format, container=container, fps=25 if "mpg" in name else 24
    )
    facts = video_facts(path)
    assert (facts.width, facts.height) == (64, 48) and facts.notes == ()
    frames = list(read_frames(path, 16))
    assert len(frames) == num_frames_at(facts, 16) == 8
    red = (76, 76, 76) if pixel_format == "gray" else (255, 0, 0)
    for frame in frames:
        assert frame.dtype == np.uint8 and frame.shape == (48, 64, 3)
        assert np.abs(frame[4:16, 4:24].reshape(-1, 3).astype(int) - red).max() <= 12
    assert abs(int(frames[0][-4, -4].max()) - 0) <= 6 and number_of(frames[-1]) in (10, 11)


@pytest.mark.parametrize(
    ("source", "fps", "shown"),
    [
        (16, 16, [0, 1, 2, 3, 4, 5, 6, 7]),
        (24, 16, [0, 2, 3, 5, 6]),
        (32, 16, [1, 3, 5, 7]),
        (8, 16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (25, 16, [0, 2, 3, 5, 7]),
        (60, 16, [1, 5]),
    ],
)
def test_a_rate_is_changed_by_leaving_frames_out_or_showing_them_again(
    tmp_path: Path, source: int, fps: int, shown: list[int]
) -> None:
    path = write_video(tmp_path / "a.avi", 8, fps=source, **EXACT)
    assert numbers(path, fps) == shown
    assert num_frames_at(video_facts(path), fps) == len(shown)


def test_milliseconds_of_a_container_lose_no_frame_of_the_same_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 40, fps=16, **EXACT)
    assert numbers(path, 16) == list(range(40))


def test_a_variable_rate_shows_each_frame_as_long_as_it_lasts(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 4, fps=16, times=[0, 1, 6, 7], **EXACT)
    assert numbers(path, 16) == [0, 1, 1, 1, 1, 1, 2, 3]


def test_a_repeated_frame_is_the_same_array(tmp_path: Path) -> None:
    first, second, *_ = read_frames(write_video(tmp_path / "a.avi", 2, fps=8, **EXACT), 16)
    assert first is second


@pytest.mark.parametrize(("width", "height"), [(65, 47), (17, 33), (2, 2)])
def test_odd_sizes_and_one_frame(tmp_path: Path, width: int, height: int) -> None:
    path = write_video(tmp_path / "a.mkv", numbered_frames(1, width=width, height=height), **EXACT)
    (frame,) = read_frames(path, 16)
    assert frame.shape == (height, width, 3)
    assert num_frames_at(video_facts(path), 16) == 1


def test_a_phones_upright_video_is_turned(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", rotation=-90, pixel_format="yuv444p")
    frame = next(read_frames(path, 24))
    assert frame.shape == (64, 48, 3) and (video_facts(path).width, video_facts(path).height) == (48, 64)
    assert frame[4, -4, 0] > 240 and frame[4, 4, 0] < 10, "turned clockwise: the left upper quarter is at the right"


@pytest.mark.parametrize(("aspect", "size"), [(2, (48, 128)), (Fraction(1, 2), (96, 64))])
def test_pixels_become_square(tmp_path: Path, aspect: int | Fraction, size: tuple[int, int]) -> None:
    frame = next(read_frames(write_video(tmp_path / "a.mp4", pixel_aspect=aspect), 24))
    assert frame.shape[:2] == size


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[:, :32] = (255, 0, 0, 128)
    path = write_video(tmp_path / "a.mov", [picture] * 3, codec="qtrle", pixel_format="argb")
    frame = next(read_frames(path, 24))
    assert frame[5, 5].tolist() == [255, 127, 127] and frame[5, -5].tolist() == [255, 255, 255]


def test_the_fields_of_interlaced_frames_are_joined(tmp_path: Path) -> None:
    frames = []
    for number in range(8):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[::2, 8 * number :] = 255
        frame[1::2, min(63, 8 * number + 8) :] = 255  # the second field is taken later, when the edge has moved
        frames.append(frame)
    path = write_video(tmp_path / "a.mp4", frames, interlaced=True, options={"crf": "1"})
    assert video_facts(path).notes == ("it is interlaced; its fields are joined",)
    joined = list(read_frames(path, 24))
    assert len(joined) == 8

    def combing(frame: np.ndarray[Any, Any]) -> float:
        rows = frame[..., 0].astype(float)
        return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())

    assert combing(joined[3]) < combing(frames[3]) / 4


def test_sound_is_said_to_be_unused(tmp_path: Path) -> None:
    assert video_facts(write_video(tmp_path / "a.mp4", sound=True)).notes == ("its sound is not used",)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.mp4", "libx264", {"movflags": "+faststart"}), ("a.mkv", "libx264", {}), ("a.avi", "mpeg4", {})],
)
def test_what_there_is_of_a_truncated_video_is_used_and_said(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    frames = [np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8) for number in range(48)]
    whole = write_video(tmp_path / name, frames, codec=codec, container_options=options).read_bytes()
    path = tmp_path / f"cut_{name}"
    path.write_bytes(whole[: len(whole) * 6 // 10])
    facts = video_facts(path)
    assert 0.8 < facts.seconds < 1.4 and any("cut off" in note for note in facts.notes), facts
    assert abs(notes_of(path)[0] - num_frames_at(facts, 24)) <= 1


def test_damaged_frames_in_the_middle_are_left_out_and_the_length_stays(tmp_path: Path) -> None:
    frames = [np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8) for number in range(24)]
    path = write_video(tmp_path / "a.mp4", frames)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    count, notes = notes_of(path)
    assert count == 24 and any("left out" in note for note in notes), notes


def sound_alone(path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 44_100, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def cut_at_the_start(path: Path) -> None:
    whole = write_video(path, container_options={"movflags": "+faststart"}).read_bytes()
    path.write_bytes(whole[: whole.index(b"mdat") + 8])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"hello world " * 200), "is not a video that can be read"),
        (lambda path: Image.new("RGB", (64, 48)).save(path, format="PNG"), "is not a video that can be read"),
        (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "is not a video that can be read"),
        (sound_alone, "has no picture in it"),
        (cut_at_the_start, "can be decoded"),
    ],
)
def test_what_is_no_video_is_refused_in_one_sentence_with_the_file_and_a_cure(
    tmp_path: Path, make: Any, said: str
) -> None:
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(StoryboardError) as caught:
        video_facts(path)
    message = str(caught.value)
    assert said in message and str(path) in message and "convert it to MP4" in message and "\n" not in message
    with pytest.raises(StoryboardError):
        list(read_frames(path, 16))


def test_the_same_file_gives_the_same_frames_every_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24, sound=True)
    for one, other in zip(read_frames(path, 10), read_frames(path, 10), strict=True):
        assert np.array_equal(one, other)
