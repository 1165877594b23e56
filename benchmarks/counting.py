"""Counts the operations on a folder's names that this process asks of its file system, by kind.

Counted under one folder: ``open`` (of a file, creating it or not), ``stat`` (``lstat``, and every test whether there is
something), ``list`` (one per 1,000 names that a folder holds, at least one: about what one READDIR of NFS returns),
``link``, ``rename``, ``unlink`` (``rmdir`` among them), ``mkdir`` and ``fsync``. Not counted: reading, writing, closing
and asking about an open file, and what C libraries open by themselves (ffmpeg opens each clip that it writes or joins).
A run of five shots gave the counts of ``strace`` for every kind, but for those clips.

It listens to the audit events of the interpreter (PEP 578) where there is one, and patches ``os`` where there is none
(stat, lstat, fsync), so any Python code is counted, whichever way it came to the file.
"""

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

KINDS = ("open", "stat", "list", "link", "rename", "unlink", "mkdir", "fsync")
NAMES_PER_LIST = 1000

_EVENTS = {
    "open": "open",
    "os.listdir": "list",
    "os.scandir": "list",
    "os.link": "link",
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.rmdir": "unlink",
    "os.mkdir": "mkdir",
}


class Operations:
    """The operations counted so far. Any thread is counted, except inside ``paused`` (for the whole process)."""

    def __init__(self, root: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._root = str(root.resolve())
        self._active = True
        self._lock = threading.RLock()
        self._asking = threading.local()

    @property
    def total(self) -> int:
        """All operations."""
        return self.counts.total()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count while the body runs."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def take(self) -> Counter[str]:
        """Return the counts and start again at zero."""
        counts, self.counts = self.counts, Counter()
        return counts

    def note(self, kind: str, target: object) -> None:
        """Count one operation if it is of the folder."""
        if not self._active or getattr(self._asking, "now", False):
            return
        try:
            if isinstance(target, int):
                path = str(Path(f"/proc/self/fd/{target}").readlink())
            elif isinstance(target, str | bytes | os.PathLike):
                path = os.fsdecode(target)
            else:
                return
        except OSError:
            return
        inside = path == self._root or path.startswith(self._root + "/")
        if inside or not path.startswith("/"):  # a relative name is one in an open folder: rmtree
            number = self._num_lists(path) if kind == "list" else 1
            with self._lock:
                self.counts[kind] += number

    def _num_lists(self, path: str) -> int:
        self._asking.now = True
        try:
            return max(1, -(-sum(1 for _ in Path(path).iterdir()) // NAMES_PER_LIST))
        except OSError:
            return 1
        finally:
            self._asking.now = False


_counting: list[Operations] = []
_is_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _counting and event in _EVENTS and arguments:
        if event == "open" and isinstance(arguments[0], int):
            return  # a Python file for what is open already
        for operations in _counting:
            operations.note(_EVENTS[event], arguments[0])


@contextmanager
def counting(root: Path) -> Iterator[Operations]:
    """Count the operations on names under ``root`` while the body runs."""
    global _is_listening
    if not _is_listening:
        _is_listening = True
        sys.addaudithook(_listen)  # for good: it does nothing while nobody counts
    operations = Operations(root)

    def noting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            operations.note(kind, target)
            return function(target, *arguments, **options)

        return call

    with (
        patch.object(os, "stat", noting("stat", os.stat)),
        patch.object(os, "lstat", noting("stat", os.lstat)),
        patch.object(os, "fsync", noting("fsync", os.fsync)),
    ):
        _counting.append(operations)
        try:
            yield operations
        finally:
            _counting.remove(operations)
