"""The leader's desk: everything of a batch that touches the run folder.

``render_batch`` runs on all ranks of a replica; what it asks of the desk goes through ``leader_decides``, so only the
leader's desk is ever opened. Every method returns plain values that can be sent to the other ranks, tensors on the CPU.
Knows the queue, the run folder and the observers; nothing of ranks, models or how a shot is rendered.
"""

import contextlib
import time
from collections.abc import Sequence

from storymem_dist.artifacts.run_folder import Failure
from storymem_dist.artifacts.shot_folder import ShotFolder, new_attempt_id
from storymem_dist.diffusion.denoise import DenoiseState
from storymem_dist.dispatch import announcing
from storymem_dist.dispatch.graph import ShotState
from storymem_dist.dispatch.history import DamagedHistory, read_checkpoint, read_history
from storymem_dist.dispatch.jobs import Assignment, End, RenderedShot, ShotJob
from storymem_dist.dispatch.joining import Joined, StoryJoiner
from storymem_dist.dispatch.leases import Owner
from storymem_dist.dispatch.opening import OpenBatch, open_batch, why_again
from storymem_dist.dispatch.plan import BatchPart, PlannedShot
from storymem_dist.dispatch.queue import Claim, ShotQueue
from storymem_dist.dispatch.saving import save_shot
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import DONE, FAILED, STOPPED, BatchSummary, Replica, Tally, summarize
from storymem_dist.errors import RunFolderError
from storymem_dist.observe.events import (
    ReplicaWaited,
    StopRequested,
    WarningIssued,
    timed_stage,
)

_LONGEST_PAUSE = 4.0  # between two looks while there is nothing to do, in units of poll_seconds
_LEASE_LOOK_SECONDS = 1.0  # between two looks at the own lease while a shot is rendered


class Desk:
    """The leader's view of a batch. Making one touches nothing; ``open`` does."""

    def __init__(
        self,
        *,
        parts: Sequence[BatchPart],
        settings: DispatchSettings,
        replica: Replica,
        stop: StopSwitch,
        check_contents: bool,
    ) -> None:
        self._parts = parts
        self._settings = settings
        self._replica = replica
        self._stop = stop
        self._check_contents = check_contents
        self._owner = Owner.this_process(replica.job_id, replica.index)
        self._batch: OpenBatch | None = None
        self._claim: Claim | None = None
        self._attempt_id = ""
        self._resumed_at: int | None = None
        self._lost = False
        self._next_lease_look = 0.0
        self._end: End | None = None
        self._announced_stop = False
        self._tally = Tally()
        self._began = time.monotonic()
        self._shot_began = 0.0

    # -- begin and end -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the run folders and find out what is to do. Raises as ``open_batch``."""
        self._stop.reason()  # a stop file that is there now belongs to an earlier job
        self._batch = open_batch(
            self._parts,
            self._settings,
            self._replica,
            self._owner,
            check_contents=self._check_contents,
            stop_reason=self._stop.reason,
        )
        self._tally.num_skipped = self._batch.num_skipped
        if self._replica.index == 0:
            for part, leases in zip(self._parts, self._batch.leases, strict=True):
                if not leases.others_working():
                    part.run.remove_stop()

    def finish(self, end: End) -> BatchSummary:
        """Write ``stop.json``, tell the observers, release what is held, and sum up."""
        summary = self._summary(end)
        for number, part in enumerate(self._parts):
            of_part = self._summary(end, number)
            details = {
                "reason": end.reason,
                "job_id": self._owner.job_id,
                "replica": self._replica.index,
                "num_stories": of_part.num_stories,
                "num_stories_done": of_part.num_stories_done,
                "num_failed": of_part.num_failed,
                "num_blocked": of_part.num_blocked,
            }
            try:
                part.run.write_stop(of_part.state, **details)
            except OSError as error:
                self._warn(part, f"stop.json cannot be written: {error}", "save")
            part.observers.notify(announcing.job_finished(summary))
        self.close()
        return summary

    def close(self, *, crashed: bool = False) -> None:
        """Release everything that is held; after a crash leave the lease behind, so that the next one can count it."""
        if self._batch is not None:
            for leases in self._batch.leases:
                leases.close(release=not crashed)
            self._batch = None

    # -- the next shot -------------------------------------------------------------------------------------------------

    def next_assignment(self, loaded: str | None) -> Assignment | End:
        """Wait for a shot that this replica can render; ``loaded`` is the kind whose experts it has."""
        waited, pause = 0.0, self._settings.poll_seconds
        while self._end is None:
            if reason := self._stop.reason():
                self._announce_stop(reason)
                self._end = End(state=STOPPED, reason=reason)
                break
            try:
                claim = self._queue.claim(loaded)
                if claim is not None:
                    if (assignment := self._assign(claim)) is None:
                        continue
                    self._note_wait(waited)
                    return assignment
                if self._queue.graph.is_finished and self._join_what_is_left():
                    self._end = self._outcome()
                    break
            except OSError as error:
                self._end = End(state=FAILED, reason=f"the run folder cannot be used any more: {error}")
                break
            began = time.monotonic()
            time.sleep(pause)
            waited += time.monotonic() - began
            pause = min(1.5 * pause, _LONGEST_PAUSE * self._settings.poll_seconds)
        self._note_wait(waited)
        return self._end

    def _assign(self, claim: Claim) -> Assignment | None:
        """Gather what rendering the claimed shot needs; None when a record before it turned out to be damaged."""
        shot, part = claim.shot, self._parts[claim.shot.part]
        folder = self._folder(shot)
        folder.discard_orphans(shot.fingerprint)
        part.run.write_storyboard(shot.story)
        try:
            history = read_history(part.run, self._queue.graph.chain_of(shot), shot.shot.index)
        except DamagedHistory as damage:
            self._warn(part, f"{damage}; the shot is rendered again", "resume")
            self._queue.release(claim, ShotState.WAITING)
            self._queue.graph.set_state(damage.shot, ShotState.WAITING)
            return None
        self._claim, self._lost, self._next_lease_look = claim, False, 0.0
        self._shot_began = time.monotonic()
        self._attempt_id = new_attempt_id(shot.fingerprint, self._owner.owner_id)
        why = why_again(part, shot)
        job = ShotJob(
            part=shot.part,
            story=shot.story,
            shot=shot.shot,
            kind=shot.kind,
            mode=shot.mode,
            seed=shot.seed,
            fingerprint=shot.fingerprint,
            attempt_id=self._attempt_id,
            why=why,
        )
        part.observers.notify(announcing.shot_started(job, part, history))
        part.observers.notify(announcing.queue_sampled(self._queue.graph))
        resume = None
        try:
            resume = read_checkpoint(part.run, shot)
        except RunFolderError as error:
            self._warn(part, f"{error}; the shot starts again", "resume")
        self._resumed_at = None if resume is None else resume.step
        if resume is not None:
            part.observers.notify(announcing.shot_resumed(job, resume))
        return Assignment(job=job, history=history, resume=resume, low_memory=claim.low_memory)

    # -- while a shot is rendered --------------------------------------------------------------------------------------

    def should_stop(self) -> bool:
        """Whether the running shot is to be left between two steps: a stop was asked for, or another replica has it."""
        now = time.monotonic()
        if now >= self._next_lease_look and not self._lost:
            self._next_lease_look = now + _LEASE_LOOK_SECONDS
            self._lost = not self._still_held()
        if reason := self._stop.reason():
            self._announce_stop(reason)
            return True
        return self._lost

    def save_checkpoint(self, state: DenoiseState) -> None:
        """Save the running shot between two steps. A failure is a warning: the render goes on without."""
        shot, part = self._held.shot, self._parts[self._held.shot.part]
        path = part.run.checkpoint(shot.story.story_id, shot.shot.shot_id, shot.fingerprint)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            state.save(path)
        except (OSError, RunFolderError) as error:
            self._warn(part, f"{error}; the render goes on without this step checkpoint", "save")

    def note_prepared(self, elapsed_seconds: float, *, swapped: bool) -> None:
        """Learn how long loading experts took; ``swapped``: others were there before."""
        self._tally.add_stages({"load": elapsed_seconds})
        if swapped:
            self._queue.note_swapped(elapsed_seconds)

    # -- how a shot ended ----------------------------------------------------------------------------------------------

    def shot_stopped(self, state: DenoiseState) -> None:
        """The running shot was left between two steps: save it for later, unless another replica has taken it over."""
        if not self._still_held():
            self._give_up_lost_shot()
            return
        self.save_checkpoint(state)
        self._let_go(ShotState.WAITING)

    def shot_rendered(self, rendered: RenderedShot) -> None:
        """Save and publish a rendered shot; when that is impossible, the shot has failed."""
        shot, part, folder = self._held.shot, self._parts[self._held.shot.part], self._folder(self._held.shot)
        story_id, shot_id = shot.story.story_id, shot.shot.shot_id
        seconds = dict(rendered.stage_seconds)
        try:
            with timed_stage(part.observers, "save", story_id=story_id, shot_id=shot_id, totals=seconds):
                record = save_shot(
                    folder,
                    part,
                    shot,
                    rendered,
                    attempt_id=self._attempt_id,
                    host={
                        "replica": self._replica.index,
                        "job_id": self._owner.job_id,
                        "resumed_at_step": self._resumed_at,
                    },
                )
                published = folder.publish(record, may_publish=self._still_held)
        except OSError as error:
            folder.discard_attempt(self._attempt_id)
            self.shot_failed(f"the shot cannot be saved: {error}", type(error).__name__)
            return
        if not published:
            self._give_up_lost_shot()
            return
        try:
            folder.repair_views(record)
            part.run.remove_checkpoints(story_id, shot_id, shot.fingerprint)
            part.run.remove_failure(story_id, shot_id, shot.fingerprint)
        except OSError as error:
            self._warn(part, f"{story_id}:{shot_id} is committed, but not everything is in its place: {error}", "save")
        elapsed = time.monotonic() - self._shot_began
        self._tally.num_rendered += 1
        self._tally.num_resumed += self._resumed_at is not None
        self._tally.add_stages(seconds)
        self._queue.note_rendered(shot, elapsed)
        part.observers.notify(announcing.shot_finished(record, part, elapsed, seconds))
        self._let_go(ShotState.COMMITTED)
        chain = self._queue.graph.chain_of(shot)
        if chain.is_complete:
            try:
                self._joiner.join(chain)
            except OSError as error:  # tried again before the end
                self._warn(part, f"{story_id} cannot be joined now: {error}", "join")

    def shot_failed(self, reason: str, error_type: str, *, details: str = "", low_memory_next: bool = False) -> None:
        """The held shot cannot be rendered: mark it, and so all after it; or have it tried again with less memory."""
        if not self._still_held():
            self._give_up_lost_shot()
            return
        shot, part = self._held.shot, self._parts[self._held.shot.part]
        failure = Failure(
            story_id=shot.story.story_id,
            shot_id=shot.shot.shot_id,
            fingerprint=shot.fingerprint,
            reason=reason,
            error_type=error_type,
            is_final=not low_memory_next,
            low_memory=low_memory_next,
            job_id=self._owner.job_id,
            details=details,
        )
        part.observers.notify(announcing.shot_failed(failure, self._attempt_id))
        try:
            self._queue.mark_failed(failure, shot)
        except OSError as error:
            where = f"{failure.story_id}:{failure.shot_id}"
            self._end = End(state=FAILED, reason=f"{where}: {reason}; nor can that be noted: {error}")
        self._let_go(ShotState.FAILED if failure.is_final else ShotState.WAITING)
        chain = self._queue.graph.chain_of(shot)
        if chain.is_blocked:
            for event in announcing.chain_blocked(chain, reason):
                part.observers.notify(event)

    def note_out_of_memory(self, assignment: Assignment, reason: str) -> None:
        """Leave a note for after the restart: try the shot with less memory, or not at all if that was it.

        The one thing that any rank may write, because the rank that ran out of memory is the only one that knows.
        """
        job = assignment.job
        failure = Failure(
            story_id=job.story.story_id,
            shot_id=job.shot.shot_id,
            fingerprint=job.fingerprint,
            reason=reason,
            error_type="OutOfMemoryError",
            is_final=assignment.low_memory,
            low_memory=True,
            job_id=self._owner.job_id,
        )
        self._parts[job.part].observers.notify(announcing.shot_failed(failure, job.attempt_id))
        with contextlib.suppress(OSError):  # then the restarted job tries once more as before
            self._parts[job.part].run.write_failure(failure)

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def _queue(self) -> ShotQueue:
        assert self._batch is not None, "the desk is not open"
        return self._batch.queue

    @property
    def _joiner(self) -> StoryJoiner:
        assert self._batch is not None, "the desk is not open"
        return StoryJoiner(parts=self._parts, leases=self._batch.leases, graph=self._batch.queue.graph)

    @property
    def _held(self) -> Claim:
        assert self._claim is not None, "no shot is held"
        return self._claim

    def _folder(self, shot: PlannedShot) -> ShotFolder:
        return self._parts[shot.part].run.shot(shot.story.story_id, shot.shot.shot_id)

    def _still_held(self) -> bool:
        return self._queue.still_held(self._held)

    def _let_go(self, state: ShotState) -> None:
        self._queue.release(self._held, state)
        self._claim = None

    def _give_up_lost_shot(self) -> None:
        shot = self._held.shot
        self._parts[shot.part].observers.notify(announcing.shot_lost(shot, self._attempt_id))
        self._let_go(ShotState.LEASED)

    def _join_what_is_left(self) -> bool:
        """Join the complete stories that nobody has joined; False when there may be more to do after that."""
        chains = self._queue.graph.chains
        first = len(chains) * self._replica.index // self._replica.count  # replicas begin at different places
        ends = [self._joiner.join(chain) for chain in chains[first:] + chains[:first] if chain.is_complete]
        return not any(end in (Joined.ELSEWHERE, Joined.DAMAGED) for end in ends)

    def _announce_stop(self, reason: str) -> None:
        if not self._announced_stop:
            self._announced_stop = True
            for part in self._parts:
                part.observers.notify(StopRequested(reason=reason))

    def _note_wait(self, waited_seconds: float) -> None:
        if waited_seconds > 0.0:
            self._tally.waited_seconds += waited_seconds
            for part in self._parts:
                part.observers.notify(ReplicaWaited(elapsed_seconds=waited_seconds))

    def _warn(self, part: BatchPart, message: str, source: str) -> None:
        part.observers.notify(WarningIssued(message=message, source=source))

    def _outcome(self) -> End:
        num_failed = sum(chain.is_blocked for chain in self._queue.graph.chains)
        num_failed += len(self._batch.rejected) if self._batch else 0
        if not num_failed:
            return End(state=DONE)
        return End(state=FAILED, reason=f"{num_failed} stories could not be rendered to their end")

    def _summary(self, end: End, part: int | None = None) -> BatchSummary:
        """How the batch stands, or one part of it; the tally is this replica's in both cases."""
        assert self._batch is not None, "the desk is not open"
        return summarize(
            end.state,
            end.reason,
            chains=[chain for chain in self._queue.graph.chains if part in (None, chain.part)],
            rejected=[failure for of, failure in self._batch.rejected if part in (None, of)],
            failures=[failure for key, failure in self._queue.failures.items() if part in (None, key[0])],
            tally=self._tally,
            elapsed_seconds=time.monotonic() - self._began,
            is_whole=part is None,
        )
