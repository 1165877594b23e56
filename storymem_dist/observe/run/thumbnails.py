"""Small JPEGs of keyframes and clip frames of a run folder, for tables and reports.

What cannot be read (a clip that is not written yet, a folder that was cleaned up) or is not inside the folder is None:
a missing thumbnail never stops a table. Knows image and video files; nothing of events.
"""

import io
import time
from collections.abc import Iterable
from pathlib import Path

import av
from PIL import Image

from storymem_dist.artifacts.mp4 import MAX_PIXELS, open_mp4
from storymem_dist.errors import StoryboardError
from storymem_dist.files import resolve_inside
from storymem_dist.story.images import open_reference_image

JPEG_QUALITY = 80
MAX_ASPECT = 16
"""Widest thumbnail, in heights."""

MAX_SECONDS = 20.0
"""Longest time for the frames of one clip."""


class Thumbnails:
    """Makes and caches thumbnails, as JPEG bytes, ``height`` pixels high. Paths are relative to ``run_folder``."""

    def __init__(self, run_folder: Path, height: int) -> None:
        self._run_folder = run_folder
        self._height = height
        self._images: dict[str, bytes] = {}
        self._frames: dict[tuple[str, int], bytes] = {}

    def image(self, path: str) -> bytes | None:
        """Return the thumbnail of an image file, None if it cannot be read."""
        if path not in self._images:
            try:
                self._images[path] = self._shrink(open_reference_image(resolve_inside(self._run_folder, path)))
            except (OSError, ValueError, StoryboardError):
                return None
        return self._images[path]

    def frame(self, clip: str, index: int) -> bytes | None:
        """Return the thumbnail of frame ``index`` of a clip; call ``decode`` first for many frames of one clip."""
        if (clip, index) not in self._frames:
            self.decode(clip, [index])
        return self._frames.get((clip, index))

    def decode(self, clip: str, indices: Iterable[int]) -> None:
        """Read the given frames of a clip in one pass."""
        wanted = {index for index in indices if index >= 0 and (clip, index) not in self._frames}
        if not wanted:
            return
        last, deadline = max(wanted), time.monotonic() + MAX_SECONDS
        try:
            with open_mp4(resolve_inside(self._run_folder, clip)) as container:
                container.streams.video[0].thread_count = 1
                for index, frame in enumerate(container.decode(video=0)):
                    if frame.width * frame.height > MAX_PIXELS or time.monotonic() > deadline:
                        return
                    if index in wanted:
                        width = self._width(frame.width, frame.height)
                        small = frame.reformat(width=width, height=self._height, format="rgb24")
                        self._frames[(clip, index)] = self._shrink(Image.fromarray(small.to_ndarray()))
                    if index >= last:
                        return
        except (OSError, av.FFmpegError, IndexError, ValueError, MemoryError):
            return

    def _shrink(self, image: Image.Image) -> bytes:
        if image.height != self._height:
            width = self._width(image.width, image.height)
            image = image.resize((width, self._height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    def _width(self, width: int, height: int) -> int:
        return min(max(2, round(width * self._height / height)), MAX_ASPECT * self._height)
