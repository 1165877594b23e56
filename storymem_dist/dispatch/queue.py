"""Claims shots: which shot this replica renders next, and the lease that entitles it.

One ``ShotQueue`` belongs to the leader of one replica. It holds the graph of all shots and shares the lease folders
with the other replicas of its job and with other jobs. It scans each folder at most once per ``poll_seconds``. Its view
may be outdated between scans, so each claim takes the lease and then checks the record. Knows nothing of pixels, ranks
or models.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storymem_dist.artifacts.records import DamagedRecord
from storymem_dist.artifacts.run_folder import FailureRecord, RunFolder
from storymem_dist.dispatch.choosing import choose_shot
from storymem_dist.dispatch.graph import ShotGraph, ShotKey, shot_key
from storymem_dist.dispatch.leases import Lease, LeaseFolder
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.files import names_in
from storymem_dist.story.modes import GIVEN

_OWNERS_PER_SCAN = 64  # leases of other owners checked for dead holders in one scan
_OVERDUE = 3.0  # no replica waits for a shot that has taken this many times its estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A shot that this replica holds, until the lease is released or taken over.

    ``low_memory``: an attempt ran out of memory, so render it with less.
    """

    shot: PlannedShot
    lease: Lease
    low_memory: bool


class ShotQueue:
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
        self.graph = graph
        self._runs = runs
        self._leases = leases
        self._settings = settings
        self._job_id = job_id
        self._num_replicas = num_replicas
        self._clock = clock
        self._next_scan = -float("inf")
        self._generations: dict[ShotKey, int] = {}  # leases of others, by shot, as last scanned
        self._failure_names: list[set[str]] = [set() for _ in runs]
        self._to_try_again: list[set[str]] = [set() for _ in runs]  # names of failures found at the start
        self._leased_since: dict[ShotKey, float] = {}
        self._own: set[ShotKey] = set()
        self._given_up: list[tuple[PlannedShot, FailureRecord]] = []
        self._saving: PlannedShot | None = None
        self._turn = 0
        self._seconds_per_tflop: float | None = None
        self._swap_seconds = settings.swap_seconds
        self.failures: dict[ShotKey, FailureRecord] = {}
        self.num_scans = 0

    # -- the state of the folders --------------------------------------------------------------------------------------

    def read_committed(self) -> None:
        """Find the committed shots, and the failures that ``retry_failed`` clears. Called once, before any scan."""
        if self._settings.retry_failed:
            self._to_try_again = [set(names_in(run.failures_folder)) for run in self._runs]
        self.find_committed()

    def find_committed(self) -> None:
        """Find the shots that any process has committed."""
        for story in self.graph.stories:
            run = self._runs[story.part]
            if run.story_folder(story.story_id).exists():
                for shot in story.shots:
                    is_known = self.graph.state(shot) is ShotStatus.COMMITTED
                    if not is_known and run.shot(story.story_id, shot.shot_id).is_committed(shot.fingerprint):
                        self.graph.set_state(shot, ShotStatus.COMMITTED)

    def scan(self, *, force: bool = False) -> bool:
        """Update the view of leases and failures if ``poll_seconds`` have passed; return whether they had."""
        now = self._clock()
        if now < self._next_scan and not force:
            return False
        self._next_scan = now + self._settings.poll_seconds
        self.num_scans += 1
        found: dict[ShotKey, int] = {}
        for part_index, folder in enumerate(self._leases):
            for name, generation in folder.scan().items():
                if (parsed := parse_lease_key(name)) is not None:
                    found[(part_index, *parsed)] = generation
        for part_index in range(len(self._runs)):
            self._follow_failures(part_index)
        gone = self._generations.keys() - found.keys()
        self._generations = found
        for key in gone:
            self._leased_since.pop(key, None)
            self._look_again(key)
        for key in found:
            entry = self.graph.find(key)
            if entry is not None and key not in self._own:
                story, position = entry
                self._leased_since.setdefault(key, now)
                if story.states[position] is ShotStatus.WAITING:
                    self.graph.set_state(story.shots[position], ShotStatus.LEASED)
        self._free_leases_of_the_dead()
        return True

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
            leases = self._leases[shot.part]
            lease = leases.try_claim(lease_key(shot), self._generations.get(key))
            if lease is None:
                self._leased_since.setdefault(key, self._clock())
                self.graph.set_state(shot, ShotStatus.LEASED)
                continue
            if lease.generation:
                self.finish_commit(shot)
            if self._find_committed(shot) or self._has_failed(shot) or self._has_killed_too_many(shot, lease):
                leases.release(lease)
                continue
            self._own.add(key)
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
        return self._leases[claim.shot.part].is_held(claim.lease)

    def note_saving(self, claim: Claim) -> None:
        """Note that a claimed shot is being saved: once it is committed, shots that wait for it may be ready."""
        self._saving = claim.shot

    def release_lease(self, claim: Claim) -> None:
        """Release the lease of a committed shot, so that other replicas can continue its story. Thread-safe."""
        self._leases[claim.shot.part].release(claim.lease)

    def release(self, claim: Claim, state: ShotStatus) -> None:
        """Release a claim and set the new state of its shot."""
        key = shot_key(claim.shot)
        self._own.discard(key)
        if self._saving is claim.shot:
            self._saving = None
        self._generations.pop(key, None)
        self._leased_since.pop(key, None)
        self.release_lease(claim)
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

    @property
    def num_sharing(self) -> int:
        """Replicas that share the work, as far as known."""
        return max(self._num_replicas, sum(leases.num_alive for leases in self._leases))

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
        for key, since in self._leased_since.items():
            entry = self.graph.find(key)
            if entry is None or key in self._own:
                continue
            shot = entry[0].shots[entry[1]]
            if any(freed.kind == kind for freed in self.graph.freed_by(shot)):
                estimate = shot.cost * self._seconds_per_tflop
                elapsed = now - since
                if elapsed < _OVERDUE * estimate:
                    shortest = min(shortest, max(estimate - elapsed, 0.0))
        return shortest

    def _find_committed(self, shot: PlannedShot) -> bool:
        """Whether another process has committed ``shot``; if so, find the committed shots that need it, too."""
        run, found = self._runs[shot.part], False
        left, seen = [shot], {shot.index}
        while left:
            one = left.pop()
            if run.shot(one.story_id, one.shot_id).is_committed(one.fingerprint):
                self.graph.set_state(one, ShotStatus.COMMITTED)
                new = [later for later in self.graph.followers(one) if later.index not in seen]
                left += new
                seen.update(later.index for later in new)
                found = True
        return found

    def _has_failed(self, shot: PlannedShot) -> bool:
        run = self._runs[shot.part]
        failure = run.read_failure(shot.story_id, shot.shot_id, shot.fingerprint)
        if failure is None:
            self.failures.pop(shot_key(shot), None)
            return False
        name = run.failure_name(shot.story_id, shot.shot_id, shot.fingerprint)
        again = self._to_try_again[shot.part]
        if failure.is_final and name in again and failure.job_id != self._job_id:
            again.remove(name)  # once, or jobs with this setting would retry it in turns for ever
            run.remove_failure(shot.story_id, shot.shot_id, shot.fingerprint)
            self.failures.pop(shot_key(shot), None)
            return False
        self.failures[shot_key(shot)] = failure
        if failure.is_final:
            self.graph.set_state(shot, ShotStatus.FAILED)
        return failure.is_final

    def _has_killed_too_many(self, shot: PlannedShot, lease: Lease) -> bool:
        if lease.num_deaths < self._settings.max_attempts:
            return False
        reason = f"{lease.num_deaths} processes died while rendering it (dispatch.max_attempts); their logs say why"
        failure = failure_at(shot, reason, "ProcessDied", self._job_id)
        self.mark_failed(failure, shot)
        self._given_up.append((shot, failure))
        self.graph.set_state(shot, ShotStatus.FAILED)
        return True

    def _look_again(self, key: ShotKey) -> None:
        """Update the shot of a lease that is gone: it is committed, has failed, or is free again."""
        entry = self.graph.find(key)
        if entry is None or key in self._own:
            return
        story, position = entry
        shot = story.shots[position]
        if (
            story.states[position] is ShotStatus.LEASED
            and not self._find_committed(shot)
            and not self._has_failed(shot)
        ):
            self.graph.set_state(shot, ShotStatus.WAITING)

    def _follow_failures(self, part_index: int) -> None:
        """Update the shots whose failure marks were written or removed since the last scan."""
        names = set(names_in(self._runs[part_index].failures_folder))
        for name in names ^ self._failure_names[part_index]:
            key = parse_lease_key(name.removesuffix(".json"))
            entry = self.graph.find((part_index, *key)) if key else None
            if entry is None:
                continue
            story, position = entry
            shot, state = story.shots[position], story.states[position]
            if state is ShotStatus.WAITING and name in names:
                self._has_failed(shot)
            elif state is ShotStatus.FAILED and name not in names:
                self.graph.set_state(shot, ShotStatus.WAITING)
        self._failure_names[part_index] = names

    def _free_leases_of_the_dead(self) -> None:
        """Make shots with dead holders ready again; each scan checks the next few."""
        others = [shot for shot in self.graph.leased() if shot_key(shot) not in self._own]
        for shot in _turn(others, self._turn, _OWNERS_PER_SCAN):
            generation = self._generations.get(shot_key(shot))
            if generation is None:
                self._look_again(shot_key(shot))
            elif self._leases[shot.part].holder_is_dead(lease_key(shot), generation):
                self.graph.set_state(shot, ShotStatus.WAITING)
        self._turn += _OWNERS_PER_SCAN


def lease_key(shot: PlannedShot | ShotJob) -> str:
    """Name of a shot's lease in its part's folder."""
    return f"{shot.story_id}.{shot.shot_id}.{shot.fingerprint[:16]}"


def parse_lease_key(name: str) -> tuple[str, str, str] | None:
    """Split a lease's name into story, shot and fingerprint digits; None when it is not the name of a shot's lease."""
    parts = name.rsplit(".", 2)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


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


def _turn(items: Sequence[PlannedShot], start: int, count: int) -> list[PlannedShot]:
    """``count`` items from ``start`` on; the first items follow the last."""
    if len(items) <= count:
        return list(items)
    return [items[(start + offset) % len(items)] for offset in range(count)]
