"""One reader for all clients: a thread that looks at the run folders, and what tells clients that a page changed.

The thread works only for a request or while a client follows a page. How many clients there are makes no difference to
what it reads.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from storymem_dist.observe.live.listing import RUNS, listing_parts
from storymem_dist.observe.live.sources import LiveRun, Snapshot, Sources, snapshot
from storymem_dist.observe.live.stream import KEEP_ALIVE, KEEP_ALIVE_SECONDS, message

MAX_CLIENTS = 100
"""Pages that are followed at the same time."""

RUNS_AT_ONCE = 8
"""Runs of a list that are looked at in one second, those first that were not looked at for longest."""

LARGEST_SHARE = 0.25
"""Largest share of its time that the reader works for clients that follow: a slow folder is looked at less often."""

Place = tuple[str, str]
"""A page: the name of its run (empty: the list of runs) and its name in the run."""

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class ServerStops(Exception):
    """The server is being stopped: nothing more is read."""


class Hub:
    """Reads ``sources`` for all clients, in one thread. ``interval`` is the time between two looks, in seconds."""

    def __init__(self, sources: Sources, *, interval: float = 1.0) -> None:
        self.sources = sources
        self._interval = interval
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="storymem-live")
        self._followers: dict[_Follower, Place] = {}
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def num_followers(self) -> int:
        """Clients that follow a page."""
        return len(self._followers)

    async def in_thread(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        """Run ``work`` in the reader's thread, where views may be read. Raises ``ServerStops`` after ``close``."""
        if self._closed:
            raise ServerStops
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def run(self, name: str) -> LiveRun:
        """The run called ``name``. Raises ``KeyError``."""
        return self.sources.runs[name]

    def look(self, place: Place) -> Snapshot:
        """Return a page that is at most a second old; in the reader's thread. Raises ``KeyError`` where it is none."""
        name, page = place
        if name == RUNS:
            return self._list()
        run = self.run(name)
        run.refresh()
        return run.page(page)

    def _list(self) -> Snapshot:
        self.sources.search()
        runs = self.sources.runs.values()
        for run in sorted((run for run in runs if run.is_due), key=lambda run: run.scanned_at)[:RUNS_AT_ONCE]:
            run.refresh()
        return snapshot(listing_parts(self.sources))

    async def follow(self, place: Place, first: Snapshot, known: str) -> AsyncIterator[bytes]:
        """Yield the news of a page as server-sent events, from ``first`` on, until the server stops.

        ``known`` is the identity of what the client has already.
        """
        follower = _Follower()
        follower.offer(first)
        with self._following(follower, place):
            while not self._closed:
                newest = follower.take()
                if newest is not None and newest.identity != known:
                    known = newest.identity
                    yield message(known, newest.news)
                try:
                    await asyncio.wait_for(follower.changed.wait(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield KEEP_ALIVE

    @contextlib.contextmanager
    def _following(self, follower: "_Follower", place: Place) -> Iterator[None]:
        self._followers[follower] = place
        if self._pump is None:
            self._pump = asyncio.create_task(self._serve_followers())
        try:
            yield
        finally:
            del self._followers[follower]
            if not self._followers and self._pump is not None:
                self._pump.cancel()
                self._pump = None

    async def _serve_followers(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            try:
                pages = await self.in_thread(self._look_all, set(self._followers.values()))
            except Exception:  # a bug must neither be silent nor end the updates of all clients
                _log.exception("the run cannot be shown")
                pages = {}
            for follower, place in self._followers.items():
                if place in pages:
                    follower.offer(pages[place])
            took = loop.time() - begun
            await asyncio.sleep(max(self._interval - took, took / LARGEST_SHARE - took, 0.05))

    def _look_all(self, places: Iterable[Place]) -> dict[Place, Snapshot]:
        found = {}
        for place in places:
            try:
                found[place] = self.look(place)
            except KeyError:
                found[place] = snapshot({}, trouble="this story is not in the run any more")
        return found

    def close(self) -> None:
        """End all streams; the reader ends what it is doing."""
        self._closed = True
        for follower in self._followers:
            follower.changed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Follower:
    """One client: the newest snapshot of its page that was not sent yet."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._newest: Snapshot | None = None

    def offer(self, newest: Snapshot) -> None:
        self._newest = newest
        self.changed.set()

    def take(self) -> Snapshot | None:
        self.changed.clear()
        newest, self._newest = self._newest, None
        return newest
