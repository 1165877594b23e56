"""Reports a job to people: its start, the progress of loading, and its end.

Knows events and standard output; decides nothing.
"""

import os
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from storymem_dist.artifacts.requests import RequestLog
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.config.points import Point
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.summary import DONE, BatchSummary
from storymem_dist.events import JobStarted, LayoutChosen, Observer, StoryboardRejected, WarningIssued, WeightsProgress
from storymem_dist.hardware import peak_tflops
from storymem_dist.observe.run.format import count
from storymem_dist.parallel.choice import Choice
from storymem_dist.parallel.session import Session
from storymem_dist.render.identity import device_name, group_identity, package_versions
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.problems import one_line
from storymem_dist.story.schema import Story
from storymem_dist.terminal.streams import print_lines

_PROGRESS_SECONDS = 0.25


def announce(
    part: BatchPart, batch: StoryBatch, run_id: str, session: Session, choice: Choice, *, attention: str
) -> None:
    """Report the start of the job to the observers of one part, and the storyboards that it cannot render.

    The first rank also reports what was chosen for all ranks, and the warnings of all stories.
    """
    part.observers.notify(
        JobStarted(
            run_id=run_id,
            job=group_identity(),
            config_hash=part.config_hash,
            num_stories=len(batch.stories),
            num_shots=sum(len(story.shots) for story in batch.stories),
            num_replicas=session.layout.replica,
            num_devices=session.layout.ranks_per_replica,
            device=device_name(session.device),
            layout=str(session.layout),
            attention=attention,
            compile=choice.compile_reason,
            host=socket.gethostname(),
            process_id=os.getpid(),
            peak_tflops=peak_tflops(device_name(session.device)),
            versions=package_versions(),
        )
    )
    if session.rank == 0 and choice.is_planned:
        part.observers.notify(
            LayoutChosen(
                layout=str(session.layout),
                weights=choice.parallel.weights,
                experts=choice.experts,
                compiled=bool(choice.parallel.compile),
                reasons=choice.reasons,
                considered=choice.considered,
                memory_gib=dict(choice.memory_gib),
                seconds_per_step=choice.seconds_per_step,
                seconds_per_shot=choice.seconds_per_shot,
                total_seconds=choice.total_seconds,
            )
        )
    for rejected in batch.rejected:
        part.observers.notify(StoryboardRejected(source=one_line(str(rejected.source)), message=rejected.message))
    if session.rank == 0:
        for warning in batch.all_warnings:
            part.observers.notify(WarningIssued(message=one_line(warning), source="stories"))


def report_loading(observer: Observer) -> Callable[[str, int, int], None]:
    """Return a callback (name, bytes done, bytes in total) that reports loading as events, at most four a second."""
    began: dict[str, float] = {}
    last = [0.0]

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = began.setdefault(what, now)
        if done < total and now - last[0] < _PROGRESS_SECONDS:
            return
        last[0] = now
        if done >= total:
            del began[what]
        observer.notify(WeightsProgress(what=what, bytes_done=done, bytes_total=total, elapsed_seconds=now - start))

    return report


def print_outcome(
    points: Sequence[Point], batches: Sequence[StoryBatch], summary: BatchSummary, session: Session
) -> None:
    """Print the end of the job in a few lines on standard output; rank 0 only."""
    if session.rank != 0:
        return
    lines = []
    for point, batch in zip(points, batches, strict=True):
        of_point = f"{point.name}: " if point.name else ""
        run = RunFolder(point.settings.output)
        for story in {one.story_id: one for one in (*_added_to(run), *batch.stories)}.values():
            video = run.story_video(story.story_id)
            if video.exists():
                lines.append(f"{of_point}{story.name}: {video}")
        for rejected in batch.rejected:
            lines.append(f"{of_point}refused: {rejected.message}")
        if batch.all_warnings:
            num = count(len(batch.all_warnings), "warning")
            command = f"storymem-report {shlex.quote(str(point.settings.output))}"
            lines.append(f"{of_point}{num} about storyboards: {command} shows them")
    for failure in summary.failures:
        lines.append(f"failed: {failure.story_id} {failure.shot_id}: {failure.reason}")
    where = points[0].settings.output if len(points) == 1 else Path(points[0].settings.output).parent
    print_lines([*lines, f"{last_line(summary)}; everything is in {where}"])


def _added_to(run: RunFolder) -> list[Story]:
    """The stories that were added to the queue of a run folder; none where its requests cannot be read."""
    try:
        return [request.story for request in RequestLog(run.root).read_new() if request.story is not None]
    except OSError:
        return []


def last_line(summary: BatchSummary) -> str:
    """Return the end of the whole batch in words: every storyboard file counts, and every replica's shots."""
    parts = [
        f"{summary.state}: {summary.num_stories_done} of {summary.num_stories + summary.num_refused} stories are done",
        f"{count(summary.num_refused, 'file')} refused" if summary.num_refused else "",
        summary.reason if summary.state == DONE else "",
        f"{count(summary.num_finished - summary.num_finished_before, 'shot')} rendered, {summary.num_finished_before} "
        f"found finished, {summary.num_failed} failed, {summary.num_blocked} blocked by them",
    ]
    return "; ".join(part for part in parts if part)
