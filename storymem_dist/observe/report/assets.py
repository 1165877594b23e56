"""The files that a report refers to, linked relatively or put into the page itself, and its small pictures.

Knows files and their sizes; nothing of runs.
"""

import base64
import mimetypes
import os
from pathlib import Path
from urllib.parse import quote

from storymem_dist.errors import StoryMemError
from storymem_dist.observe.run.thumbnails import Thumbnails

MAX_EMBEDDED_MIB = 50
"""How much media one self-contained page may hold."""

POSTER_HEIGHT = 180
KEYFRAME_HEIGHT = 48


class Assets:
    """Addresses of a run's media as a page at ``page`` uses them.

    With ``embed`` every clip becomes part of the page; raises ``StoryMemError`` when they are larger than
    ``MAX_EMBEDDED_MIB`` together.
    """

    def __init__(self, root: Path, page: Path, *, embed: bool, media: list[str]) -> None:
        self._root = root.resolve()
        self._folder = page.resolve().parent
        self._embed = embed
        self._posters = Thumbnails(self._root, POSTER_HEIGHT)
        self._small = Thumbnails(self._root, KEYFRAME_HEIGHT * 2)
        if embed:
            size = sum((self._root / path).stat().st_size for path in media if (self._root / path).is_file()) / 2**20
            if size > MAX_EMBEDDED_MIB:
                raise StoryMemError(
                    f"--embed: the clips of {root} have {size:.0f} MiB, a page may hold {MAX_EMBEDDED_MIB}; "
                    "write the report without --embed and share it together with the run folder"
                )

    def media(self, path: str) -> str:
        """Address of a clip or image."""
        file = self._root / path
        if self._embed and file.is_file():
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        return quote(Path(os.path.relpath(file, self._folder)).as_posix())

    def poster(self, clip: str) -> str | None:
        """The first frame of a clip, as part of the page."""
        return _data_address(self._posters.frame(clip, 0))

    def keyframe(self, image: str | None) -> str | None:
        """A keyframe's thumbnail, as part of the page."""
        return _data_address(self._small.image(image)) if image else None


def _data_address(jpeg: bytes | None) -> str | None:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else None
