"""Writes small videos of any container, codec, rate and pixel format."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

_INTERLACED = 0x40000 | 0x20000000  # AV_CODEC_FLAG_INTERLACED_DCT, _ME


def numbered_frames(count: int, *, width: int = 64, height: int = 48) -> list[np.ndarray[Any, Any]]:
    """RGB frames whose left upper quarter is red; the rest is grey, brighter by 5 levels with every frame."""
    frames = []
    for number in range(count):
        frame = np.full((height, width, 3), (5 * number) % 250, np.uint8)
        frame[: height // 2, : width // 2] = (255, 0, 0)
        frames.append(frame)
    return frames


def number_of(image: np.ndarray[Any, Any]) -> int:
    """Which of ``numbered_frames`` an image is, by its right lower corner."""
    return round(float(image[-4:, -4:].mean()) / 5)


def write_video(
    path: Path,
    frames: Sequence[np.ndarray[Any, Any]] | int = 12,
    *,
    fps: int = 24,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    container: str | None = None,
    times: Sequence[int] | None = None,
    rotation: int | None = None,
    pixel_aspect: int | Fraction | None = None,
    interlaced: bool = False,
    sound: bool = False,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """Write ``frames`` (or that many ``numbered_frames``); ``times``: when each is shown, in units of 1 / ``fps``."""
    pictures = numbered_frames(frames) if isinstance(frames, int) else frames
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w", format=container, options=dict(container_options or {})) as output:
        stream: Any = output.add_stream(codec, rate=Fraction(fps), options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if interlaced:
            stream.codec_context.flags |= _INTERLACED
        audio: Any = output.add_stream("aac", rate=44_100) if sound else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            silence.sample_rate, silence.pts = 44_100, 0
            output.mux(audio.encode(silence))
            output.mux(audio.encode(None))
    return path
