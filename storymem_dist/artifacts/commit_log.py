"""What was committed, by name: so each replica learns it from a listing, not from a look at every shot.

    cache/commits/<number>/<key>          an empty file; a folder holds about a thousand

Who commits a shot, or finds one that is committed, notes its key. Others list the newest folder, and the one before it
for those who wrote late. A note is a hint: the record alone counts. One that is missing costs others a look at the
record; one whose record was removed is found when the shot is checked or needed. Nobody removes notes; the folder can
be removed. Knows names, not shots.
"""

import contextlib
import os
from pathlib import Path

from storymem_dist.files import names_in

_NOTES_PER_FOLDER = 1000


class CommitLog:
    """One process's view of the notes in ``folder``. Any thread may call ``note``. Touches no file before a call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._known: set[str] = set()

    def note(self, key: str) -> None:
        """Note that ``key`` is committed, unless that is known. Never raises: a note that is missing costs time."""
        if key in self._known:
            return
        self._known.add(key)
        path = self._path(self._number) / key
        with contextlib.suppress(OSError):
            try:
                _create(path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                _create(path)

    def was_noted(self, key: str) -> bool:
        """Whether ``key`` was noted by this process, or by others before the last ``read_new``."""
        return key in self._known

    def read_new(self) -> set[str]:
        """Return the keys that others have noted since the last call. Raises ``OSError``."""
        new: set[str] = set()
        if self._number:
            new.update(names_in(self._path(self._number - 1)))
        while True:
            names = names_in(self._path(self._number))
            new.update(names)
            if len(names) < _NOTES_PER_FOLDER:
                break
            self._number += 1
        new -= self._known
        self._known |= new
        return new

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04d}"


def _create(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
