import dataclasses
from pathlib import Path

import pytest

from storymem_dist.artifacts.run_folder import FailureRecord, RunFolder
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.leases import WORKING, LeaseFolder
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import PlannedShot, plan_story
from storymem_dist.dispatch.queue import Claim, ShotQueue
from storymem_dist.dispatch.scanning import lease_key, parse_lease_key
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.story_graph import ShotStatus
from tests.helpers.fake_renderer import make_part, make_story


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SharedRun:
    """One run folder, one clock, and queues of several replicas on other machines."""

    def __init__(self, root: Path, *lengths: int, **settings: object) -> None:
        self.run = RunFolder(root)
        self.run.open()
        self.clock = Clock()
        self.settings = DispatchSettings(**settings)  # type: ignore[arg-type]
        part = make_part(root, [])
        self.chains = [plan_story(0, part, make_story(f"s{n}", length), {}) for n, length in enumerate(lengths)]

    def queue(self, number: int, job_id: str = "job") -> ShotQueue:
        owner = dataclasses.replace(Owner.this_process(job_id, number), owner_id=f"far-{number}", boot_id=str(number))
        leases = LeaseFolder(
            folder=self.run.leases_folder, owner=owner, lease_seconds=self.settings.lease_seconds, clock=self.clock
        )
        leases.set_state(WORKING)
        queue = ShotQueue(
            graph=ShotGraph(self.chains),
            runs=[self.run],
            leases=[leases],
            settings=self.settings,
            job_id=job_id,
            clock=self.clock,
        )
        queue.read_committed()
        return queue

    def commit(self, shot: PlannedShot) -> None:
        """Put something under the record's name; the queue looks at the name only."""
        records = self.run.story_folder(shot.story_id) / shot.shot_id / "records"
        records.mkdir(parents=True)
        (records / f"{shot.fingerprint[:16]}.json").touch()

    def failure(self, shot: PlannedShot, **changes: object) -> FailureRecord:
        values = {
            "story_id": shot.story_id,
            "shot_id": shot.shot_id,
            "fingerprint": shot.fingerprint,
            "reason": "r",
            "error_type": "E",
            "is_final": True,
            "low_memory": False,
            "job_id": "job",
        }
        return FailureRecord(**(values | changes))  # type: ignore[arg-type]


def name(claim: Claim | None) -> str | None:
    return None if claim is None else f"{claim.shot.story_id}:{claim.shot.index}"


def test_two_replicas_never_hold_the_same_shot_and_follow_each_others_commits(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 2, 2)
    one, two = shared.queue(1), shared.queue(2)
    first, second = one.claim(None), two.claim(None)
    assert {name(first), name(second)} == {"s0:0", "s1:0"}
    assert one.claim("t2v") is None
    assert second is not None
    shared.commit(second.shot)
    two.release(second, ShotStatus.COMMITTED)
    assert one.claim("m2v") is None, "before the next scan nothing is known of it"
    shared.clock.now += 1.0
    assert name(one.claim("m2v")) == f"{second.shot.story_id}:1"


def test_the_folder_is_scanned_at_most_once_per_poll_time(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1, poll_seconds=1.0)
    queue = shared.queue(1)
    for _ in range(100):
        queue.claim(None)
        shared.clock.now += 0.1
    assert 10 <= queue.num_scans <= 11


def test_what_was_committed_unseen_is_found_after_the_claim_and_not_rendered_again(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 4)
    queue = shared.queue(1)
    for shot in shared.chains[0][:3]:
        shared.commit(shot)
    assert name(queue.claim(None)) == "s0:3"
    assert queue.graph.count(ShotStatus.COMMITTED) == 3
    assert len(list(shared.run.leases_folder.glob("*.lease"))) == 1


def test_a_dead_replicas_shot_is_claimed_after_the_lease_time_and_its_death_is_counted(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1, lease_seconds=60.0)
    assert name(shared.queue(1).claim(None)) == "s0:0"
    queue = shared.queue(2)
    for _ in range(59):
        assert queue.claim(None) is None
        shared.clock.now += 1.0
    shared.clock.now += 2.0
    claim = queue.claim(None)
    assert claim is not None and claim.lease.generation == 1


def test_a_shot_that_kills_its_renderers_again_and_again_is_marked_failed(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 2, max_attempts=2, lease_seconds=60.0)
    assert name(shared.queue(0).claim(None)) == "s0:0"
    for number in (1, 2):  # each sees the one before it stand still
        queue = shared.queue(number)
        assert queue.claim(None) is None
        shared.clock.now += 61.0
        claim = queue.claim(None)
        assert (name(claim), queue.graph.is_finished) == (("s0:0", False) if number == 1 else (None, True))
    failure = shared.run.read_failure("s0", "shot_01", shared.chains[0][0].fingerprint)
    assert failure is not None and failure.is_final and "2 processes died" in failure.reason
    assert queue.graph.stories[0].is_failed


def test_failures_of_others_block_the_chain_and_are_followed_when_they_are_taken_back(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 2)
    queue = shared.queue(1)
    queue.scan(force=True)
    shared.run.write_failure(shared.failure(shared.chains[0][0]))
    queue.scan(force=True)
    assert queue.graph.stories[0].is_failed and queue.claim(None) is None
    shared.run.remove_failure("s0", "shot_01", shared.chains[0][0].fingerprint)
    queue.scan(force=True)
    assert name(queue.claim(None)) == "s0:0"


@pytest.mark.parametrize(
    ("retry", "failed_in", "claimed"), [(False, "old", False), (True, "old", True), (True, "job", False)]
)
def test_failures_of_earlier_jobs_are_retried_once_on_demand(
    tmp_path: Path, retry: bool, failed_in: str, claimed: bool
) -> None:
    shared = SharedRun(tmp_path, 1, retry_failed=retry)
    shared.run.write_failure(shared.failure(shared.chains[0][0], job_id=failed_in))
    assert (shared.queue(1).claim(None) is not None) is claimed


def test_jobs_that_try_failed_shots_again_do_not_hand_one_to_each_other_for_ever(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1, retry_failed=True)
    shot = shared.chains[0][0]
    shared.run.write_failure(shared.failure(shot, job_id="old"))
    queues = {job: shared.queue(number, job) for number, job in enumerate(("a", "b"), start=1)}
    tried = []
    for job in ["a", "b"] * 4:
        shared.clock.now += 10.0
        if (claim := queues[job].claim(None)) is not None:
            tried.append(job)
            for queue in queues.values():
                queue.scan(force=True)
            queues[job].mark_failed(shared.failure(shot, job_id=job), shot)
            queues[job].release(claim, ShotStatus.FAILED)
            queues[job].scan(force=True)
    assert tried == ["a", "b"]
    assert all(queue.graph.is_finished for queue in queues.values())


def test_a_shot_that_ran_out_of_memory_is_claimed_for_low_memory(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1)
    shared.run.write_failure(shared.failure(shared.chains[0][0], is_final=False, low_memory=True))
    claim = shared.queue(1).claim(None)
    assert claim is not None and claim.low_memory


def test_failures_of_other_inputs_do_not_matter(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1)
    shared.run.write_failure(shared.failure(shared.chains[0][0], fingerprint="0" * 64))
    assert shared.queue(1).claim(None) is not None


def test_a_claim_that_was_taken_over_is_noticed(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1, lease_seconds=60.0)
    one, two = shared.queue(1), shared.queue(2)
    claim = one.claim(None)
    assert claim is not None and one.still_held(claim)
    two.claim(None)
    shared.clock.now += 61.0
    assert two.claim(None) is not None
    assert not one.still_held(claim)


def test_a_replica_waits_for_a_shot_of_its_kind_that_another_will_finish_soon(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 2, swap_seconds=60.0)
    shared.commit(shared.chains[0][0])
    running = shared.queue(1).claim("m2v")
    assert running is not None and name(running) == "s0:1"
    waiting = shared.queue(2)
    waiting.note_rendered(running.shot, elapsed_seconds=100.0)
    assert waiting.claim("m2v") is None, "100 seconds at most, and swapping there and back costs 120"
    waiting.note_swapped(10.0)
    assert name(waiting.claim("m2v")) == "s1:0"


def test_without_an_estimate_a_replica_swaps_instead_of_waiting(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 2, swap_seconds=60.0)
    shared.commit(shared.chains[0][0])
    shared.queue(1).claim("m2v")
    assert name(shared.queue(2).claim("m2v")) == "s1:0"


def test_a_shot_that_is_long_overdue_is_not_waited_for(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 2, swap_seconds=60.0, lease_seconds=3600.0)
    shared.commit(shared.chains[0][0])
    running = shared.queue(1).claim("m2v")
    waiting = shared.queue(2)
    assert running is not None
    waiting.note_rendered(running.shot, elapsed_seconds=100.0)
    assert waiting.claim("m2v") is None
    shared.clock.now += 301.0
    assert name(waiting.claim("m2v")) == "s1:0"


@pytest.mark.parametrize("is_longest", [True, False])
def test_while_it_saves_a_shot_a_replica_takes_another_unless_the_next_of_that_story_cannot_wait(
    tmp_path: Path, is_longest: bool
) -> None:
    shared = SharedRun(tmp_path, 8, 3)
    for chain in shared.chains:
        shared.commit(chain[0])
    saver, other = shared.queue(1), shared.queue(2)
    first, second = (saver, other) if is_longest else (other, saver)
    of = {first: first.claim("m2v"), second: second.claim("m2v")}
    assert (name(of[first]), name(of[second])) == ("s0:1", "s1:1")
    saving, elsewhere = of[saver], of[other]
    assert saving is not None and elsewhere is not None
    saver.note_saving(saving)
    shared.commit(elsewhere.shot)
    other.release(elsewhere, ShotStatus.COMMITTED)
    shared.clock.now += 1.0
    assert name(saver.claim("m2v")) == (None if is_longest else "s0:2")
    saver.release(saving, ShotStatus.COMMITTED)
    assert name(saver.claim("m2v")) == ("s0:2" if is_longest else "s1:2")


def test_experts_are_not_swapped_while_its_own_save_makes_a_shot_for_the_loaded_ones_ready(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 9, swap_seconds=60.0)
    shared.commit(shared.chains[0][0])
    queue = shared.queue(1)
    saving = queue.claim("m2v")
    assert saving is not None and name(saving) == "s0:1"
    queue.note_saving(saving)
    assert queue.claim("m2v") is None
    queue.release(saving, ShotStatus.COMMITTED)
    assert name(queue.claim("m2v")) == "s0:2"


def test_lease_names_survive_dots_in_story_ids(tmp_path: Path) -> None:
    shot = plan_story(0, make_part(tmp_path, []), make_story("a.b.c", 1), {})[0]
    assert parse_lease_key(lease_key(shot)) == ("a.b.c", "shot_01", shot.fingerprint[:16])
    assert parse_lease_key("job") is None
