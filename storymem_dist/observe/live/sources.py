"""The run folders that a live page shows, each read at most once a second however many clients there are.

Everything here belongs to one thread, that of ``hub``. Knows the report's pages; nothing of HTTP.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from storymem_dist.errors import RunFolderError, StoryMemError
from storymem_dist.files import names_in
from storymem_dist.observe.live.assets import LiveAssets
from storymem_dist.observe.report.assets import Assets
from storymem_dist.observe.report.model import RunReader
from storymem_dist.observe.report.page import INDEX, page_parts
from storymem_dist.observe.report.views import RunView
from storymem_dist.observe.run.files import MARKER

SCAN_SECONDS = 1.0
"""Shortest time between two looks at one run folder."""

FILES_A_SECOND = 100
"""Event files that are opened in a second at most: a job of hundreds of replicas is looked at less often."""

SWEEP_SECONDS = 10.0
"""Shortest time between two looks for new runs in the folder of a sweep."""

MAX_RUNS = 500

QUIET_PARTS = ("foot",)
"""Parts that change with the time alone: they are no news."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One page of one run at one moment.

    ``parts``: HTML by part. ``digests``: of each part; the same text has the same digest in every process. ``identity``
    is the digest of all that is news. ``trouble``: why the folder could not be read again; empty where it could.
    """

    parts: Mapping[str, str]
    digests: Mapping[str, str]
    identity: str
    trouble: str = ""
    paused: bool = False
    skipped: tuple[str, ...] = ()

    @property
    def news(self) -> dict[str, object]:
        """What a client needs in order to see what it does not have yet."""
        return {
            "identity": self.identity,
            "digests": dict(self.digests),
            "trouble": self.trouble,
            "paused": self.paused,
            "skipped": list(self.skipped),
        }


def snapshot(
    parts: Mapping[str, str], *, trouble: str = "", paused: bool = False, skipped: Sequence[str] = ()
) -> Snapshot:
    """Return the snapshot of a page that consists of ``parts``."""
    digests = {
        name: hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16] for name, text in parts.items()
    }
    news = {name: digest for name, digest in digests.items() if name not in QUIET_PARTS}
    whole = hashlib.sha256(repr((sorted(news.items()), trouble, paused, sorted(skipped))).encode())
    return Snapshot(
        parts=parts,
        digests=digests,
        identity=whole.hexdigest()[:16],
        trouble=trouble,
        paused=paused,
        skipped=tuple(skipped),
    )


class LiveRun:
    """One run folder. ``num_scans`` counts how often it was looked at, ``scanned_at`` is when it was last.

    Raises ``RunFolderError`` where it is none.
    """

    def __init__(self, root: Path, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.root = root
        self.name = name
        self.num_scans = 0
        self._clock = clock
        self._reader = RunReader(root)
        self._marked_at = self._look_at_marker()
        self.scanned_at = -SCAN_SECONDS
        self._pages: dict[str, Snapshot] = {}
        self._assets = LiveAssets(root)
        self.trouble = ""
        self.view = self._look()

    @property
    def is_due(self) -> bool:
        """Whether it was not looked at within the last second; longer where a look costs much."""
        return self._clock() - self.scanned_at >= max(SCAN_SECONDS, self._reader.num_event_files / FILES_A_SECOND)

    def refresh(self) -> RunView:
        """Look at the folder unless that was done within the last second; return the newest view."""
        if self.is_due:
            num_events, view, trouble = self._reader.num_events, self.view, self.trouble
            try:
                self.view, self.trouble = self._look(), ""
            except (StoryMemError, OSError) as error:
                self.trouble = str(error)
            is_same = replace(self.view, written_at=view.written_at) == view and self.trouble == trouble
            if not is_same or self._reader.num_events != num_events:
                self._pages.clear()
        return self.view

    def _look(self) -> RunView:
        self.scanned_at = self._clock()
        self.num_scans += 1
        if (marked_at := self._look_at_marker()) != self._marked_at:  # another run may be in its place
            self._reader, self._assets, self._marked_at = RunReader(self.root), LiveAssets(self.root), marked_at
        return self._reader.refresh()

    def _look_at_marker(self) -> tuple[int, int]:
        try:
            found = (self.root / MARKER).stat()
        except FileNotFoundError:
            raise RunFolderError(f"{self.root} is not a run folder any more (it has no {MARKER})") from None
        return found.st_ino, found.st_mtime_ns

    def assets_of(self, page: str) -> Assets:
        """The media of the run as a page uses them: pages of stories lie in a folder of their own."""
        return self._assets.with_base("" if page == INDEX else "../")

    def has_page(self, page: str) -> bool:
        """Whether ``page`` is the index or the id of a story."""
        return page == INDEX or any(story.story_id == page for story in self.view.stories)

    def page(self, page: str) -> Snapshot:
        """Return a page as of the newest view. Raises ``KeyError`` for one that there is not."""
        if not self.has_page(page):
            raise KeyError(page)
        if page not in self._pages:
            view = self.view
            self._pages[page] = snapshot(
                page_parts(view, self.assets_of(page), page),
                trouble=self.trouble,
                paused=view.paused is not None,
                skipped=[story.story_id for story in view.stories if story.queue.skipped],
            )
        return self._pages[page]


class Sources:
    """All run folders of a server: one alone, or several by name.

    ``paths`` are run folders, or folders of sweeps, whose runs may appear later. Raises ``RunFolderError``.
    """

    def __init__(self, paths: Sequence[Path], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        try:
            self._sweeps = [path for path in paths if not _is_run(path) and _runs_in(path)]
        except OSError as error:
            raise RunFolderError(f"{error.filename} cannot be read as a run folder: {error.strerror}") from None
        self.runs: dict[str, LiveRun] = {}
        self.problems: dict[Path, str] = {}
        self.is_single = len(paths) == 1 and not self._sweeps
        for path in paths:
            if path not in self._sweeps:
                self._add(path)
        self._searched_at = -SWEEP_SECONDS
        self.search()
        if not self.runs:
            raise RunFolderError("; ".join(self.problems.values()))

    def search(self) -> None:
        """Look for new runs of the sweeps, at most every ``SWEEP_SECONDS``."""
        if not self._sweeps or self._clock() - self._searched_at < SWEEP_SECONDS:
            return
        self._searched_at = self._clock()
        known = {run.root for run in self.runs.values()}
        for path in [run for sweep in self._sweeps for run in _runs_in(sweep)]:
            if path not in known and len(self.runs) < MAX_RUNS:
                try:
                    self._add(path)
                except (StoryMemError, OSError) as error:
                    self.problems[path] = str(error)

    def _add(self, path: Path) -> None:
        first = name = os.fsencode(path.resolve().name).decode(errors="replace") or "run"  # it is part of an address
        number = 2
        while name in self.runs:
            name = f"{first}-{number}"
            number += 1
        self.runs[name] = LiveRun(path, name, clock=self._clock)
        self.problems.pop(path, None)


def _is_run(path: Path) -> bool:
    return (path / MARKER).exists()


def _runs_in(folder: Path) -> list[Path]:
    """The run folders in the folder of a sweep, by name."""
    return [folder / name for name in names_in(folder) if _is_run(folder / name)]
