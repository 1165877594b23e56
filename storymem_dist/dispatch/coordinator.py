"""One replica's view of a batch: its leader claims shots, saves them and reports failures in the run folder.

``render.batch`` runs on all ranks of a replica and calls the ``Coordinator`` through ``leader_decides``, so only the
leader's is ever opened. Every method returns plain values that can be sent to the other ranks, tensors on the CPU.

A thread (``saving``) saves a rendered shot while the replica renders a shot of another story. The coordinator handles
the outcome at its next call, at the latest before the next step. So a replica holds at most two shots: the running one
and the one being saved. It waits for the save when no other shot is ready.

Knows the queue, the run folder and the observers; nothing of ranks, models or how a shot is rendered.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial

from storymem_dist.diffusion.denoise import DenoiseState
from storymem_dist.dispatch import announcing
from storymem_dist.dispatch.assigning import assign
from storymem_dist.dispatch.ending import Ending, outcome_of, unusable
from storymem_dist.dispatch.graph import shot_key
from storymem_dist.dispatch.opening import OpenBatch, open_batch, share
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import Assignment, Called, End, RenderedShot, ShotJob
from storymem_dist.dispatch.queue import OPERATIONS_PER_LEASE_CHECK, Claim, ShotQueue, failure_at
from storymem_dist.dispatch.saving import BackgroundSave, HeldShot, SaveEnd, save_checkpoint
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.story_ends import StoryEnds
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.dispatch.story_video import StoryVideoMaker
from storymem_dist.dispatch.summary import STOPPED, BatchSummary, Replica, Tally
from storymem_dist.dispatch.tail import ElasticTail, TeamRules
from storymem_dist.errors import MachineError
from storymem_dist.events import ReplicaWaited, StopRequested, WarningIssued

_LONGEST_PAUSE = 4.0  # between two claims while no shot is ready, in units of poll_seconds
_LEASE_CHECK_SECONDS = 1.0  # between two checks of the lease of the running shot


class Coordinator:
    """The leader's view of a batch. Creating one touches no file; ``open`` does."""

    def __init__(
        self,
        *,
        parts: Sequence[BatchPart],
        settings: DispatchSettings,
        replica: Replica,
        stop: StopSwitch,
        check_contents: bool,
        team_rules: Callable[[], TeamRules] | None = None,
    ) -> None:
        self._parts = parts
        self._settings = settings
        self._replica = replica
        self._stop = stop
        self._check_contents = check_contents
        self._owner = Owner.this_process(replica.job_id, replica.index)
        self._batch: OpenBatch | None = None
        self._running: HeldShot | None = None
        self._saving: BackgroundSave | None = None
        self._lost = False
        self._next_lease_check = 0.0
        self._end: End | None = None
        self._announced_stop = False
        self._ends = StoryEnds(parts)
        self._tail = ElasticTail(team_rules, poll_seconds=settings.poll_seconds)
        self._tally = Tally()
        self._began = time.monotonic()

    # -- begin and end -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the run folders and plan the batch. Raises as ``open_batch``."""
        self._tail.open()
        self._stop.start_watching()  # changes nothing where the job has done so already
        self._batch = open_batch(
            self._parts,
            self._settings,
            self._replica,
            self._owner,
            check_contents=self._check_contents,
            stop_reason=self._stop.reason,
        )
        self._stop.when_requested(self._batch.note_stopping, self._queue.pace)
        self._tally.num_skipped = self._batch.num_skipped
        self._ends.know(self._queue.graph.stories)
        if self._replica.index == 0:
            for part, leases in zip(self._parts, self._batch.leases, strict=True):
                if not leases.others_working():
                    part.run.remove_outcome()  # of the job before this one

    def finish(self, end: End) -> BatchSummary:
        """Write ``stop.json``, notify the observers, release all leases, and return the summary.

        The first replica then waits, for a while, for the others to stop, so that its summary is that of the whole job.
        Raises ``MachineError`` when ``stop.json`` cannot be written.
        """
        ending = Ending(parts=self._parts, batch=self._opened, end=end, tally=self._tally, began=self._began)
        fault = ending.report(self._owner)
        self.close()
        if fault is not None:
            raise fault
        if end.state == STOPPED and self._replica.index == 0 and self._replica.count > 1:
            ending.wait_for_peers()
        return ending.summary()

    def close(self, *, crashed: bool = False, at_once: bool = False) -> None:
        """Wait for the save in progress, or abandon it with ``at_once``, then release all leases.

        After a crash the running shot's lease stays: the next process to claim the shot then knows that one died on it.
        """
        if self._batch is None:
            return
        if crashed:
            self._running = None  # its lease stays
        if self._saving is not None and at_once:
            self._saving.abandon()  # it ends at its next file, so the wait below is short
        try:
            self._collect_saved(wait=True)
        except Exception as error:  # must not replace the error that ends the batch
            self._warn(self._parts[0], f"a shot could not be saved: {type(error).__name__}: {error}", "save")
        self._batch.leave(crashed=crashed)
        self._batch = None

    # -- the next shot -------------------------------------------------------------------------------------------------

    def next_assignment(self, loaded: str | None, lora_key: str = "") -> Assignment | Called | End:
        """Wait for a shot that this replica can render, alone or with others, or for the end.

        ``loaded``: the kind of its loaded experts, ``lora_key``: the LoRAs of a shot that they have.

        Raises ``MachineError`` when the run folder can no longer be used.
        """
        waited, pause = 0.0, self._settings.poll_seconds
        self._collect_saved()
        while self._end is None:
            if (merge := self._tail.look_for_work(loaded)) is not None:
                self._note_wait(waited)
                return Called(merge=merge)
            try:
                self._opened.requests.follow(self._queue)
                if reason := self._stop_reason(between_shots=True):
                    self._announce_stop(reason)
                    self._end = End(state=STOPPED, reason=reason)
                    break
                claim = self._queue.claim(loaded, lora_key, lambda shot: self._tail.instead(shot, self._queue))
                for shot, failure in self._queue.take_given_up():
                    self._parts[shot.part].observers.notify(announcing.shot_failed(failure, ""))
                    self._ends.announce_blocked(self._queue.graph.story_of(shot), self._queue.failures)
                if claim is not None:
                    if (assignment := self._assign(claim)) is None:
                        continue
                    self._note_wait(waited)
                    return assignment
                if self._queue.graph.is_finished and self._make_missing_story_videos():
                    for story in share(self._queue.graph, self._replica):  # ended by failures on other replicas
                        self._ends.announce_if_failed(story, self._queue.failures)
                    self._end = outcome_of(self._opened)
                    break
            except OSError as error:
                raise unusable(error) from error
            if self._saving is not None:
                self._saving.wait(pause)
                self._collect_saved()
                continue
            began = time.monotonic()
            self._tail.wait(pause)
            waited += time.monotonic() - began
            pause = min(1.5 * pause, _LONGEST_PAUSE * self._settings.poll_seconds)
        self._tail.end()
        self._collect_saved(wait=True)
        self._note_wait(waited)
        return self._end

    def _assign(self, claim: Claim) -> Assignment | None:
        """Begin an attempt at the claimed shot; None when a record before it is damaged."""
        part = self._parts[claim.shot.part]
        found = assign(claim, part, queue=self._queue, tail=self._tail, owner=self._owner, replica=self._replica)
        if found is None:
            return None
        assignment, self._running = found
        self._lost, self._next_lease_check = False, 0.0
        return assignment

    # -- while a shot is rendered --------------------------------------------------------------------------------------

    def should_stop(self) -> bool:
        """Whether to stop the running shot between two steps: a stop was requested, another replica has taken it over,
        it is not to be rendered any more, or the save of the previous shot ended with an error that ends the batch.
        """
        if self._saving is not None and self._saving.has_crashed:
            return True  # a later call raises the error, so that the running shot is not blamed for it
        self._collect_saved()
        now = time.monotonic()
        if now >= self._next_lease_check and not self._lost:
            self._next_lease_check = now + self._queue.pace.seconds(_LEASE_CHECK_SECONDS, OPERATIONS_PER_LEASE_CHECK)
            self._lost = not self._queue.still_held(self._held.claim)
        try:
            self._opened.requests.follow(self._queue, in_shot=True)
        except OSError as error:
            raise unusable(error) from error
        if reason := self._stop_reason():
            self._announce_stop(reason)
            return True
        return self._lost or self._end is not None or not self._opened.requests.is_wanted(self._held.shot, self._queue)

    def save_checkpoint(self, state: DenoiseState) -> None:
        """Save the running shot between two steps. Raises ``MachineError``; another failure is only a warning."""
        save_checkpoint(self._parts[self._held.shot.part], self._held.shot, state)

    def note_helping(self, job: ShotJob | None) -> None:
        """This replica helps another to render ``job``; None: it does not any more."""
        self._opened.note_helping(job, is_stopping=lambda: self._stop.reason() is not None)

    def note_prepared(self, elapsed_seconds: float, *, swapped: bool) -> None:
        """Note how long loading experts took; ``swapped``: whether they replaced others."""
        self._tally.add_stages({"load": elapsed_seconds})
        if swapped:
            self._queue.note_swapped(elapsed_seconds)

    # -- how a shot ended ----------------------------------------------------------------------------------------------

    def shot_stopped(self, state: DenoiseState | None) -> None:
        """The running shot stopped: save its state, if it has one, unless another replica has taken it over."""
        held = self._held
        if self._gives_up(held):
            return
        try:
            if state is not None:
                self.save_checkpoint(state)
        finally:
            self._release(held, ShotStatus.WAITING)

    def shot_rendered(self, rendered: RenderedShot) -> None:
        """Start to save and publish a rendered shot. If it cannot be saved, the shot has failed."""
        self._collect_saved(wait=True)
        held, self._running = self._held, None
        self._queue.note_saving(held.claim)
        self._saving = BackgroundSave(
            held,
            rendered,
            part=self._parts[held.shot.part],
            story=self._queue.graph.story_of(held.shot),
            story_videos=self._story_videos,
            host={"replica": self._replica.index, "job_id": self._owner.job_id, "resumed_at_step": held.resumed_at}
            | ({} if held.merge is None else {"replicas": list(held.merge.team.replicas)}),
            may_publish=partial(self._may_publish, held),
            release=partial(self._queue.release_lease, held.claim),
        )
        if not self._settings.overlap_saving:
            self._collect_saved(wait=True)

    def _collect_saved(self, *, wait: bool = False) -> None:
        """Handle a save that has ended; ``wait`` for its end. Raises an error that is not the fault of one shot."""
        save = self._saving
        if save is None or not (wait or save.has_ended):
            return
        save.wait()
        self._saving = None
        try:
            saved, held = save.outcome(), save.held
        except Exception as error:
            for blameless in [self._running, save.held if isinstance(error, MachineError) else None]:
                if blameless is not None:  # so its lease counts no death
                    self._release(blameless, ShotStatus.WAITING)
            raise
        match saved.end:
            case SaveEnd.COMMITTED:
                self._tally.num_rendered += 1
                self._tally.num_resumed += held.resumed_at is not None
                self._tally.add_stages(saved.stage_seconds)
                if held.merge is None:
                    self._queue.note_rendered(held.shot, saved.elapsed_seconds)
                self._release(held, ShotStatus.COMMITTED)
                if (entry := self._queue.graph.find(shot_key(held.shot))) is not None:
                    self._ends.announce_if_failed(entry[0], self._queue.failures)
                self._opened.requests.note_committed(held.shot, self._queue)
                for shot in saved.damaged:
                    self._queue.mark_damaged(shot)
            case SaveEnd.LOST:
                self._gives_up(held, lost=True)
            case SaveEnd.FAILED:
                self._fail(held, f"the shot cannot be saved: {saved.error}", type(saved.error).__name__)

    def shot_failed(self, reason: str, error_type: str, *, details: str = "", low_memory_next: bool = False) -> None:
        """The running shot cannot be rendered: mark it failed, which blocks those that need it, or retry with less."""
        self._fail(self._held, reason, error_type, details=details, low_memory_next=low_memory_next)

    def _fail(
        self, held: HeldShot, reason: str, error_type: str, *, details: str = "", low_memory_next: bool = False
    ) -> None:
        if self._gives_up(held):
            return
        shot, part = held.shot, self._parts[held.shot.part]
        is_final = not low_memory_next
        failure = failure_at(
            shot, reason, error_type, self._owner.job_id, is_final=is_final, low_memory=low_memory_next, details=details
        )
        part.observers.notify(announcing.shot_failed(failure, held.attempt_id))
        try:
            self._queue.mark_failed(failure, shot)
        except OSError as error:
            self._release(held, ShotStatus.WAITING)
            raise unusable(error) from error
        self._release(held, ShotStatus.FAILED if failure.is_final else ShotStatus.WAITING)
        if failure.is_final:
            self._ends.announce_blocked(self._queue.graph.story_of(shot), self._queue.failures)

    def note_out_of_memory(self, assignment: Assignment, reason: str) -> None:
        """Record for the restart: retry the shot with less memory, or not at all if it already had less.

        Any rank may write this and nothing else, because only the rank that ran out of memory knows.
        """
        job = assignment.job
        failure = failure_at(
            job, reason, "OutOfMemoryError", self._owner.job_id, is_final=assignment.low_memory, low_memory=True
        )
        self._parts[job.part].observers.notify(announcing.shot_failed(failure, job.attempt_id))
        with contextlib.suppress(OSError):  # then the restarted job retries it unchanged
            self._parts[job.part].run.write_failure(failure)

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def _opened(self) -> OpenBatch:
        assert self._batch is not None, "the coordinator is not open"
        return self._batch

    @property
    def _queue(self) -> ShotQueue:
        return self._opened.queue

    @property
    def _story_videos(self) -> StoryVideoMaker:
        return StoryVideoMaker(parts=self._parts, view=self._queue, check_contents=self._check_contents)

    @property
    def _held(self) -> HeldShot:
        assert self._running is not None, "no shot is held"
        return self._running

    def _release(self, held: HeldShot, state: ShotStatus) -> None:
        self._queue.release(held.claim, state)
        if held is self._running:
            self._running = None

    def _gives_up(self, held: HeldShot, *, lost: bool = False) -> bool:
        """Give up an attempt whose shot was planned anew on request, or which another replica has taken over (``lost``:
        that is known); return whether it was. Nothing of it is kept.
        """
        shot, part = held.shot, self._parts[held.shot.part]
        if self._queue.graph.find(shot_key(shot)) is None:
            part.observers.notify(announcing.shot_replaced(shot, held.attempt_id))
            with contextlib.suppress(OSError):
                part.run.remove_checkpoints(shot.story_id, shot.shot_id, shot.fingerprint)
            self._release(held, ShotStatus.WAITING)
        elif lost or not self._queue.still_held(held.claim):
            part.observers.notify(announcing.shot_lost(shot, held.attempt_id))
            self._release(held, ShotStatus.LEASED)  # to the replica that has taken it over
        else:
            return False
        return True

    def _may_publish(self, held: HeldShot) -> bool:
        """Whether a rendered shot may be committed. Called in the thread that saves it."""
        return self._queue.graph.find(shot_key(held.shot)) is not None and self._queue.still_held(held.claim)

    def _stop_reason(self, *, between_shots: bool = False) -> str | None:
        """Why to stop: a request to stop without ``--now`` counts only between two shots."""
        asked = self._opened.requests.stop
        if asked is not None and (asked.now or between_shots):
            self._stop.request(f"stop requested by {asked.who}")
        return self._stop.reason()

    def _make_missing_story_videos(self) -> bool:
        """Make the videos of complete stories that have none; False when the batch may not be finished after that."""
        stories = [story for story in self._queue.graph.stories if not self._queue.video_is_known(story)]
        first = len(stories) * self._replica.index // self._replica.count  # each replica begins with other stories
        return self._story_videos.make_missing(stories[first:] + stories[:first], self._queue.mark_damaged)

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
