"""Creates the observers of a rank from the ``tracking`` settings and the rank's place in the job.

Every rank samples its system; each replica leader writes events and its own console lines; the first leader of a job
shows the whole batch, feeds Weights & Biases and writes the report. Knows a rank's place in a job, not its launcher.
"""

import os
import socket
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from storymem_dist.errors import ConfigError
from storymem_dist.events import Event, JobStarted, NullObserver, Observer, WarningIssued
from storymem_dist.observe.console import LiveConsole, PlainConsole
from storymem_dist.observe.journal import JournalTail, JournalWriter, journal_folder, new_writer_id
from storymem_dist.observe.observers import BackEnd, Observers
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.settings import ConsoleSettings, TrackingSettings
from storymem_dist.observe.system import SystemSampler
from storymem_dist.observe.wandb.limits import fitting
from storymem_dist.observe.wandb.process import WandbProcess, choose_mode
from storymem_dist.terminal.rich_console import SafeConsole
from storymem_dist.terminal.streams import print_error

SILENCE_SECONDS = 90.0
"""At the end, a replica that sent nothing for this long (not even system samples) is not waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankInfo:
    """A rank's place in its job. ``job`` is the same on all ranks of a job, also after a restart."""

    job: str = ""
    rank: int = 0
    replica: int = 0
    num_replicas: int = 1
    is_leader: bool = True

    @property
    def is_first_leader(self) -> bool:
        """Whether this rank reports for the whole job."""
        return self.is_leader and self.replica == 0


class RenderObservers:
    """The observers of one rank. Pass ``observer`` to the code that renders; call ``close`` when the job ends.

    As a context manager: leaving it on an exception does not wait for the other replicas.
    """

    def __init__(self, settings: TrackingSettings, run_folder: Path, place: RankInfo, *, stream: TextIO) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._place = place
        events = run_folder / "events"
        self._writer = new_writer_id(place.replica, rank=None if place.is_leader else place.rank)
        journal = JournalWriter(journal_folder(events, self._writer, place.num_replicas), self._writer)
        self._warnings: list[str] = []
        self._observers = Observers(
            self._back_ends(stream), journal=journal, writer=self._writer, replica=place.replica
        )
        self.observer: Observer = self._observers if place.is_leader else NullObserver()
        for message in self._warnings:
            self.warn(message, "observe.prometheus")
        self._sampler: SystemSampler | None = None
        if settings.system_interval_seconds > 0:
            self._sampler = SystemSampler(
                self._observers, rank=place.rank, interval_seconds=settings.system_interval_seconds
            )

    def warn(self, message: str, source: str) -> None:
        """Send a warning from this rank, leader or not."""
        self._observers.notify(WarningIssued(message=message, source=source))

    def close(self, *, wait_for_replicas: bool = True) -> None:
        """End all observing. The first leader of a job waits for its other replicas, to receive all of their events."""
        if self._place.is_first_leader and wait_for_replicas and self._place.num_replicas > 1:
            wait_for_replicas_of(self._run_folder, self._place)
        if self._sampler is not None:
            self._sampler.close()
        self._observers.close(self._settings.wandb.finish_timeout_seconds + 30.0)
        if self._place.is_first_leader and self._settings.report:
            self._write_report()

    def __enter__(self) -> "RenderObservers":
        return self

    def __exit__(self, error_type: object, *rest: object) -> None:
        self.close(wait_for_replicas=error_type is None)

    def _back_ends(self, stream: TextIO) -> list[BackEnd]:
        place, settings = self._place, self._settings
        if not place.is_leader:
            return []
        back_ends: list[BackEnd] = []
        console = make_console(settings.console, stream, self._new_tail(), is_first_leader=place.is_first_leader)
        if console is not None:
            back_ends.append(console)
        if settings.prometheus.textfile is not None:
            from storymem_dist.observe.prometheus import FOLLOWED, PrometheusFile, check_textfile  # loads its library

            try:
                path, run = check_textfile(settings.prometheus.textfile), self._run_folder.resolve().name
                tail = self._new_tail(only=FOLLOWED)
                back_ends.append(PrometheusFile(path, run=run, replica=place.replica, tail=tail))
            except ConfigError as error:
                self._warnings.append(f"{error}; the render continues without it")
        if place.is_first_leader and choose_mode(settings.wandb.mode) != "off":
            try:
                back_ends.append(WandbProcess(self._run_folder, settings.wandb))
            except OSError as error:
                print_error(f"storymem: Weights & Biases is off, its feeder cannot be started: {error}")
        return back_ends

    def _new_tail(self, only: Collection[type[Event]] = ()) -> JournalTail | None:
        """What reads the events of the other replicas, for the leader that reports for all."""
        events = self._run_folder / "events"
        return JournalTail(events, skip=(self._writer,), only=only) if self._place.is_first_leader else None

    def _write_report(self) -> None:
        from storymem_dist.observe.report import write_report

        try:
            write_report(self._run_folder, self._run_folder / "report.html")
        except Exception as error:  # a failed report must not fail a rendered batch
            print_error(f"storymem: report.html could not be written: {type(error).__name__}: {error}")


def start_observers(
    settings: TrackingSettings,
    run_folder: Path,
    place: RankInfo,
    *,
    sweep: str | None = None,
    stream: TextIO | None = None,
) -> RenderObservers:
    """Start the observers of this rank.

    ``run_folder`` is an opened run folder; ``sweep`` names the sweep this run belongs to, if any (W&B group);
    ``stream`` is where the console writes, standard error by default. Raises ``OSError`` when the folder cannot be
    written.
    """
    if sweep is not None and settings.wandb.group is None:
        settings = replace(settings, wandb=replace(settings.wandb, group=fitting(sweep)))
    return RenderObservers(settings, run_folder, place, stream=stream or sys.stderr)


def make_console(
    settings: ConsoleSettings, stream: TextIO, tail: JournalTail | None = None, *, is_first_leader: bool = True
) -> BackEnd | None:
    """Return the console back end for ``stream``, or None if nothing is shown here.

    On a terminal only the first leader draws: its view shows the other replicas too.
    """
    mode = settings.mode
    if mode == "auto":
        mode = "live" if stream.isatty() and settings.level != "quiet" else "plain"
    if mode == "off" or (mode == "live" and not is_first_leader):
        return None
    if mode == "live":
        return LiveConsole(SafeConsole(stream, force_terminal=True), level=settings.level, tail=tail)
    return PlainConsole(stream, level=settings.level, line_interval_seconds=settings.line_interval_seconds, tail=tail)


def wait_for_replicas_of(run_folder: Path, place: RankInfo, *, silence_seconds: float = SILENCE_SECONDS) -> None:
    """Wait until every other replica of this job has reported its end or sent nothing for ``silence_seconds``.

    A replica whose process on this host has ended is not waited for: after a crash the ranks should restart soon.
    """
    tail = JournalTail(run_folder / "events")
    state = RunState()
    began = time.time()
    others = [number for number in range(place.num_replicas) if number != place.replica]
    while True:
        while events := tail.poll():
            for stamped in events:
                state.apply(stamped)
        starts = [state.newest_start(place.job, number) for number in others]
        waiting = [start for start in starts if start is None or not (start.outcome or _has_died(start.job))]
        last_signs = [max(began, start.last_seen if start is not None else 0.0) for start in waiting]
        if all(time.time() - last > silence_seconds for last in last_signs):
            return
        time.sleep(1.0)


def _has_died(started: JobStarted) -> bool:
    """Whether the process that started is known to have ended. False for a process on another host."""
    if started.host != socket.gethostname() or not started.process_id:
        return False
    try:
        os.kill(started.process_id, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
