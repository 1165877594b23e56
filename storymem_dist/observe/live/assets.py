"""The media of a run folder as a served page refers to them, and which files of the folder are served at all.

Served are clips and pictures of stories: regular files inside ``stories/`` that are what their names say. Everything
else in a run folder (settings, events, records, checkpoints) is not.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from storymem_dist.files import UnsafePath, open_regular, resolve_inside
from storymem_dist.observe.report.assets import KEYFRAME_HEIGHT, POSTER_HEIGHT, Assets
from storymem_dist.observe.run.thumbnails import Thumbnails

MEDIA = "media/"
POSTERS = "poster/"
THUMBNAILS = "thumbnail/"

_KINDS = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}
_BEGINNINGS = {".mp4": (4, b"ftyp"), ".png": (0, b"\x89PNG\r\n\x1a\n"), ".jpg": (0, b"\xff\xd8\xff")}


def find_media(root: Path, path: str) -> tuple[Path, str]:
    """Return where the clip or picture ``path`` of the run folder ``root`` is, and its media type.

    Raises ``OSError``: nothing is there, it leads out (``UnsafePath``), or it is nothing that a report shows.
    """
    place = resolve_inside(root, path)
    inside = place.relative_to(os.path.realpath(root))
    kind = _KINDS.get(place.suffix)
    if kind is None or inside.parts[0] != "stories" or any(part.startswith(".") for part in inside.parts):
        raise UnsafePath(f"{path!r} is no clip or picture of a story")
    with open_regular(place) as file:
        _check_beginning(file, place)
    return place, kind


def open_media(root: Path, path: str) -> tuple[BinaryIO, str]:
    """Open what ``find_media`` finds, and return its media type. Nobody can exchange it for something outside.

    Raises ``OSError`` as ``find_media`` does.
    """
    place, kind = find_media(root, path)
    base = Path(os.path.realpath(root))
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in place.relative_to(base).parts:  # a link at any of them was put there since
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            below = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnsafePath(f"{path!r} is not a regular file")
        file = os.fdopen(os.dup(descriptor), "rb")
    finally:
        os.close(descriptor)
    try:
        _check_beginning(file, place)
    except OSError:
        file.close()
        raise
    return file, kind


def _check_beginning(file: BinaryIO, place: Path) -> None:
    start, expected = _BEGINNINGS[place.suffix]
    if file.read(start + len(expected))[start:] != expected:
        raise UnsafePath(f"{place} is not what its name says")


def is_immutable(path: str) -> bool:
    """Whether the file ``path`` never changes: attempts are written once, under names that are never used again."""
    return "attempts" in Path(path).parts


def poster(root: Path, clip: str) -> bytes | None:
    """Return the first frame of a clip as a small JPEG; None where it cannot be read."""
    return Thumbnails(root, POSTER_HEIGHT).frame(clip, 0)


def thumbnail(root: Path, image: str) -> bytes | None:
    """Return a picture as a small JPEG; None where it cannot be read."""
    return Thumbnails(root, KEYFRAME_HEIGHT * 2).image(image)


class LiveAssets(Assets):
    """Addresses of a run's media, as a page uses them. Pictures are fetched when they are seen."""

    def __init__(self, root: Path, base: str = "") -> None:
        super().__init__(root, base)
        self._found: set[str] = set()

    def media(self, path: str) -> str | None:
        """See ``Assets.media``."""
        return self._address(MEDIA, path)

    def poster(self, clip: str) -> str | None:
        """See ``Assets.poster``."""
        return self._address(POSTERS, clip)

    def keyframe(self, image: str | None) -> str | None:
        """See ``Assets.keyframe``."""
        return self._address(THUMBNAILS, image) if image else None

    def _address(self, kind: str, path: str) -> str | None:
        if path not in self._found:
            try:
                find_media(self._root, path)
            except OSError:
                return None
            if is_immutable(path):
                self._found.add(path)
        return f"{self._base}{kind}{quote(os.fsencode(path))}"
