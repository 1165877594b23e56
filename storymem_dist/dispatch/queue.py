"""Claims shots: which shot this replica renders next, and the lease that entitles it.

One ``ShotQueue`` belongs to the leader of one replica. It holds the graph of all shots and shares the lease folders
with the other replicas of its job and with other jobs. Its view of the folders (``scanning``) may be outdated, so each
claim takes the lease and then checks the record. Knows nothing of pixels, ranks or models.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storymem_dist.artifacts.records import DamagedRecord
from storymem_dist.artifacts.run_folder import FailureRecord, RunFolder
from storymem_dist.dispatch.choosing import choose_shot
from storymem_dist.dispatch.graph import ShotGraph, shot_key
from storymem_dist.dispatch.leases import Lease, LeaseFolder
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.scanning import FolderView, lease_key
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.story_graph import ShotStatus, StoryGraph
from storymem_dist.story.modes import GIVEN

OPERATIONS_PER_LEASE_CHECK = 2  # whether a claim is still held

_OVERDUE = 3.0  # no replica waits for a shot that has taken this many times its estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A shot that this replica holds, until the lease is released or taken over.

    ``low_memory``: an attempt ran out of memory, so render it with less.
    """

    shot: PlannedShot
    lease: Lease
    low_memory: bool


class ShotQueue(FolderView):
    """Claims shots of ``graph`` for one replica.

    ``runs`` and ``leases`` have one entry for each batch part. ``job_id`` distinguishes failures of this job from
    earlier ones. ``num_replicas`` counts the replicas of this job (those of other jobs are found in the folder).
    ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        graph: ShotGraph,
        runs: Sequence[RunFolder],
        leases: Sequence[LeaseFolder],
        settings: DispatchSettings,
        job_id: str,
        num_replicas: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            graph=graph,
            runs=runs,
            leases=leases,
            settings=settings,
            job_id=job_id,
            num_replicas=num_replicas,
            clock=clock,
        )
        self._given_up: list[tuple[PlannedShot, FailureRecord]] = []
        self._saving: PlannedShot | None = None
        self._seconds_per_tflop: float | None = None
        self._swap_seconds = settings.swap_seconds

    # -- claiming ------------------------------------------------------------------------------------------------------

    def claim(
        self, loaded: str | None, lora_key: str = "", instead: Callable[[PlannedShot], PlannedShot | None] | None = None
    ) -> Claim | None:
        """Claim the best shot for a replica that has loaded the experts of kind ``loaded`` with these LoRAs.

        None when no shot can be claimed now, or when the replica should wait for a shot after the one it is saving.
        ``instead`` returns the shot to claim in place of that one, or None to wait. Raises ``OSError`` when the folder
        cannot be written.
        """
        self.scan()
        while (best := self._choose(loaded, lora_key)) is not None:
            shot = best if instead is None else instead(best)
            if shot is None:
                return None
            key = shot_key(shot)
            leases = self.leases[shot.part]
            lease = leases.try_claim(lease_key(shot), self.generations.get(key))
            if lease is None:
                self.leased_since.setdefault(key, self._clock())
                self.graph.set_state(shot, ShotStatus.LEASED)
                continue
            if lease.generation:
                self.finish_commit(shot)
            if self.find_commit(shot) or self.has_failed(shot) or self._has_killed_too_many(shot, lease):
                leases.release(lease)
                continue
            self.hold(key)
            self.graph.set_state(shot, ShotStatus.LEASED)
            failure = self.failures.get(key)
            return Claim(shot=shot, lease=lease, low_memory=failure is not None and failure.low_memory)
        return None

    def take_given_up(self) -> list[tuple[PlannedShot, FailureRecord]]:
        """Return each shot once that this queue marked as failed while claiming. The caller reports them."""
        given_up, self._given_up = self._given_up, []
        return given_up

    def still_held(self, claim: Claim) -> bool:
        """Whether this replica still holds ``claim``: no other has taken it over."""
        return self.leases[claim.shot.part].is_held(claim.lease)

    def note_saving(self, claim: Claim) -> None:
        """Note that a claimed shot is being saved: once it is committed, shots that wait for it may be ready."""
        self._saving = claim.shot

    def release_lease(self, claim: Claim) -> None:
        """Release the lease of a committed shot, so that other replicas can continue its story. Thread-safe."""
        self.note_committed(claim.shot)
        self.leases[claim.shot.part].release(claim.lease)

    def release(self, claim: Claim, state: ShotStatus) -> None:
        """Release a claim and set the new state of its shot."""
        key = shot_key(claim.shot)
        self.own.discard(key)
        if self._saving is claim.shot:
            self._saving = None
        self.generations.pop(key, None)
        self.leased_since.pop(key, None)
        if state is ShotStatus.COMMITTED:
            self.note_committed(claim.shot)
        self.leases[claim.shot.part].release(claim.lease)
        if self.graph.find(key) is not None:  # else the shot was planned anew meanwhile
            self.graph.set_state(claim.shot, state)

    def finish_commit(self, shot: PlannedShot) -> None:
        """Complete the commit of ``shot`` if its holder died right after publishing the record. Raises ``OSError``."""
        run = self._runs[shot.part]
        folder = run.shot(shot.story_id, shot.shot_id)
        with contextlib.suppress(DamagedRecord):  # it was set aside, so the shot counts as not rendered
            if (record := folder.read_record(shot.fingerprint)) is not None:
                folder.discard_orphans(shot.fingerprint)
                run.finish_commit(record)

    def mark_failed(self, failure: FailureRecord, shot: PlannedShot) -> None:
        """Record that ``shot`` failed, here and in the run folder. Raises ``OSError``."""
        self.failures[shot_key(shot)] = failure
        self._runs[shot.part].write_failure(failure)

    def mark_damaged(self, shot: PlannedShot) -> None:
        """Note that the record of ``shot`` is unusable: it is rendered again."""
        self.graph.set_state(shot, ShotStatus.WAITING)

    # -- changes of the batch ------------------------------------------------------------------------------------------

    def look_at(self, story: StoryGraph) -> None:
        """Find what is committed or has failed of a story that has joined the graph. Raises ``OSError``.

        In a large job, what was noted; the rest is found when it is claimed.
        """
        if self.shares_looks:
            self.set_committed(shot_key(shot) for shot in story.shots if self.is_noted(shot))
            return
        for shot in story.shots:
            if self.graph.state(shot) is ShotStatus.WAITING and not self.find_commit(shot):
                self.has_failed(shot)

    def replace(self, story: StoryGraph, shots: Sequence[PlannedShot]) -> None:
        """Put ``shots``, the same story planned anew, in place of ``story``. Raises ``OSError``."""
        new = self.graph.replace_story(story, shots)
        self._complete_before.discard(new.number)
        for shot in story.shots:
            if self.graph.find(shot_key(shot)) is None:
                self.failures.pop(shot_key(shot), None)
                self.leased_since.pop(shot_key(shot), None)
        if self._saving is not None and self.graph.find(shot_key(self._saving)) is None:
            self._saving = None
        self.look_at(new)

    # -- measured times ------------------------------------------------------------------------------------------------

    def note_rendered(self, shot: PlannedShot, elapsed_seconds: float) -> None:
        """Update the seconds per TFLOP with the time that ``shot`` took; a given clip says nothing about them."""
        if shot.kind == GIVEN:
            return
        rate = elapsed_seconds / shot.cost
        before = self._seconds_per_tflop
        self._seconds_per_tflop = rate if before is None else 0.7 * before + 0.3 * rate

    def note_swapped(self, elapsed_seconds: float) -> None:
        """Note how long loading the experts of the other kind took."""
        self._swap_seconds = elapsed_seconds

    @property
    def swap_seconds(self) -> float:
        """How long loading the experts of the other kind takes, as far as known."""
        return self._swap_seconds

    def seconds_after(self, shot: PlannedShot) -> float | None:
        """Expected seconds of ``shot`` and the longest path after it, on one replica; None before the first shot."""
        return None if self._seconds_per_tflop is None else self._seconds_per_tflop * self.graph.path_from(shot)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _choose(self, loaded: str | None, lora_key: str) -> PlannedShot | None:
        return choose_shot(
            self.graph,
            loaded,
            num_replicas=self.num_sharing,
            expected_wait=self._expected_wait,
            swap_seconds=self._swap_seconds,
            saving=self._saving,
            lora_key=lora_key,
        )

    def _expected_wait(self, kind: str) -> float:
        """Expected seconds until a shot of another replica makes one of ``kind`` ready; infinity when none will, or
        there is no estimate yet.
        """
        if self._seconds_per_tflop is None:
            return float("inf")
        now, shortest = self._clock(), float("inf")
        for key, since in self.leased_since.items():
            entry = self.graph.find(key)
            if entry is None or key in self.own:
                continue
            shot = entry[0].shots[entry[1]]
            if any(freed.kind == kind for freed in self.graph.freed_by(shot)):
                estimate = shot.cost * self._seconds_per_tflop
                elapsed = now - since
                if elapsed < _OVERDUE * estimate:
                    shortest = min(shortest, max(estimate - elapsed, 0.0))
        return shortest

    def _has_killed_too_many(self, shot: PlannedShot, lease: Lease) -> bool:
        if lease.num_deaths < self._settings.max_attempts:
            return False
        reason = f"{lease.num_deaths} processes died while rendering it (dispatch.max_attempts); their logs say why"
        failure = failure_at(shot, reason, "ProcessDied", self._job_id)
        self.mark_failed(failure, shot)
        self._given_up.append((shot, failure))
        self.graph.set_state(shot, ShotStatus.FAILED)
        return True


def failure_at(
    shot: PlannedShot | ShotJob,
    reason: str,
    error_type: str,
    job_id: str,
    *,
    is_final: bool = True,
    low_memory: bool = False,
    details: str = "",
) -> FailureRecord:
    """Return the failure record of a shot that cannot be rendered."""
    return FailureRecord(
        story_id=shot.story_id,
        shot_id=shot.shot_id,
        fingerprint=shot.fingerprint,
        reason=reason,
        error_type=error_type,
        is_final=is_final,
        low_memory=low_memory,
        job_id=job_id,
        details=details,
    )
