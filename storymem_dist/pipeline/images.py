"""Pictures and clips as other programs have them, and as this package has them.

Legend: B batch, C channels (3, RGB), F frames, H height, W width.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storymem_dist.artifacts.video import VideoSettings, write_frames
from storymem_dist.errors import ConfigError, require_whole

MAX_FPS = 1000

ImageLike = Tensor | np.ndarray | Image.Image
"""An image: a PIL image, a uint8 array ``[H, W, 3]``, a uint8 tensor ``[3, H, W]``, or a float tensor in [-1, 1]."""

FramesLike = Tensor | np.ndarray | Image.Image | Sequence["FramesLike"]
"""A clip or pictures for ``to_frames``."""


def to_image_tensor(image: ImageLike) -> Tensor:
    """Convert any accepted image to uint8 ``[3, H, W]``. Raises ``ConfigError`` for another shape or dtype."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            return torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
    elif isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        if image.dtype == torch.uint8:
            return image.cpu()
        if image.is_floating_point():
            return image.cpu().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    shape = getattr(image, "shape", None)
    raise ConfigError(
        f"an image is a {type(image).__name__} of shape {None if shape is None else list(shape)} and dtype "
        f"{getattr(image, 'dtype', None)}; allowed: a PIL image, a uint8 array [H, W, 3], a uint8 tensor [3, H, W] "
        "or a float tensor [3, H, W] in [-1, 1]"
    )


def storymem_to_comfyui(video_BCFHW: Tensor) -> Tensor:
    """Convert ``[B, C, F, H, W]`` in [-1, 1] to ComfyUI's ``[B, F, H, W, C]`` in [0, 1], float32, clamped."""
    _require_video(video_BCFHW, channel_dim=1, layout="[B, 3, F, H, W]")
    return video_BCFHW.float().add(1).div(2).clamp(0, 1).permute(0, 2, 3, 4, 1).contiguous()


def comfyui_to_storymem(video_BFHWC: Tensor) -> Tensor:
    """Convert ComfyUI's ``[B, F, H, W, C]`` in [0, 1] to ``[B, C, F, H, W]`` in [-1, 1], float32, clamped."""
    _require_video(video_BFHWC, channel_dim=4, layout="[B, F, H, W, 3]")
    return video_BFHWC.float().clamp(0, 1).mul(2).sub(1).permute(0, 4, 1, 2, 3).contiguous()


def _require_video(video: Tensor, *, channel_dim: int, layout: str) -> None:
    if video.ndim != 5 or video.shape[channel_dim] != 3:
        raise ConfigError(f"a video of shape {list(video.shape)} was given; allowed: {layout}")


def to_frames(video: FramesLike) -> Tensor:
    """Convert a clip or pictures of one size to uint8 ``[F, H, W, 3]`` on the CPU.

    Accepted are uint8 in 0 to 255 or floats in [0, 1], as arrays or tensors ``[F, H, W, 3]`` (ComfyUI's IMAGE),
    ``[1, F, H, W, 3]`` or ``[H, W, 3]``; a fourth channel is left out. Also PIL images, and lists of all these. One
    frame at a time is held as floats. Raises ``ConfigError`` for anything else.
    """
    return torch.stack(_frames_of(video)) if isinstance(video, list | tuple) else _as_frames(video)


def to_pictures(images: FramesLike) -> list[Tensor]:
    """The same for pictures of any sizes: uint8 ``[H, W, 3]`` each."""
    return _frames_of(images) if isinstance(images, list | tuple) else list(_as_frames(images))


def frames_to_images(frames_FHWC: Tensor) -> Tensor:
    """Convert uint8 ``[F, H, W, 3]`` to ComfyUI's IMAGE: float32 in [0, 1], of the same shape, in one allocation."""
    return torch.empty(frames_FHWC.shape, dtype=torch.float32, device="cpu").copy_(frames_FHWC).div_(255)


def _frames_of(many: Sequence[FramesLike]) -> list[Tensor]:
    frames = [frame for one in many for frame in to_pictures(one)]
    if not frames:
        raise ConfigError("a list of no images was given; at least one is needed")
    return frames


def _as_frames(video: object) -> Tensor:
    if isinstance(video, Image.Image):
        video = np.array(video.convert("RGB"))
    given = torch.from_numpy(video) if isinstance(video, np.ndarray) and video.dtype != object else video
    if isinstance(given, Tensor):
        frames = given[0] if given.ndim == 5 and given.shape[0] == 1 else given
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.ndim == 4 and len(frames) and frames.shape[3] in (3, 4) and min(frames.shape) > 0:
            frames = frames[..., :3]
            if frames.dtype == torch.uint8:
                return frames.detach().cpu().contiguous()
            if frames.is_floating_point():
                found = torch.empty(frames.shape, dtype=torch.uint8, device="cpu")
                for index, frame in enumerate(frames.detach()):
                    own = frame.to("cpu", torch.float32, copy=True)  # changed in place: the caller keeps its pixels
                    found[index] = own.nan_to_num_(0.0).clamp_(0, 1).mul_(255).round_()
                return found
    shape = getattr(video, "shape", None)
    raise ConfigError(
        f"a video is a {type(video).__name__} of shape {None if shape is None else list(shape)} and dtype "
        f"{getattr(video, 'dtype', None)}; allowed: [F, H, W, 3] in uint8, or in floats from 0 to 1; or PIL images"
    )


def save_video(video: FramesLike | Iterable[FramesLike], path: str | Path, fps: int = 16) -> Path:
    """Write a clip, or several of one size one after the other, to an MP4 as ``storymem-render`` writes its clips.

    ``video`` is what ``to_frames`` takes, or an iterable of such clips, of which one at a time is held. Width and
    height must be even. Raises ``ConfigError`` for other input, and ``OSError`` when the file cannot be written.
    """
    require_whole("fps", fps, 1, MAX_FPS)
    is_several = isinstance(video, Iterable) and not isinstance(video, Tensor | np.ndarray | str)
    clips = (to_frames(clip) for clip in (video if is_several else [video]))  # type: ignore[union-attr, arg-type]
    first = next(clips, None)
    if first is None:
        raise ConfigError("no clip was given; at least one is needed")
    height, width = size = (first.shape[1], first.shape[2])
    if height % 2 or width % 2:
        raise ConfigError(f"a clip of {width}x{height} pixels cannot be saved; width and height must be even")

    def frames() -> Iterator[Tensor]:
        for clip in chain([first], clips):
            if (clip.shape[1], clip.shape[2]) != size:
                raise ConfigError(
                    f"a clip of {clip.shape[2]}x{clip.shape[1]} pixels cannot follow one of {width}x{height}; "
                    "all clips of a video have one size"
                )
            yield from clip.permute(0, 3, 1, 2)

    write_frames(Path(path), frames(), size, fps, VideoSettings())
    return Path(path)
