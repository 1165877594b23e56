"""The fan-out: passes events from the render to back ends without ever making the render wait.

``notify`` stamps the event, appends it to the journal (one small write, in the caller's thread) and puts it in the
bounded queue of each back end. Every back end has its own thread, which may compute only for a small share of the time,
so that the interpreter stays free for the render. A back end that raises is dropped with one warning. One that hangs or
is too slow misses events (the journal has them all) and causes one warning.

Knows threads and queues; nothing of what back ends do with events.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from storymem_dist.events import Event, StampedEvent, WarningIssued
from storymem_dist.observe.journal import JournalWriter
from storymem_dist.terminal.streams import print_error

QUEUE_SIZE = 4096
"""Events that may wait for one back end; about ten minutes of a busy replica."""

MAX_BUSY_RATIO = 0.01
"""Largest share of the time, in the long run, for which the thread of a back end may compute during a render."""

BUSY_RESERVE_SECONDS = 0.1
"""Computing time that a back end may use at once before that limit slows it down."""

LONGEST_PAUSE_SECONDS = 30.0
"""Longest single pause of a back end that has exceeded its share."""


class BackEnd(Protocol):
    """Receives events. All methods are called from one thread that belongs to this back end alone.

    Nothing that they do stops the render. Events that a back end sends to its own ``Observers`` are ignored.
    """

    name: str
    tick_seconds: float

    def handle(self, stamped: StampedEvent) -> None:
        """Handle one event. May be slow; may raise (then no method of this back end is called again)."""

    def tick(self) -> None:
        """Called about every ``tick_seconds``, also while there are no events."""

    def close(self) -> None:
        """Finish. Called once, after the last event."""


class Observers:
    """Passes every event to the journal and to all back ends.

    ``writer`` and ``replica`` go into each event's stamp. ``journal`` may be None (library use without a run folder).
    ``report_line`` receives one line about each back end that failed; by default it goes to standard error. ``clock``
    gives the wall time in seconds. Use it as a context manager or call ``close``.
    """

    def __init__(
        self,
        back_ends: Sequence[BackEnd] = (),
        *,
        journal: JournalWriter | None = None,
        writer: str = "",
        replica: int = 0,
        queue_size: int = QUEUE_SIZE,
        report_line: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.writer = writer
        self.replica = replica
        self._journal = journal
        self._journal_warned = False
        self._lock = threading.RLock()
        self._sequence = 0
        self._closed = False
        self._report_line = report_line or _print_to_stderr
        self._clock = clock
        self._lanes = [_Lane(back_end, queue_size, self._warn) for back_end in back_ends]

    def notify(self, event: Event) -> None:
        """Pass ``event`` on. Returns at once, never raises, may be called from any thread."""
        current = threading.current_thread()
        if any(lane.thread is current for lane in self._lanes):
            return
        self._notify(event)

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Let the back ends finish, for at most ``timeout_seconds`` together, then close the journal."""
        deadline = time.monotonic() + timeout_seconds
        for lane in self._lanes:
            lane.finish()
        for lane in self._lanes:
            if not lane.join(max(0.0, deadline - time.monotonic())):
                self._warn(lane.name, f"{lane.name} did not finish within {timeout_seconds:g} s; continuing without it")
        with self._lock:
            self._closed = True
            if self._journal is not None:
                self._journal.close()

    def __enter__(self) -> "Observers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _notify(self, event: Event) -> None:
        with self._lock:
            if self._closed:
                return
            stamped = StampedEvent(
                event=event, wall_time=self._clock(), writer=self.writer, replica=self.replica, sequence=self._sequence
            )
            self._sequence += 1
            if self._journal is not None:
                self._journal.write(stamped)
            overflowed = [lane for lane in self._lanes if not lane.put(stamped)]
        for lane in overflowed:
            self._warn(lane.name, f"{lane.name} cannot keep up and misses events; the event files have them all")
        if self._journal is not None and self._journal.last_error is not None and not self._journal_warned:
            self._journal_warned = True
            self._report_line(f"events cannot be written to {self._journal.path} now: {self._journal.last_error}")

    def _warn(self, name: str, message: str) -> None:
        self._report_line(message)
        self._notify(WarningIssued(message=message, source=f"observe.{name}"))


class _Lane:
    """One back end, its queue and its thread."""

    def __init__(self, back_end: BackEnd, queue_size: int, warn: Callable[[str, str], None]) -> None:
        self.name = back_end.name
        self._back_end = back_end
        self._warn = warn
        self._queue: queue.Queue[StampedEvent | None] = queue.Queue(maxsize=queue_size)
        self._dropped = False
        self._overflowed = False
        self._finishing = threading.Event()
        self._reserve = BUSY_RESERVE_SECONDS
        self._reserve_at = time.monotonic()
        self.thread = threading.Thread(target=self._run, name=f"observe-{self.name}", daemon=True)
        self.thread.start()

    def put(self, stamped: StampedEvent) -> bool:
        """Queue the event if there is room. False: the queue was full for the first time."""
        if self._dropped or self._finishing.is_set():
            return True
        try:
            self._queue.put_nowait(stamped)
        except queue.Full:
            first = not self._overflowed
            self._overflowed = True
            return not first
        return True

    def finish(self) -> None:
        """Make the thread end once the queue is empty."""
        if not self._finishing.is_set():
            self._finishing.set()
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the thread's end; False if it takes longer."""
        self.thread.join(timeout_seconds)
        return not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop()
            self._back_end.close()
        except Exception as error:
            self._dropped = True
            self._warn(self.name, f"{self.name} failed and is switched off: {type(error).__name__}: {error}")

    def _loop(self) -> None:
        next_tick = time.monotonic() + self._back_end.tick_seconds
        while True:
            try:
                stamped = self._queue.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                if self._finishing.is_set():
                    return
            else:
                if stamped is None:
                    return
                self._paced(lambda event=stamped: self._back_end.handle(event))  # type: ignore[misc]
            if time.monotonic() >= next_tick:
                self._paced(self._back_end.tick)
                next_tick = time.monotonic() + self._back_end.tick_seconds

    def _paced(self, work: Callable[[], None]) -> None:
        """Do ``work``, then pause if this thread has exceeded its share of the time."""
        busy_before = time.thread_time()
        work()
        busy = time.thread_time() - busy_before
        now = time.monotonic()
        self._reserve = min(BUSY_RESERVE_SECONDS, self._reserve + (now - self._reserve_at) * MAX_BUSY_RATIO) - busy
        self._reserve_at = now
        if self._reserve < 0.0:
            self._finishing.wait(min(-self._reserve / MAX_BUSY_RATIO, LONGEST_PAUSE_SECONDS))


def _print_to_stderr(line: str) -> None:
    print_error(f"storymem: {line}")
