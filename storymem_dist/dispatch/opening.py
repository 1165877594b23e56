"""Starts or resumes a batch: opens the run folders, plans all shots, and finds those that are committed.

Resuming needs nothing else: the same shots are planned, and those with a record are committed. Only replica leaders run
this; several of them, of one or several jobs, may run it at once. Knows nothing of ranks or models.
"""

import contextlib
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from storymem_dist.artifacts.fingerprint import differences
from storymem_dist.artifacts.records import DamagedRecord
from storymem_dist.artifacts.run_folder import FailureRecord, RunFolder
from storymem_dist.artifacts.shot_names import shot_ids
from storymem_dist.dispatch.announcing import shots_blocked, story_failed
from storymem_dist.dispatch.cleanup import clean_up
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.helping import Help
from storymem_dist.dispatch.leases import WAITING, WORKING, LeaseFolder
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_part
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.dispatch.requests import QueueRequests
from storymem_dist.dispatch.scanning import lease_key
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.story_graph import ShotStatus, StoryGraph
from storymem_dist.dispatch.story_video import has_story_video, notify_story_finished
from storymem_dist.dispatch.summary import Replica
from storymem_dist.errors import RunFolderError, StoryboardError
from storymem_dist.events import ShotSkipped, StoryFinished, StoryStarted, WarningIssued

_MAX_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class OpenBatch:
    """A batch in which this replica takes part.

    ``runs``: the folders in which it works; none if it was asked to stop while it waited for its turn. ``rejected``:
    part index and failure of each story that could not be planned. ``num_skipped``: committed shots whose files this
    replica has checked. ``num_finished_before``: shots of the batch that were committed at the start. ``help``: what
    this replica does for another. ``requests``: what people ask of the queue.
    """

    queue: ShotQueue
    runs: Sequence[RunFolder]
    leases: Sequence[LeaseFolder]
    rejected: Sequence[tuple[int, FailureRecord]]
    num_skipped: int
    num_finished_before: int
    help: Help
    requests: QueueRequests

    def note_helping(self, job: ShotJob | None, *, is_stopping: Callable[[], bool]) -> None:
        """Note that this replica helps another with ``job`` until the next call (see ``helping``). Never raises."""
        self.help.end()
        if job is not None:
            leases, key = self.leases[job.part], lease_key(job)
            self.help.begin(leases.folder, key, leases.generation_of(key) or 0)
            if is_stopping():
                self.help.end()

    def note_stopping(self) -> None:
        """Note at the leases that this process was asked to stop (see ``LeaseFolder.note_stopping``). Never raises."""
        self.help.end()
        for leases in self.leases:
            leases.note_stopping()

    def leave(self, *, crashed: bool) -> None:
        """Release all leases (after a crash: only end the heartbeat); the last to leave cleans up. Never raises."""
        if not crashed:
            self.help.end()
        for leases in self.leases:
            leases.close(release=not crashed)
        with contextlib.suppress(OSError):  # the next process to open the folder cleans up as well
            for index, run in enumerate(self.runs):
                stories = self.queue.graph.stories_of(index)
                only_after_deaths = not self.requests.has_planned_again  # else leases of the plan before may be left
                clean_up(run, self.leases[index], stories, self.queue, only_after_deaths=only_after_deaths)


def open_batch(
    parts: Sequence[BatchPart],
    settings: DispatchSettings,
    replica: Replica,
    owner: Owner,
    *,
    check_contents: bool,
    stop_reason: Callable[[], str | None],
) -> OpenBatch:
    """Open the run folders, wait for this job's turn in each, plan, and read what is committed.

    ``check_contents`` compares the hashes of all files with their records, not only the sizes. ``stop_reason`` returns
    why to stop, or None.

    Raises ``RunFolderError`` when a folder cannot be used, another job works there (``on_busy=refuse``), or records
    differ from the settings (``resume=strict``), and ``StoryMemError`` for settings that do not fit the stories.
    """
    leases = [
        LeaseFolder(folder=part.run.leases_folder, owner=owner, lease_seconds=settings.lease_seconds) for part in parts
    ]
    try:
        for part, folder in zip(parts, leases, strict=True):
            part.run.open(len(part.stories))
            if not _enter(part.run, folder, settings, stop_reason):
                parts = ()  # asked to stop before the turn came: there is nothing to do
                break
            if part.config_hash:
                part.run.write_config(part.config_hash, part.config_text)
        requests = QueueRequests(parts, replica, look_seconds=settings.poll_seconds)
        requests.read()
        _force_rerenders(parts, settings, owner.job_id)
        planned, rejected = _plan(parts, replica, owner.job_id, requests)
        graph = ShotGraph(planned)
        runs = [part.run for part in parts]
        queue = ShotQueue(
            graph=graph,
            runs=runs,
            leases=leases,
            settings=settings,
            job_id=owner.job_id,
            num_replicas=replica.count,
        )
        queue.read_committed(share(graph, replica))
        requests.begin(queue)
        if settings.resume == "strict":
            _refuse_differences(parts, graph, requests)
        for index, part in enumerate(parts):
            clean_up(part.run, leases[index], graph.stories_of(index), queue)
        own = share(graph, replica)
        num_skipped = sum(_check_story(parts[story.part], story, queue, check_contents) for story in own)
        queue.scan(force=True)
        num_finished = graph.count(ShotStatus.COMMITTED)
        for story in own:
            _report_ended(parts[story.part], story, queue, check_contents)
    except BaseException as error:
        for folder in leases:
            folder.close()
        if isinstance(error, OSError):
            raise RunFolderError(f"output={parts[0].run.root} cannot be used: {error}") from error
        raise
    return OpenBatch(
        queue=queue,
        runs=runs,
        leases=leases,
        rejected=rejected,
        num_skipped=num_skipped,
        num_finished_before=num_finished,
        help=Help(replica.index),
        requests=requests,
    )


def why_again(part: BatchPart, shot: PlannedShot, *, asked_for: Collection[str] = ()) -> str:
    """Return what changed since ``shot`` was rendered from other inputs; empty when it has no such record.

    ``asked_for``: inputs that a person had changed to render it, or a shot that it needs, again; these do not count.
    """
    other = part.run.shot(shot.story_id, shot.shot_id).newest_other_record(shot.fingerprint)
    if other is None:
        return ""
    before, after = ({key: inputs[key] for key in inputs.keys() - asked_for} for inputs in (other.inputs, shot.inputs))
    changes = differences(before, after)
    if not changes and not asked_for and other.predecessor != shot.predecessor:
        changes = ["a shot that it needs is rendered again"]
    return "; ".join(changes)


def _enter(
    run: RunFolder, leases: LeaseFolder, settings: DispatchSettings, stop_reason: Callable[[], str | None]
) -> bool:
    """Begin to work in a folder: at once (``join``), or once no other job does. False if asked to stop before that."""
    if settings.on_busy == "join":
        leases.start(WORKING)
        return True
    leases.start(WAITING)
    while stop_reason() is None:
        others = leases.others_working()
        if not others:
            leases.set_state(WORKING)
            if not leases.others_working():
                return True
            leases.set_state(WAITING)  # two jobs entered at once: each saw the other, and both withdraw
        elif settings.on_busy == "refuse" and (busy := leases.surely_working(others)):
            raise RunFolderError(
                f"output={run.root} is in use by another job (process {busy.pid} on {busy.host}); "
                "stop it, give another output, or set dispatch.on_busy=join or wait"
            )
        time.sleep(settings.poll_seconds * random.uniform(0.5, 1.5))  # random, so that they do not meet again
    return False


def _force_rerenders(parts: Sequence[BatchPart], settings: DispatchSettings, job_id: str) -> None:
    if not settings.rerender:
        return
    for part in parts:
        known = [(story.story_id, {shot.shot_id: shot.name for shot in story.shots}) for story in part.stories]
        part.run.rerender(shot_ids(settings.rerender, known), job_id)


def _plan(
    parts: Sequence[BatchPart], replica: Replica, job_id: str, requests: QueueRequests
) -> tuple[list[tuple[PlannedShot, ...]], list[tuple[int, FailureRecord]]]:
    stories: list[tuple[PlannedShot, ...]] = []
    rejected: list[tuple[int, FailureRecord]] = []
    for part_index, part in enumerate(parts):
        for position, (story, planned) in enumerate(plan_part(part_index, part, requests.states[part_index])):
            reports = position % replica.count == replica.index
            if reports:
                waits = () if isinstance(planned, StoryboardError) else tuple(shot.waits_for for shot in planned)
                part.observers.notify(
                    StoryStarted(
                        story_id=story.story_id,
                        name=story.name,
                        num_shots=len(story.shots),
                        waits_for=waits,
                        priority=story.priority,
                    )
                )
            if not isinstance(planned, StoryboardError):
                stories.append(planned)
                continue
            failure = FailureRecord(
                story_id=story.story_id,
                shot_id=story.shots[0].shot_id,
                fingerprint="",
                reason=str(planned),
                error_type=type(planned).__name__,
                is_final=True,
                low_memory=False,
                job_id=job_id,
            )
            rejected.append((part_index, failure))
            if reports:
                part.observers.notify(StoryFinished(story_id=story.story_id, outcome="failed", message=failure.reason))
    return stories, rejected


def _refuse_differences(parts: Sequence[BatchPart], graph: ShotGraph, requests: QueueRequests) -> None:
    found = []
    for story in graph.stories:
        is_forced = any("forced_rerenders" in shot.inputs for shot in story.shots)
        for shot, state in zip(story.shots, story.states, strict=True):
            own_seed = requests.states[story.part].again(story.story_id, shot.shot_id)[0].seed is not None
            asked_for = ["forced_rerenders", *(["seed"] if own_seed else [])] if is_forced else []
            why = "" if state is ShotStatus.COMMITTED else why_again(parts[story.part], shot, asked_for=asked_for)
            if why:
                found.append(f"{story.story_id}:{shot.shot_id}: {why}")
    if found:
        more = f"; and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        raise RunFolderError(
            f"output={parts[0].run.root} holds shots made from other inputs, and dispatch.resume=strict allows no "
            "difference; use dispatch.resume=continue to render them again, or another output: "
            + "; ".join(found[:_MAX_SHOWN])
            + more
        )


def share(graph: ShotGraph, replica: Replica) -> list[StoryGraph]:
    """The stories whose records this replica checks at the start."""
    return [story for story in graph.stories if story.number % replica.count == replica.index]


def _check_story(part: BatchPart, story: StoryGraph, queue: ShotQueue, check_contents: bool) -> int:
    """Check the committed shots of a story against their files and repair their views; return how many are intact."""
    good = 0
    for shot, state in zip(story.shots, list(story.states), strict=True):
        if state is not ShotStatus.COMMITTED:
            continue
        folder = part.run.shot(story.story_id, shot.shot_id)
        try:
            record = folder.require_record(shot.fingerprint, check_contents=check_contents)
            folder.discard_orphans(shot.fingerprint)
            part.run.finish_commit(record)
        except DamagedRecord as damage:
            part.observers.notify(WarningIssued(message=f"{damage}; the shot is rendered again", source="resume"))
            queue.graph.set_state(shot, ShotStatus.WAITING)
        else:
            good += 1
            part.observers.notify(ShotSkipped(story_id=story.story_id, shot_id=shot.shot_id))
    return good


def _report_ended(part: BatchPart, story: StoryGraph, queue: ShotQueue, check_contents: bool) -> None:
    """Notify the observers of a story that is complete, and of shots that failed before and block others."""
    if story.is_complete:
        fingerprints = [shot.fingerprint for shot in story.shots]
        if has_story_video(part.run, story.story_id, fingerprints, check_contents=check_contents):
            notify_story_finished(part, story)
        return
    for shot in story.failed:
        part.observers.notify(ShotSkipped(story_id=story.story_id, shot_id=shot.shot_id, reason="failed before"))
    for event in shots_blocked(story, set()):
        part.observers.notify(event)
    if story.is_failed:
        part.observers.notify(story_failed(story, queue.failures))
