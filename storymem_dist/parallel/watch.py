"""Ends ranks that hang, and reports which rank blocks its replica, and where.

About once a second, a thread on every rank exchanges reports with the other ranks of the replica through the job's
store. So when a collective fails, the error names the rank that did not come. A hanging rank is ended when a peer has
given up, or after too long without a sign of life: it prints its stack and exits with 1, and its launcher can restart
the group. This works on every device: NCCL's own watchdog aborts a process without raising an exception, so a hang is
reported shortly before a collective would time out.

Time is counted in ticks of that thread, so that a paused process does not take the pause for a hang. If the interpreter
itself is stuck (in C code that keeps its lock), faulthandler's timer ends the rank after twice the time, pauses
included. After an error on NCCL, the timers of ``ending`` stay armed when the watch and the session have been closed.
Knows ranks and clocks; not what is rendered or where reports go.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol

import torch.distributed as dist

from storymem_dist.errors import CollectiveFailed
from storymem_dist.parallel.ending import end_within
from storymem_dist.parallel.hangs import Sighting, Verdict, judge
from storymem_dist.parallel.job_store import own_connection
from storymem_dist.parallel.session import Session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.terminal.streams import print_error

_LONGEST_INTERVAL = 1.0  # seconds between two looks
_INTERVALS_PER_TIMEOUT = 10
_ALIVE_INTERVALS = 3  # a rank not heard from for this many intervals is silent; a failing rank stays slightly longer
_GRACE_INTERVALS = 5  # intervals a rank gets to exit after a peer gave up; doubled inside a collective
_REPORT_RATIO = 0.9  # share of a collective's time-out after which a hang is reported
_SLOW_PATIENCE = 3.0  # a slow stage may be silent this many times longer
_STORE_SECONDS = 5.0
_REPORT_SECONDS = 5.0
_LEAVE_SECONDS = 30.0  # after an error, for unfinished saves; torchrun allows 30 s as well


class Activity(Protocol):
    """The position of a rank."""

    @property
    def number(self) -> int:
        """Grows along the lock step of a replica; equal on ranks at equal positions."""

    @property
    def num_signs(self) -> int:
        """Grows with every sign of life."""

    @property
    def where(self) -> str:
        """The position in words."""

    @property
    def is_slow(self) -> bool:
        """Whether it may last long without a sign of life."""


class Watch:
    """Watches the rank of ``session`` while it is open, and explains an error of a collective that ends it.

    ``look`` returns where the rank is; ``tell`` receives a message for people (once for each hang, on one rank of the
    replica). Must be opened on the thread that renders, by all ranks of the replica.

    Raises ``CollectiveFailed`` instead of an error of ``torch.distributed``.
    """

    def __init__(
        self,
        session: Session,
        settings: ParallelSettings,
        *,
        look: Callable[[], Activity],
        tell: Callable[[str], None],
    ) -> None:
        self._rank = session.rank
        self._end_may_hang = session.end_may_hang
        self._peers = [rank for rank in session.layout.ranks_of_replica(session.replica) if rank != session.rank]
        self._store = own_connection(_STORE_SECONDS) if self._peers else None
        self._crew, self._first_number = f"replica {session.replica}", 0
        self._lock = threading.Lock()
        self._collective_seconds = settings.collective_timeout_seconds
        self._stall_seconds = settings.stall_timeout_seconds
        shortest = min(self._collective_seconds, self._stall_seconds or self._collective_seconds)
        self._interval = min(_LONGEST_INTERVAL, shortest / _INTERVALS_PER_TIMEOUT)
        self._look = look
        self._tell = tell
        self._thread_id = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="replica-watch", daemon=True)
        self._closing = threading.Event()
        self._own = Sighting(
            rank=self._rank,
            host=socket.gethostname(),
            number=-1,
            where="",
            line="",
            waits=False,
            here_seconds=0.0,
            silent_seconds=0.0,
        )
        self._num_signs = -1
        self._seen: dict[int, Sighting] = {}
        self._received: dict[int, int] = {}
        self._beat = 0
        self._last_tick = self._armed_at = -float("inf")
        self._alarm_seconds = self._leaving_seconds = 0.0
        self._error: BaseException | None = None
        self._reported_at = -1

    def __enter__(self) -> "Watch":
        self._tick()
        self._thread.start()
        return self

    @contextmanager
    def among(self, ranks: Sequence[int], crew: str) -> Iterator[None]:
        """While the body runs, this rank's peers are ``ranks``, which all begin it at equal positions.

        ``crew`` names these ranks at this time. If a collective fails, they stay its peers, to explain that.
        """
        before = self._crew, self._peers, self._first_number
        if self._store is None:
            with suppress(dist.DistError):  # the process that held it may have ended
                self._store = own_connection(_STORE_SECONDS)
        self._join(crew, [rank for rank in ranks if rank != self._rank], self._look().number)
        try:
            yield
        except BaseException as error:
            if not _is_of_a_collective(error):
                self._join(*before)
            raise
        self._join(*before)

    def _join(self, crew: str, peers: list[int], first_number: int) -> None:
        with self._lock:
            self._crew, self._peers, self._first_number = crew, peers, first_number
            self._seen, self._received = {}, {}

    def note(self, error: BaseException) -> None:
        """Let the other ranks know that ``error`` ends this one, before its clean-up, which may take a while."""
        self._error = self._error or error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if error is None:
            return
        if self._end_may_hang:
            end_within()
        self.note(error)
        self._exchange()
        if not (_is_of_a_collective(error) and self._peers):
            return
        self._stay_until_received()
        verdict, reporter = self._verdict()
        if reporter != self._rank:
            why = f"a collective failed; rank {reporter} reports why"
            raise CollectiveFailed(f"rank {self._rank} ends: {why}") from error
        message = f"{self._crew} ends, a collective failed: {verdict.text} (torch reports: {_first_line(error)})"
        self._tell(message)
        raise CollectiveFailed(message) from error

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            with self._lock:
                self._tick()

    def _tick(self) -> None:
        self._arm_for_a_stuck_interpreter()
        elapsed = self._exchange()
        if self._error is not None:
            self._leaving_seconds += elapsed
            if self._leaving_seconds > _LEAVE_SECONDS:
                self._end(self._own.failure)
            return
        if any(one.failure for one in self._seen.values()):
            self._alarm_seconds += elapsed
            patience = 2 if self._own.waits else 1  # its own collective will fail very soon
            if self._alarm_seconds > patience * _GRACE_INTERVALS * self._interval:
                self._end("did not exit after another rank had given up")
        own = self._own
        if self._stall_seconds is not None and own.silent_seconds > self._stall_seconds * own.patience:
            self._end(f"no sign of life for {own.silent_seconds:.0f} s (parallel.stall_timeout_seconds), at {own.line}")
        self._report_a_hang()

    def _exchange(self) -> float:
        """Send this rank's report and receive those of its peers; return the seconds since the last exchange."""
        now = time.monotonic()
        elapsed = min(now - self._last_tick, _ALIVE_INTERVALS * self._interval) if self._beat else 0.0
        self._last_tick = now
        self._beat += 1
        if self._error is not None and not self._own.failure:
            failure = f"{type(self._error).__name__}: {_first_line(self._error)}"
            self._own = replace(self._own, waits=_is_of_a_collective(self._error), failure=failure)
        if not self._own.failure:
            self._look_at_own_rank(elapsed)
        for rank, one in self._seen.items():
            self._seen[rank] = replace(one, unheard_seconds=one.unheard_seconds + elapsed)
        try:
            self._exchange_through_store()
        except dist.DistNetworkError:  # the process that held it has ended, perhaps because its replica is done
            self._store = None
        except dist.DistError:  # too slow this time
            pass
        return elapsed

    def _look_at_own_rank(self, elapsed: float) -> None:
        progress, own = self._look(), self._own
        line, waits = _position(sys._current_frames().get(self._thread_id))
        is_alive = waits or progress.num_signs != self._num_signs  # the collective's time-out limits a wait
        self._num_signs = progress.num_signs
        self._own = replace(
            own,
            number=progress.number - self._first_number,
            where=progress.where,
            line=line,
            waits=waits,
            here_seconds=own.here_seconds + elapsed if progress.number - self._first_number == own.number else 0.0,
            silent_seconds=0.0 if is_alive else own.silent_seconds + elapsed,
            patience=_SLOW_PATIENCE if progress.is_slow else 1.0,
        )

    def _exchange_through_store(self) -> None:
        if self._store is None:
            return
        if not self._peers:
            return
        message = {"beat": self._beat, "crew": self._crew, **asdict(self._own)}
        self._store.set(_key(self._rank), json.dumps(message))
        keys = [_key(rank) for rank in self._peers]
        if not self._store.check(keys):  # a peer has not begun
            return
        for rank, received in zip(self._peers, self._store.multi_get(keys), strict=True):
            fields = json.loads(received)
            beat, crew = fields.pop("beat"), fields.pop("crew")
            if crew == self._crew and self._received.get(rank) != beat:
                self._received[rank] = beat
                self._seen[rank] = Sighting(**fields)

    # -- what is found -------------------------------------------------------------------------------------------------

    def _verdict(self) -> tuple[Verdict, int]:
        """Which ranks block the replica, and the rank that reports it: one that does not hang, if there is one."""
        seen = sorted([self._own, *self._seen.values()], key=lambda one: one.rank)
        verdict = judge(seen, alive_seconds=_ALIVE_INTERVALS * self._interval)
        ranks = [one.rank for one in seen]
        return verdict, min(set(ranks) - set(verdict.culprits) or ranks)

    def _report_a_hang(self) -> None:
        """Report a hang once for each position, before the collectives time out."""
        if not self._peers or self._reported_at == self._own.number:
            return
        verdict, reporter = self._verdict()
        if reporter != self._rank or not verdict.culprits:
            return
        known = {self._rank: self._own, **self._seen}
        culprit = known[verdict.culprits[0]]
        still = culprit.silent_seconds + culprit.unheard_seconds
        if still > _REPORT_RATIO * self._collective_seconds * culprit.patience:
            self._reported_at = self._own.number
            limit = f"collectives fail after {self._collective_seconds:g} s (parallel.collective_timeout_seconds)"
            self._report(f"{self._crew} is stuck; {limit}: {verdict.text}")

    def _end(self, failure: str) -> None:
        """End this process, since its rank cannot: print the reason and the stack."""
        self._own = replace(self._own, failure=failure)
        self._exchange()
        verdict, reporter = self._verdict()
        if self._rank in verdict.culprits or reporter == self._rank:
            self._report(f"{self._crew} ends: {verdict.text}")
        if self._rank in verdict.culprits and sys.__stderr__ is not None:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        if not self._alarm_seconds:
            self._stay_until_received()
        os._exit(1)

    def _stay_until_received(self) -> None:
        """Give peers time to receive the failure: this process may hold the store."""
        if self._peers:
            for _ in range(_ALIVE_INTERVALS + 1):
                time.sleep(self._interval)
                self._exchange()

    def _report(self, message: str) -> None:
        print_error(f"storymem: {message}")
        reporting = threading.Thread(target=self._tell, args=(message,), name="replica-watch-report", daemon=True)
        reporting.start()
        reporting.join(_REPORT_SECONDS)  # it may need the disk or lock that hangs

    def _arm_for_a_stuck_interpreter(self) -> None:
        """Let a C thread of faulthandler end this process when no Python thread runs any more."""
        if self._stall_seconds is None or sys.__stderr__ is None:
            return
        if self._last_tick - self._armed_at > self._stall_seconds / 4:
            self._armed_at = self._last_tick
            faulthandler.dump_traceback_later(2 * self._stall_seconds, exit=True, file=sys.__stderr__)


def _key(rank: int) -> str:
    return f"storymem-watch/{rank}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether ``torch.distributed`` raised it; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """A thread's innermost line outside torch and threading, and whether torch waits there for other ranks."""
    waits = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in ("torch", "threading", "concurrent"):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        waits = waits or module.startswith("torch.distributed")
        frame = frame.f_back
    return "an unknown line", waits
