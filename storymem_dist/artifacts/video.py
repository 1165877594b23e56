"""Clips as MP4 files and frames as PNG files, with the same bytes every time.

Writes uint8 RGB frames with PyAV (no ffmpeg program needed), concatenates clips by copying packets, and reads both
back. The bytes depend on frames and settings alone: one encoder thread (x264's output depends on their number), no time
stamps, bit-exact scaling and muxing. Files appear by atomic rename.

Knows nothing of shots, stories or run folders. Legend: F = frames, C = 3 colours (RGB), H, W = pixels.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image
from torch import Tensor

from storymem_dist.artifacts.mp4 import MAX_PIXELS, open_mp4
from storymem_dist.errors import ConfigError, RunFolderError, require_between, require_one_of
from storymem_dist.files import UnsafePath, replacing

CODECS = ("libx264", "libvpx-vp9")
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
PIXEL_FORMATS = ("yuv420p", "yuv444p")
_MAX_CRF = {"libx264": 51, "libvpx-vp9": 63}

_MUXER_OPTIONS = {"fflags": "+bitexact", "movflags": "+faststart"}  # faststart: the index first, so players can stream
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_BT709 = 1  # code point of BT.709 for matrix, primaries and transfer (ITU-T H.273)


@dataclass(kw_only=True, slots=True)
class VideoSettings:
    """How clips are encoded. The defaults (H.264) play in every browser and player; VP9 plays in current browsers.

    ``crf``: constant quality, 0 (best) to 51 (H.264) or 63 (VP9). ``preset``: x264's names, from fast to small; for
    VP9 they set the corresponding speed. Fast by default, because the GPUs of a replica may wait for a save ("medium"
    takes 2.5 times as long for files of about the same size). ``pixel_format``: yuv420p plays everywhere,
    yuv444p keeps the full colour resolution but few browsers show it.
    """

    codec: str = "libx264"
    crf: int = 18
    preset: str = "veryfast"
    pixel_format: str = "yuv420p"

    def __post_init__(self) -> None:
        require_one_of("video.codec", self.codec, CODECS)
        require_one_of("video.preset", self.preset, PRESETS)
        require_one_of("video.pixel_format", self.pixel_format, PIXEL_FORMATS)
        require_between("video.crf", self.crf, 0, max(_MAX_CRF.values()))
        if self.crf > _MAX_CRF[self.codec]:
            raise ConfigError(
                f"video.crf={self.crf} is not allowed; for {self.codec} it must be between 0 (best) and "
                f"{_MAX_CRF[self.codec]}"
            )
        if self.codec not in av.codecs_available:
            present = ", ".join(codec for codec in CODECS if codec in av.codecs_available)
            raise ConfigError(f"video.codec={self.codec} is not in this build of PyAV, which has: {present}")


def write_clip(
    path: Path, frames_FCHW: Tensor, fps: int, settings: VideoSettings, check: Callable[[], None] = lambda: None
) -> None:
    """Encode uint8 RGB frames ``[F, 3, H, W]`` to an MP4 at ``fps`` frames per second; it appears by atomic rename.

    H and W must be multiples of 16 (no padding or cropping happens). ``check`` is called before every frame; an
    exception from it ends the writing. Raises ``ConfigError`` for other input and ``OSError`` when the file cannot be
    written.
    """
    check_clip(frames_FCHW)
    write_frames(path, frames_FCHW, (frames_FCHW.shape[2], frames_FCHW.shape[3]), fps, settings, check)


def write_frames(
    path: Path,
    frames_CHW: Iterable[Tensor],
    size: tuple[int, int],
    fps: int,
    settings: VideoSettings,
    check: Callable[[], None] = lambda: None,
) -> None:
    """The same for frames that come one by one, of the height and width ``size``; at least one."""
    try:
        _encode(path, frames_CHW, size, fps, settings, check)
    except av.FFmpegError as error:
        raise OSError(error.errno, f"the clip cannot be written: {error.strerror}", str(path)) from error


def _encode(
    path: Path,
    frames_CHW: Iterable[Tensor],
    size: tuple[int, int],
    fps: int,
    settings: VideoSettings,
    check: Callable[[], None],
) -> None:
    height, width = size
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options=_MUXER_OPTIONS) as container,
    ):
        stream = container.add_stream(settings.codec, rate=Fraction(fps), options=_encoder_options(settings))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, settings.pixel_format
        context = stream.codec_context
        context.thread_count = 1
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        reformatter = VideoReformatter()
        for index, frame_CHW in enumerate(frames_CHW):
            check()
            pixels = np.ascontiguousarray(frame_CHW.permute(1, 2, 0).cpu().numpy())
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(pixels, format="rgb24"),
                format=settings.pixel_format,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_SCALING,
            )
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def concat_clips(clips: Sequence[Path], path: Path) -> int:
    """Concatenate MP4 clips of one size, rate and encoding by copying their packets (nothing is encoded again).

    Returns the number of frames, which is exactly the sum of the clips'. Raises ``RunFolderError`` with the name of the
    first clip that differs from ``clips[0]`` or cannot be read, and ``ConfigError`` without clips.
    """
    if not clips:
        raise ConfigError("concat_clips was given no clips")
    first = _probe(clips[0])
    reorder_delay = 0  # frames by which decoding runs ahead of display (B-frames)
    for clip in clips:
        probed = _probe(clip)
        if probed.traits != first.traits:
            raise RunFolderError(
                f"{clip} cannot be concatenated with {clips[0]}: its size, rate or encoder settings differ; "
                "render both with the same settings"
            )
        reorder_delay = max(reorder_delay, probed.reorder_delay)
    num_frames = 0
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options=_MUXER_OPTIONS) as container,
    ):
        target = None
        for clip in clips:
            with open_mp4(clip) as source:
                stream = source.streams.video[0]
                target = target or container.add_stream_from_template(stream)
                packets = [packet for packet in source.demux(stream) if packet.size]
                for index, packet in enumerate(packets):
                    assert packet.pts is not None
                    packet.pts += num_frames * first.ticks_per_frame
                    packet.dts = (num_frames + index - reorder_delay) * first.ticks_per_frame
                    packet.stream = target
                    container.mux(packet)
                num_frames += len(packets)
    return num_frames


def read_clip(path: Path) -> Tensor:
    """Decode a whole clip to uint8 RGB ``[F, 3, H, W]``. Raises ``RunFolderError`` when it cannot be decoded."""
    reformatter = VideoReformatter()
    frames = []
    try:
        with open_mp4(path) as container:
            container.streams.video[0].thread_count = 1
            for frame in container.decode(video=0):
                rgb = reformatter.reformat(
                    frame, format="rgb24", src_colorspace=Colorspace.ITU709, interpolation=_SCALING
                )
                frames.append(torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise RunFolderError(f"{path} cannot be read as a video: {error}") from error
    return torch.stack(frames)


def count_frames(path: Path) -> int:
    """Count the frames of a clip without decoding it. Raises ``RunFolderError`` when it cannot be read."""
    try:
        with open_mp4(path) as container:
            return sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.FFmpegError, IndexError, OSError) as error:
        raise RunFolderError(f"{path} cannot be read as a video: {error}") from error


def write_png(path: Path, image_CHW: Tensor) -> None:
    """Write a uint8 RGB image ``[3, H, W]`` losslessly; it appears by atomic rename.

    Raises ``ConfigError`` for another dtype or shape, ``OSError`` when the file cannot be written.
    """
    if image_CHW.dtype != torch.uint8 or image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        raise ConfigError(f"an image must be uint8 [3, H, W], not {image_CHW.dtype} {list(image_CHW.shape)}")
    pixels = np.ascontiguousarray(image_CHW.permute(1, 2, 0).cpu().numpy())
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=6)


def read_png(source: Path | BinaryIO, *, name: Path | None = None) -> Tensor:
    """Read a PNG, from a file or from its bytes, as uint8 RGB ``[3, H, W]``.

    Raises ``RunFolderError`` (with ``name`` or the path) when it is no PNG, has more than ``MAX_PIXELS`` or cannot be
    decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; the limit below decides
            with Image.open(source, formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunFolderError(f"{name or source} cannot be read as a PNG image: {error}") from error


def check_clip(frames_FCHW: Tensor) -> None:
    """Raise ``ConfigError`` unless these frames can be saved."""
    shape = list(frames_FCHW.shape)
    if frames_FCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[0] < 1:
        raise ConfigError(f"a clip must be uint8 [F >= 1, 3, H, W], not {frames_FCHW.dtype} {shape}")
    if shape[2] % 16 or shape[3] % 16:
        raise ConfigError(f"a clip of {shape[3]}x{shape[2]} pixels cannot be saved; both must be multiples of 16")


def _encoder_options(settings: VideoSettings) -> dict[str, str]:
    """Encoder options for the chosen quality and reproducible bytes.

    One thread: the bytes depend on the number of threads. No macroblock tree in x264: with it, core 165 writes other
    bytes from run to run on processors with AVX-512 (30 runs of one 80-frame clip: 16 results; one with ``asm=0``, and
    one without the tree). Without it, files are about a third larger at the same ``crf``.
    """
    options = {"crf": str(settings.crf), "threads": "1"}
    if settings.codec == "libx264":
        parameters = "threads=1:lookahead_threads=1:sliced_threads=0:mbtree=0"
        return options | {"preset": settings.preset, "x264-params": parameters}
    speed = len(PRESETS) - 1 - PRESETS.index(settings.preset)  # libvpx: 8 is fastest, 0 smallest
    return options | {"b": "0", "deadline": "good", "cpu-used": str(speed), "row-mt": "0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Probed:
    """What ``concat_clips`` needs to know of a clip.

    ``traits``: everything that must be equal for packets of two clips to follow each other in one MP4.
    """

    traits: tuple[object, ...]
    ticks_per_frame: int
    reorder_delay: int


def _probe(clip: Path) -> _Probed:
    try:
        with open_mp4(clip) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            rate, time_base = stream.average_rate, stream.time_base
            if not rate or not time_base or (1 / (rate * time_base)).denominator != 1:
                raise RunFolderError(f"{clip} cannot be concatenated: its frames are not evenly spaced (rate {rate})")
            ticks = int(1 / (rate * time_base))
            packets = [packet for packet in container.demux(stream) if packet.size]
            delays = [index - (packet.pts or 0) // ticks for index, packet in enumerate(packets)]
            size = (context.width, context.height, context.pix_fmt)
            return _Probed(
                traits=(context.name, size, rate, time_base, context.extradata),
                ticks_per_frame=ticks,
                reorder_delay=max(delays, default=0),
            )
    except (av.FFmpegError, IndexError, UnsafePath) as error:
        raise RunFolderError(f"{clip} cannot be read as a video: {error}") from error
