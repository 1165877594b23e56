"""The pictures and clips that a storyboard gives, as pixels of the size and rate of a job's clips."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from storymem_dist.diffusion.conditioning import cover_crop, cover_size
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ShotError
from storymem_dist.story.images import open_reference_image
from storymem_dist.story.videos import MAX_FRAMES, num_frames_at, read_frames, video_facts


def given_image(path: Path, sampler: SamplerSettings) -> Tensor:
    """Return a picture, uint8 ``[3, H, W]``, scaled to cover the clip's size and cut to it.

    Raises ``StoryboardError`` when it cannot be read.
    """
    image_CHW = torch.from_numpy(np.array(open_reference_image(path))).permute(2, 0, 1).contiguous()
    return cover_crop(image_CHW, sampler.height, sampler.width)


class ClipReader:
    """Reads a given clip, a part at a time: each frame scaled and cut as a picture is, at the rate of the job.

    Opens the file at the first part. ``notes`` has a phrase about each thing that is not used.
    """

    def __init__(self, path: Path, sampler: SamplerSettings) -> None:
        self.notes: list[str] = []
        self._path = path
        self._sampler = sampler
        self._frames: Iterator[Tensor] | None = None
        self._clip = torch.empty(0, 3, sampler.height, sampler.width, dtype=torch.uint8)
        self._more: list[Tensor] = []
        self._num_read = 0

    def read_part(self, seconds: float = 1.0) -> bool:
        """Read for about ``seconds``; return whether that was the end.

        Raises ``StoryboardError`` when the clip cannot be read, and ``ShotError`` when it is longer than
        ``MAX_FRAMES``.
        """
        if self._frames is None:
            expected = min(num_frames_at(video_facts(self._path), self._sampler.fps), MAX_FRAMES)
            self._clip = torch.empty(expected, *self._clip.shape[1:], dtype=torch.uint8)
            self._frames = self._fitted_frames()
        end = time.monotonic() + seconds
        for frame in self._frames:
            if self._num_read < len(self._clip):
                self._clip[self._num_read] = frame
            else:
                self._more.append(frame)
            self._num_read += 1
            if time.monotonic() > end:
                return False
        return True

    @property
    def clip(self) -> Tensor:
        """What was read, uint8 ``[F, 3, H, W]``."""
        return torch.cat([self._clip, torch.stack(self._more)]) if self._more else self._clip[: self._num_read]

    def _fitted_frames(self) -> Iterator[Tensor]:
        source, fitted = None, None
        for number, image in enumerate(read_frames(self._path, self._sampler.fps, self.notes.append)):
            if number == MAX_FRAMES:
                raise ShotError(
                    f"the clip {self._path} has more than {MAX_FRAMES:,} frames at {self._sampler.fps} frames per"
                    " second; cut it into several shots"
                )
            if fitted is None or image is not source:
                source, fitted = image, _fitted(image, self._sampler)
            yield fitted


def _fitted(image_HWC: np.ndarray[Any, Any], sampler: SamplerSettings) -> Tensor:
    """As ``cover_crop`` in 8 bits, so about ten times as fast; a value may differ from it by two levels."""
    image_CHW, height, width = torch.from_numpy(image_HWC).permute(2, 0, 1), sampler.height, sampler.width
    size = cover_size(image_HWC.shape[0], image_HWC.shape[1], height, width)
    if size != image_HWC.shape[:2]:
        image_CHW = F.interpolate(image_CHW[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image_CHW[:, top : top + height, left : left + width]
