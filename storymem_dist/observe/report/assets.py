"""The files that a report refers to, linked relatively or put into the page itself, and its small pictures.

Only files inside the run folder are linked or read. Knows files and their sizes; nothing of runs.
"""

import base64
import os
from pathlib import Path
from urllib.parse import quote

from storymem_dist.artifacts.mp4 import is_mp4
from storymem_dist.errors import StoryMemError
from storymem_dist.files import read_limited, resolve_inside
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
            size = sum(place.stat().st_size for place in map(self._place, media) if place is not None) / 2**20
            if size > MAX_EMBEDDED_MIB:
                raise StoryMemError(
                    f"--embed: the clips of {root} have {size:.0f} MiB, a page may hold {MAX_EMBEDDED_MIB}; "
                    "write the report without --embed and share it together with the run folder"
                )

    def media(self, path: str) -> str | None:
        """Address of a clip; None when it is not there, not inside the run folder or not an MP4."""
        place = self._place(path)
        if place is None:
            return None
        if self._embed:
            data = read_limited(place, int(MAX_EMBEDDED_MIB * 2**20))
            return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        return quote(os.fsencode(os.path.relpath(self._root / path, self._folder)))

    def _place(self, path: str) -> Path | None:
        try:
            place = resolve_inside(self._root, path)
        except OSError:
            return None
        return place if is_mp4(place) else None

    def poster(self, clip: str) -> str | None:
        """The first frame of a clip, as part of the page."""
        return _data_address(self._posters.frame(clip, 0))

    def keyframe(self, image: str | None) -> str | None:
        """A keyframe's thumbnail, as part of the page."""
        return _data_address(self._small.image(image)) if image else None


def _data_address(jpeg: bytes | None) -> str | None:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else None
