"""Reads the clips that a storyboard gives: frames upright, with square pixels, 8-bit RGB, at the rate of the job.

Opens containers of video alone, never playlists, which may name further files. Decodes frame by frame, with one thread,
so that the same file gives the same frames anywhere. Knows nothing of shots, and nothing of the size of a clip.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from storymem_dist.errors import StoryboardError
from storymem_dist.story.images import MAX_IMAGE_PIXELS

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "gif", "yuv4mpegpipe")
"""libavformat's names. "mov" reads MP4, too, and "matroska" WebM."""

MAX_FRAMES = 10_001
"""Most frames of a given clip at the rate of a job: ten minutes at 16 frames per second, as long as a rendered one."""

Note = Callable[[str], None]
"""Receives a phrase about what of a video is not used, or was changed."""

_CURE = "allowed: a video with a picture in MP4, MOV, MKV, WebM, AVI, MPEG or GIF; convert it to MP4 (H.264)"
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_ATTACHED_PICTURE = 1024  # a cover of a sound file
_HIGH_DYNAMIC_RANGE = (16, 18)  # transfer functions of ITU-T H.273: PQ and HLG
_HD_LINES = 720  # from this height on, colours that are not labelled are BT.709, else BT.601
_FALLBACK_RATE = Fraction(25)
_SHORTFALL_SECONDS = 0.25  # a video that ends this much before its declared end was cut off
_MAX_PIXEL_ASPECT = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFacts:
    """What a video is. ``width`` and ``height``: as it is seen, turned upright and with square pixels.

    ``rate``: frames per second on average. ``seconds``: the time that its frames cover. ``notes``: a phrase about each
    thing that is not used or is changed.
    """

    width: int
    height: int
    rate: float
    seconds: float
    codec: str
    pixel_format: str
    notes: tuple[str, ...]


def video_facts(path: Path) -> VideoFacts:
    """Return what the video is, after decoding its first frame and reading the rest without decoding it.

    Raises ``StoryboardError`` with the path and what is allowed where nothing can be decoded.
    """
    try:
        found = path.stat()
    except OSError:
        return _facts(path, ())  # raises
    return _facts(path, (found.st_size, found.st_mtime_ns, found.st_ino))


@lru_cache(maxsize=1024)
def _facts(path: Path, state: tuple[int, ...]) -> VideoFacts:
    """The facts of a file in this state: a job asks for them several times."""
    with _opened(path) as (container, stream):
        notes: list[str] = []
        if container.streams.audio:
            notes.append("its sound is not used")
        frame = next(_decoded(container, stream, notes.append), None)
        if frame is None:
            raise StoryboardError(f"nothing of the video {path} can be decoded ({stream.codec_context.name}); {_CURE}")
        if getattr(frame, "color_trc", None) in _HIGH_DYNAMIC_RANGE:
            notes.append("it has a high dynamic range; its colours are read without tone mapping")
        image = _as_rgb(frame, stream.sample_aspect_ratio, VideoReformatter())
        codec, pixel_format, rate = stream.codec_context.name, frame.format.name, _rate_of(stream)
        declared = _declared_seconds(container, stream)
    seconds = max(_covered(path), 1 / rate)
    if declared is not None and declared - seconds > max(Fraction(2) / rate, Fraction(_SHORTFALL_SECONDS)):
        notes.append(f"it is cut off: {float(seconds):.2f} s of {float(declared):.2f} s are there and used")
    return VideoFacts(
        width=image.shape[1],
        height=image.shape[0],
        rate=float(rate),
        seconds=float(seconds),
        codec=codec,
        pixel_format=pixel_format,
        notes=tuple(notes),
    )


def num_frames_at(facts: VideoFacts, fps: int) -> int:
    """Return about how many frames ``read_frames`` gives at ``fps``; exact for an undamaged video."""
    return max(1, round(facts.seconds * fps))


def read_frames(path: Path, fps: int, on_note: Note = lambda what: None) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the frames of a video at ``fps`` frames per second, uint8 ``[H, W, 3]``; sizes may change within a video.

    The frame that is shown in the middle of each interval of 1/``fps`` seconds; at least one. A repeated frame is the
    same array. Frames that are damaged are left out, and what follows an error is; ``on_note`` receives that. Raises
    ``StoryboardError`` where nothing can be decoded.
    """
    with _opened(path) as (container, stream):
        reformatter, aspect, step = VideoReformatter(), stream.sample_aspect_ratio, 1 / _rate_of(stream)
        shown: av.VideoFrame | None = None
        image: np.ndarray[Any, Any] | None = None
        number, start, time, end = 0, Fraction(0), Fraction(0), Fraction(0)
        for frame in _decoded(container, stream, on_note):
            at = _seconds(frame.pts, frame.time_base)
            if shown is None:
                start = time = at or Fraction(0)
            else:
                time = at if at is not None and at > time else time + step
                while Fraction(2 * number + 1, 2 * fps) < time - start:
                    image = _as_rgb(shown, aspect, reformatter) if image is None else image
                    yield image
                    number += 1
            shown, image = frame, None
            end = time - start + (_seconds(frame.duration, frame.time_base) or step)
        if shown is None:
            raise StoryboardError(f"nothing of the video {path} can be decoded ({stream.codec_context.name}); {_CURE}")
        image = _as_rgb(shown, aspect, reformatter)
        while number == 0 or Fraction(2 * number + 1, 2 * fps) < end:
            yield image
            number += 1


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first stream of pictures. Raises ``StoryboardError``."""
    if not path.is_file():
        raise StoryboardError(f"the video {path} {'is not a file' if path.exists() else 'does not exist'}; {_CURE}")
    if path.stat().st_size == 0:
        raise StoryboardError(f"the video {path} is empty (0 bytes); {_CURE}")
    try:
        with path.open("rb") as file:
            try:
                container = av.open(file, "r", container_options={"format_whitelist": ",".join(CONTAINERS)})
            except (av.FFmpegError, ValueError, UnicodeError) as error:
                raise StoryboardError(f"{path} is not a video that can be read; {_CURE}") from error
            with container:
                streams = [
                    stream
                    for stream in container.streams.video
                    if stream.codec_context is not None and not int(stream.disposition) & _ATTACHED_PICTURE
                ]
                if not streams:
                    what = "of a codec that is not known" if container.streams.video else "in it"
                    raise StoryboardError(f"the video {path} has no picture {what}; {_CURE}")
                size = streams[0].codec_context
                if size.width * size.height > MAX_IMAGE_PIXELS:
                    raise StoryboardError(
                        f"the video {path} has {size.width} x {size.height} pixels; allowed: at most"
                        f" {MAX_IMAGE_PIXELS // 10**6} megapixels"
                    )
                streams[0].codec_context.thread_count = 1
                yield container, streams[0]
    except OSError as error:
        raise StoryboardError(f"the video {path} cannot be read: {error.strerror or error}; {_CURE}") from error


def _decoded(container: Any, stream: Any, on_note: Note) -> Iterator[av.VideoFrame]:
    """The frames that can be decoded, in the order in which they are shown; without interlacing."""
    num_damaged, fields = 0, None
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, ValueError) as error:
            on_note(f"it is damaged, and what follows is not used ({' '.join(str(error).split())[:100]})")
            break
        if packet is None:
            break
        try:
            frames = packet.decode()
        except (av.FFmpegError, ValueError):
            num_damaged += 1
            continue
        for frame in frames:
            if frame.is_corrupt:
                num_damaged += 1
            elif fields is None and not frame.interlaced_frame:
                yield frame
            else:
                if fields is None:
                    on_note("it is interlaced; its fields are joined")
                    fields = _Fields()
                yield from fields.joined(frame)
    if fields is not None:
        yield from fields.joined(None)
    if num_damaged:
        on_note(f"{num_damaged} damaged frame{'s are' if num_damaged > 1 else ' is'} left out")


class _Fields:
    """Joins the fields of interlaced frames (libavfilter's bwdif); other frames pass unchanged."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._kind: tuple[int, int, str] | None = None

    def joined(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """The frames that are ready after ``frame``; None ends."""
        kind = None if frame is None else (frame.width, frame.height, frame.format.name)
        if self._graph is not None and kind != self._kind:
            self._graph.push(None)
            yield from self._pulled()
            self._graph = None
        if frame is None:
            return
        if self._graph is None:
            self._graph, self._kind = Graph(), kind
            source = self._graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            joined = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
            source.link_to(joined)
            joined.link_to(self._graph.add("buffersink"))
            self._graph.configure()
        self._graph.push(frame)
        yield from self._pulled()

    def _pulled(self) -> Iterator[av.VideoFrame]:
        assert self._graph is not None
        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            assert isinstance(frame, av.VideoFrame)
            yield frame


def _as_rgb(frame: av.VideoFrame, pixel_aspect: Fraction | None, reformatter: VideoReformatter) -> np.ndarray[Any, Any]:
    """The picture of a frame, uint8 ``[H, W, 3]``: upright, with square pixels, transparency over white."""
    width, height = frame.width, frame.height
    if pixel_aspect and pixel_aspect != 1 and 1 / _MAX_PIXEL_ASPECT <= pixel_aspect <= _MAX_PIXEL_ASPECT:
        if pixel_aspect > 1:
            width = round(width * pixel_aspect)
        else:
            height = round(height / pixel_aspect)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    known = {space.value for space in Colorspace}
    unlabelled = Colorspace.ITU709 if frame.height >= _HD_LINES else Colorspace.ITU601
    rgb = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=int(frame.colorspace) if int(frame.colorspace) in known else unlabelled,
        src_color_range=ColorRange.JPEG if int(frame.color_range) == ColorRange.JPEG else None,
        interpolation=_SCALING,
    ).to_ndarray()
    if has_alpha:
        alpha = rgb[..., 3:].astype(np.uint16)
        rgb = ((rgb[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns))


def _seconds(ticks: int | None, time_base: Fraction | None) -> Fraction | None:
    return None if ticks is None or time_base is None else ticks * Fraction(time_base)


def _rate_of(stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return Fraction(rate) if rate and 0 < rate <= 10_000 else _FALLBACK_RATE


def _declared_seconds(container: Any, stream: Any) -> Fraction | None:
    """How long the pictures are by the file's header; None where it says nothing."""
    if stream.duration and stream.time_base:
        return Fraction(stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None


def _covered(path: Path) -> Fraction:
    """Seconds that the frames of a video cover, from its packets alone."""
    with _opened(path) as (container, stream):
        step = 1 / _rate_of(stream)
        first = last = None
        num_packets = 0
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:  # those before the first frame that is shown
                    continue
                num_packets += 1
                time = _seconds(packet.pts, packet.time_base)
                if time is None:
                    continue
                end = time + (_seconds(packet.duration, packet.time_base) or step)
                first = time if first is None else min(first, time)
                last = end if last is None else max(last, end)
        except (av.FFmpegError, ValueError):
            pass  # the frames up to here count
    return num_packets * step if first is None or last is None else last - first
