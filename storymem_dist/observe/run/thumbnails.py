"""Small JPEGs of keyframes and clip frames of a run folder, for tables and reports.

What cannot be read (a clip that is not written yet, a folder that was cleaned up) is None: a missing thumbnail never
stops a table. Knows image and video files; nothing of events.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import av
from PIL import Image, UnidentifiedImageError

JPEG_QUALITY = 80


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
                with Image.open(self._run_folder / path) as image:
                    self._images[path] = self._shrink(image.convert("RGB"))
            except (OSError, UnidentifiedImageError, ValueError):
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
        last = max(wanted)
        try:
            with av.open(str(self._run_folder / clip)) as container:
                container.streams.video[0].thread_count = 1
                for index, frame in enumerate(container.decode(video=0)):
                    if index in wanted:
                        width = max(2, round(frame.width * self._height / frame.height))
                        small = frame.reformat(width=width, height=self._height, format="rgb24")
                        self._frames[(clip, index)] = self._shrink(Image.fromarray(small.to_ndarray()))
                    if index >= last:
                        return
        except (OSError, av.FFmpegError, IndexError):
            return

    def _shrink(self, image: Image.Image) -> bytes:
        if image.height != self._height:
            width = max(2, round(image.width * self._height / image.height))
            image = image.resize((width, self._height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()
