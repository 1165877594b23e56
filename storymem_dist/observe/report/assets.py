"""The files that a report refers to, linked relatively or put into the page itself, and its small pictures.

Only files inside the run folder are linked or read. Knows files and their sizes; nothing of runs.
"""

import base64
import copy
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from storymem_dist.artifacts.mp4 import is_mp4
from storymem_dist.errors import StoryMemError
from storymem_dist.files import read_limited, resolve_inside
from storymem_dist.observe.run.thumbnails import Thumbnails
from storymem_dist.story.loading import story_id_from

MAX_EMBEDDED_MIB = 50
"""How much media one self-contained page may hold."""

MAX_THREADS = 4
"""Threads that make pictures. Each may hold one of the largest size that is read."""

POSTER_HEIGHT = 180
KEYFRAME_HEIGHT = 48


class Assets:
    """Addresses of a run's media, as a page uses them. ``base``: address of the run folder as seen from the page.

    With ``embed`` every clip becomes part of the page; without ``posters`` a clip has no picture before it is played.
    """

    def __init__(self, root: Path, base: str, *, embed: bool = False, posters: bool = True) -> None:
        self._root = root.resolve()
        self._base = base
        self._embed = embed
        self._has_posters = posters
        self._posters = Thumbnails(self._root, POSTER_HEIGHT)
        self._small = Thumbnails(self._root, KEYFRAME_HEIGHT * 2)

    @classmethod
    def of_page(cls, root: Path, page: Path, *, embed: bool = False, posters: bool = True) -> "Assets":
        """Assets of a page that is the file ``page``."""
        return cls(root, base_of(root, page), embed=embed, posters=posters)

    def with_base(self, base: str) -> "Assets":
        """The same assets, with the same thumbnails, for a page in another folder."""
        other = copy.copy(self)
        other._base = base
        return other

    def check_size(self, media: Iterable[str]) -> None:
        """Raise ``StoryMemError`` when ``media`` are larger than ``MAX_EMBEDDED_MIB`` together: too much to embed."""
        size = sum(place.stat().st_size for place in map(self._place, media) if place is not None) / 2**20
        if size > MAX_EMBEDDED_MIB:
            raise StoryMemError(
                f"--embed: the clips of {self._root} have {size:.0f} MiB, a page may hold {MAX_EMBEDDED_MIB}; "
                "write the report without --embed and share it together with the run folder"
            )

    def prepare(self, clips: Iterable[str], images: Iterable[str]) -> None:
        """Make the pictures of clips and keyframes that a page will ask for, several at a time."""
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            for made in (pool.map(self._place_and_poster, clips), pool.map(self._small.image, images)):
                for _ in made:  # raises what a thread raised
                    pass

    def media(self, path: str) -> str | None:
        """Address of a clip; None when it is not there, not inside the run folder or not an MP4."""
        place = self._place(path)
        if place is None:
            return None
        if self._embed:
            data = read_limited(place, int(MAX_EMBEDDED_MIB * 2**20))
            return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        return self._base + quote(os.fsencode(path))

    def _place(self, path: str) -> Path | None:
        try:
            place = resolve_inside(self._root, path)
        except OSError:
            return None
        return place if is_mp4(place) else None

    def _place_and_poster(self, clip: str) -> None:
        if self._place(clip) is not None:
            self._posters.frame(clip, 0)

    def poster(self, clip: str) -> str | None:
        """The first frame of a clip, as part of the page; None where there is none."""
        return _data_address(self._posters.frame(clip, 0)) if self._has_posters else None

    def keyframe(self, image: str | None) -> str | None:
        """A keyframe's thumbnail, as part of the page."""
        return _data_address(self._small.image(image)) if image else None


def base_of(root: Path, page: Path) -> str:
    """Return the address of the run folder ``root`` as the file ``page`` uses it."""
    base = quote(os.fsencode(os.path.relpath(root.resolve(), page.resolve().parent)))
    return "" if base == "." else f"{base}/"


def story_file(story_id: str) -> str:
    """Return the name of the file of a story's page. An id that no storyboard can have gets a name of its own."""
    if story_id_from(story_id) == story_id:
        return f"{story_id}.html"
    return f"~{hashlib.sha256(story_id.encode(errors='surrogatepass')).hexdigest()[:16]}.html"


def story_address(story_id: str, folder: str = "report") -> str:
    """Return the address of a story's page as the index uses it. ``folder``: the name of the folder of such pages."""
    return quote(os.fsencode(f"{folder}/{story_file(story_id)}"))


def _data_address(jpeg: bytes | None) -> str | None:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else None
