"""Writes the state of a render as a text file for the textfile collector of Prometheus' node_exporter.

Each replica leader writes a file of its own: ``PATH``, and ``PATH`` with ``.replica3`` before its suffix. Figures of
one replica stand in every file, with the label ``replica``; those of the whole run stand in the first replica's file
alone, so sums over files count nothing twice. Help texts are the same in all files, as node_exporter wants it.

At the end of a job the file stays, with ``storymem_up`` 0: a file that goes would take its last counts with it, which
nobody may have read yet. A killed replica leaves ``storymem_up`` 1 and a time that stands still
(``storymem_written_timestamp_seconds``).

The library's writer renames a temporary file whose name does not end in ``.prom``, so no half-written file is read.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import storymem_dist.events as ev
from storymem_dist import __version__
from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB, current_device, device_memory, free_device_memory_bytes
from storymem_dist.observe.journal import JournalTail
from storymem_dist.observe.queue.view import EVENTS_OF_A_QUEUE
from storymem_dist.observe.run.rates import rates, seconds_left
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import RowKey
from storymem_dist.observe.settings import TEXTFILE_SUFFIX
from storymem_dist.terminal.streams import print_error
from storymem_dist.terminal.text import printable

WRITE_SECONDS = 15.0
"""Time between two writes: node_exporter reads the file at each scrape, every 15 to 60 seconds."""

FOLLOWED = (*EVENTS_OF_A_QUEUE, ev.StepFinished, ev.ReplicaWaited, ev.LayoutChosen)
"""What the first replica needs of the events of the others."""

SILENT_SECONDS = 300.0
"""A replica that sent no event for this long does not count as up, nor its shot as running."""

_LONGEST_LABEL = 200
_LABELS = ("run", "render_job", "replica")


def textfile_of(path: Path, replica: int) -> Path:
    """The file of a replica: ``x.prom``, ``x.replica3.prom``."""
    return path if replica == 0 else path.with_name(f"{path.name.removesuffix(TEXTFILE_SUFFIX)}.replica{replica}.prom")


def check_textfile(text: str) -> Path:
    """Return the path that ``tracking.prometheus.textfile`` names. Raises ``ConfigError`` if no file can be made there.

    Of this machine: a launcher whose ranks run elsewhere must not ask.
    """
    path = Path(text)
    probe = path.with_name(f"{path.name}.{os.getpid()}.probe")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"tracking.prometheus.textfile={text} cannot be written: {error.strerror or error}; its folder must exist"
            " (node_exporter's --collector.textfile.directory) and be writable"
        ) from None
    return path


class PrometheusFile:
    """The back end of one replica leader. ``tail`` makes it write the figures of the whole run too.

    A write that fails is reported once and tried again at the next one. Must be made in the thread whose device is the
    replica's.
    """

    name = "prometheus"
    tick_seconds = WRITE_SECONDS

    def __init__(self, path: Path, *, run: str, replica: int, tail: JournalTail | None = None) -> None:
        self.path = textfile_of(path, replica)
        self._figures = _Figures(run, replica, device=current_device(), is_first=tail is not None)
        self._tail = tail
        self._registry = CollectorRegistry()
        self._registry.register(self._figures)
        self._has_failed = False

    def handle(self, stamped: ev.StampedEvent) -> None:
        """Count the event; the start of a job is written at once."""
        self._figures.apply(stamped)
        if isinstance(stamped.event, ev.JobStarted):
            self.tick()

    def tick(self) -> None:
        """Read the events of the other replicas, and write the file."""
        for stamped in self._tail.follow() if self._tail is not None else ():
            self._figures.state.apply(stamped)
        self._write()

    def close(self) -> None:
        """Write the last state, as that of a replica that is down."""
        self._figures.is_up = False
        for stamped in self._tail.poll() if self._tail is not None else ():
            self._figures.state.apply(stamped)
        self._write()

    def _write(self) -> None:
        try:
            write_to_textfile(str(self.path), self._registry)
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                print_error(f"storymem: tracking.prometheus.textfile: {self.path} cannot be written: {error}")
            self._has_failed = True


class _Figures(Collector):
    """What the file says. ``state`` is folded from the events of this replica and, for the first one, of all."""

    def __init__(self, run: str, replica: int, *, device: int | None, is_first: bool) -> None:
        self.state = RunState()
        self.is_up = True
        self._replica = replica
        self._device = device
        self._is_first = is_first
        self._job = ev.JobStarted()
        self._run = _label(run)
        self._shots = {"finished": 0, "failed": 0}
        self._steps = 0
        self._step_seconds = self._waited_seconds = 0.0
        self._last_steps: list[float] = []

    def apply(self, stamped: ev.StampedEvent) -> None:
        """Count an event of this replica."""
        self.state.apply(stamped)
        match stamped.event:
            case ev.JobStarted() as started:
                self._job = started
            case ev.ShotFinished(already_committed=False):
                self._shots["finished"] += 1
            case ev.ShotFailed(will_retry=False):
                self._shots["failed"] += 1
            case ev.StepFinished() as step:
                self._steps += 1
                self._step_seconds += max(0.0, step.elapsed_seconds)
                self._last_steps = [*self._last_steps[-7:], step.elapsed_seconds]
            case ev.ReplicaWaited() as wait:
                self._waited_seconds += max(0.0, wait.elapsed_seconds)

    def collect(self) -> Iterator[Metric]:
        """All figures as they are now."""
        yield from self._of_replica()
        if self._is_first:
            yield from self._of_run()

    def _of_replica(self) -> Iterator[Metric]:
        yield self._gauge("storymem_up", "1 while this replica runs, 0 after its end.", float(self.is_up))
        yield self._gauge("storymem_written_timestamp_seconds", "When this file was written.", time.time())
        shots = CounterMetricFamily(
            "storymem_replica_shots", "Shots of this replica since its start, by outcome.", labels=(*_LABELS, "outcome")
        )
        for outcome, count in self._shots.items():
            shots.add_metric((*self._labels, outcome), count)
        yield shots
        for name, text, value in (
            ("storymem_replica_steps", "Denoising steps of this replica since its start.", float(self._steps)),
            ("storymem_replica_step_seconds", "Seconds of these denoising steps.", self._step_seconds),
            ("storymem_replica_waited_seconds", "Seconds without a shot to render.", self._waited_seconds),
        ):
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        if self._last_steps:
            mean = sum(self._last_steps) / len(self._last_steps)
            yield self._gauge("storymem_replica_seconds_per_step", "Mean of the last denoising steps.", mean)
        for name, text, known in (
            ("storymem_device_free_bytes", "Device memory that the replica's leader can still take.", self._free()),
            ("storymem_device_reserved_bytes", "Device memory that torch holds there.", self._reserved()),
        ):
            if known is not None:
                yield self._gauge(name, text, known)
        names = ("version", "torch", "device", "layout", "host")
        info = GaugeMetricFamily("storymem_build_info", "The program of this replica.", labels=(*_LABELS, *names))
        job = self._job
        values = (__version__, job.versions.get("torch", ""), job.device, job.layout, job.host)
        info.add_metric((*self._labels, *map(_label, values)), 1.0)
        yield info

    def _of_run(self) -> Iterator[Metric]:
        state, live = self.state, self._live_rows()
        counts = {name: state.count(name) for name in ("finished", "failed", "blocked")}
        running = (
            shot for story in state.stories.values() for shot in story.shots.values() if shot.status == "running"
        )
        counts["running"] = sum(shot.last is not None and shot.last.row in live for shot in running)
        skipped = state.skipped
        counts["skipped"] = sum(one.num_left for one in state.stories.values() if one.story_id in skipped)
        counts["waiting"] = max(0, state.num_shots - sum(counts.values()))
        shots = GaugeMetricFamily("storymem_shots", "Shots of the run, by state.", labels=("run", "state"))
        for name, count in counts.items():
            shots.add_metric((self._run, name), count)
        yield shots
        speed, left = rates(state), seconds_left(state)
        paused = [one.request.action for _, one in sorted(state.requests.items())]
        last = next((action for action in reversed(paused) if action in ("pause", "resume")), "")
        for name, text, known in (
            ("storymem_stories", "Stories of the run.", max(len(state.stories), state.announced_stories)),
            ("storymem_stories_finished", "Stories whose video is complete.", self._num_finished_stories()),
            ("storymem_replicas_up", "Replicas of the run that show a sign of life.", len(live)),
            ("storymem_clips_per_gpu_hour", "Clips per hour and device, over the whole run.", speed.clips_per_gpu_hour),
            ("storymem_seconds_per_step", "Mean of all denoising steps of the run.", speed.seconds_per_step),
            ("storymem_left_seconds", "About how long the run will still take.", left),
            ("storymem_queue_paused", "1 while somebody holds the queue.", float(last == "pause")),
            ("storymem_requests_applied", "Requests to the queue that were applied.", len(state.requests)),
        ):
            if known is not None:
                gauge = GaugeMetricFamily(name, text, labels=("run",))
                gauge.add_metric((self._run,), float(known))
                yield gauge

    @property
    def _labels(self) -> tuple[str, ...]:
        return (self._run, _label(self._job.job), str(self._replica))

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=_LABELS)
        gauge.add_metric(self._labels, value)
        return gauge

    def _num_finished_stories(self) -> int:
        return sum(story.outcome == "finished" for story in self.state.stories.values())

    def _live_rows(self) -> set[RowKey]:
        """The rows of replicas that have not ended and sent an event lately."""
        now = time.time()
        return {
            key
            for key, row in self.state.rows.items()
            if row.starts and not row.is_over and now - row.last_seen < SILENT_SECONDS
        }

    def _free(self) -> float | None:
        torch: Any = sys.modules.get("torch")
        if self._device is None or torch is None:
            return None
        try:
            kind = torch.accelerator.current_accelerator().type
            free = free_device_memory_bytes(torch.device(kind, self._device))
        except Exception:  # an accelerator that does not say, or one that has failed: the render reports that itself
            return None
        return None if free is None else float(free)

    def _reserved(self) -> float | None:
        held = device_memory(self._device).held_gib
        return None if held is None else held * GIB


def _label(text: str) -> str:
    return printable(text)[:_LONGEST_LABEL]
