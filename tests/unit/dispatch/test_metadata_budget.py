"""What a job asks of the file system of its run folder is bounded for the job, not for each replica. No time counts."""

from pathlib import Path

import pytest

from benchmarks.counting import counting
from benchmarks.metadata import Job, measure
from storymem_dist.artifacts.commit_log import CommitLog
from storymem_dist.dispatch import scanning
from storymem_dist.dispatch.pace import OPERATIONS_PER_SECOND, Pace
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.dispatch.scanning import lease_key, video_key
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.story_graph import ShotStatus
from tests.unit.dispatch.test_queue import SharedRun, name


def test_every_kind_of_operation_is_counted_once_and_only_in_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    with counting(inside) as operations:
        for folder in (inside, outside):
            (folder / "sub").mkdir()
            (folder / "sub" / "a").write_text("a")
            (folder / "sub" / "b").hardlink_to(folder / "sub" / "a")
            (folder / "sub" / "b").rename(folder / "sub" / "c")
            assert not (folder / "sub" / "b").exists()
            assert len(list((folder / "sub").iterdir())) == 2
            (folder / "sub" / "c").unlink()
        with operations.paused():
            (inside / "sub" / "a").read_text()
    (inside / "sub" / "a").read_text()
    expected = dict.fromkeys(("mkdir", "open", "link", "rename", "stat", "list", "unlink"), 1)
    assert dict(operations.counts) == expected


def test_a_listing_of_many_names_counts_as_several_operations(tmp_path: Path) -> None:
    for number in range(1001):
        (tmp_path / str(number)).touch()
    with counting(tmp_path) as operations:
        assert len(list(tmp_path.iterdir())) == 1001
    assert operations.counts["list"] == 2


def test_few_replicas_look_as_often_as_their_settings_say_and_many_look_more_rarely() -> None:
    assert [Pace(few).seconds(1.0) for few in (1, 2, 8, 64, 200)] == [1.0] * 5
    for many in (1024, 5000, 100_000):
        assert many * 3.0 / Pace(many).seconds(1.0, 3.0) <= OPERATIONS_PER_SECOND * 1.001
    assert Pace(1024).seconds(1.0, 3.0, num_looking=2) == 1.0


@pytest.mark.parametrize(("num_replicas", "expected"), [(2, 1.0), (1024, 5.12)])
def test_stop_files_are_looked_at_at_the_pace_of_the_job(tmp_path: Path, num_replicas: int, expected: float) -> None:
    now = [0.0]
    stop = StopSwitch([tmp_path / "STOP"], clock=lambda: now[0], pace=Pace(num_replicas))
    assert stop.reason() is None
    (tmp_path / "STOP").touch()
    now[0] = expected - 0.01
    assert stop.reason() is None
    now[0] = expected
    assert stop.reason() == "STOP file"


def test_a_rank_that_is_not_asked_looks_at_no_file_but_notes_a_request(tmp_path: Path) -> None:
    stop = StopSwitch([tmp_path / "STOP"], file_seconds=0.0)
    stop.look_no_more()
    (tmp_path / "STOP").touch()
    with counting(tmp_path) as operations:
        assert stop.reason() is None
    assert not operations.counts
    stop.request("SIGTERM")
    assert stop.reason() == "SIGTERM"


def test_a_job_of_1024_replicas_keeps_within_2000_operations_a_second() -> None:
    all_busy = measure(Job(num_replicas=1024, num_shots=3072, story_length=3, num_steps=6), num_measured=1)
    assert all_busy.per_second < 2000
    assert all_busy.busy_per_minute < 50
    assert all_busy.start.total() < 3000, "of the first replica, which looks whether the others are dead"
    most_wait = measure(Job(num_replicas=1024, num_shots=40, num_steps=6, wait_seconds=120.0), num_measured=1)
    assert most_wait.job.num_busy == 4
    assert most_wait.per_second < 2000


def test_a_replica_of_a_small_job_asks_as_little_per_shot() -> None:
    cost = measure(Job(num_replicas=2, num_shots=40, num_ranks=1, num_steps=12), num_measured=2)
    assert cost.per_shot < 200
    assert cost.start.total() < 150


# -- the commit log ----------------------------------------------------------------------------------------------------


def test_notes_reach_every_reader_once_however_many_there_are(tmp_path: Path) -> None:
    writers, reader = [CommitLog(tmp_path / "log") for _ in range(2)], CommitLog(tmp_path / "log")
    assert reader.read_new() == set()
    seen: list[str] = []
    for number in range(3005):
        writers[number % 2].note(f"shot {number}")
        if number % 500 == 0:
            writers[0].read_new()
            seen += reader.read_new()
    writers[1].note("late")  # it still writes to the first folder
    seen += reader.read_new()
    late = CommitLog(tmp_path / "log")
    assert late.read_new() == {*(f"shot {number}" for number in range(3005)), "late"}
    assert len(seen) == len(set(seen))
    with counting(tmp_path) as operations:
        assert late.read_new() == set()
    assert operations.total <= 4, "a look lists the newest folders only"


def test_a_note_is_written_once_and_a_folder_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    log = CommitLog(tmp_path / "log")
    log.note("a")
    with counting(tmp_path) as operations:
        log.note("a")
        assert CommitLog(tmp_path / "log").was_noted("a") is False
    assert not operations.counts
    assert log.was_noted("a")
    (tmp_path / "file").touch()
    CommitLog(tmp_path / "file").note("a")


# -- what replicas share -----------------------------------------------------------------------------------------------


def test_a_commit_that_was_noted_is_followed_without_a_look_at_the_record(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 3)
    one, two = shared.queue(1), shared.queue(2)
    claim = two.claim(None)
    assert claim is not None
    one.scan(force=True)
    shared.commit(claim.shot)
    two.release(claim, ShotStatus.COMMITTED)
    with counting(tmp_path / "stories") as operations:
        one.scan(force=True)
    assert not operations.counts
    assert one.graph.state(claim.shot) is ShotStatus.COMMITTED


def test_a_lease_that_went_away_without_a_note_is_looked_up(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 3)
    one, two = shared.queue(1), shared.queue(2)
    claims = [two.claim(None), two.claim(None)]
    assert claims[0] is not None and claims[1] is not None
    one.scan(force=True)
    shared.commit(claims[0].shot)
    for claim in claims:
        assert claim is not None
        two.leases[0].release(claim.lease)  # as a version that writes no notes
    one.scan(force=True)
    states = [one.graph.state(claim.shot) for claim in claims if claim is not None]
    assert states == [ShotStatus.COMMITTED, ShotStatus.WAITING]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_LOOKS_AT_START", 0)


def start(shared: SharedRun, number: int, own: list[int]) -> ShotQueue:
    queue = shared.queue(number)
    queue.read_committed([queue.graph.stories[one] for one in own])
    return queue


@pytest.mark.usefixtures("large")
def test_replicas_of_a_large_job_each_look_up_their_own_stories_and_note_them_for_the_others(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 3)
    for chain in shared.chains:
        shared.commit(chain[0])
    one = start(shared, 1, [0])
    assert [one.graph.state(chain[0]) for chain in shared.chains] == [ShotStatus.COMMITTED, ShotStatus.COMMITTED]


@pytest.mark.usefixtures("large")
def test_what_nobody_noted_is_found_by_its_owner_and_reaches_the_others_at_their_next_scan(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 3)
    fresh = [ShotQueueOf(shared, number) for number in (1, 2)]
    for chain in shared.chains:
        shared.commit(chain[0])
    first, second = (one.begin([number]) for number, one in enumerate(fresh))
    of_second = shared.chains[1][0]
    assert first.graph.state(of_second) is ShotStatus.WAITING
    first.scan(force=True)
    assert first.graph.state(of_second) is ShotStatus.COMMITTED
    assert second.graph.state(shared.chains[0][0]) is ShotStatus.COMMITTED, "it began after the first one"


class ShotQueueOf:
    """A queue that has not looked at the folder yet."""

    def __init__(self, shared: SharedRun, number: int) -> None:
        self._queue = shared.queue(number)
        self._queue.logs[0] = CommitLog(shared.run.commits_folder)

    def begin(self, own: list[int]) -> ShotQueue:
        self._queue.read_committed([self._queue.graph.stories[one] for one in own])
        return self._queue


@pytest.mark.usefixtures("large")
def test_a_note_whose_record_was_removed_is_not_believed_by_the_replica_whose_story_it_is(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3, 3)
    CommitLog(shared.run.commits_folder).note(lease_key(shared.chains[0][0]))
    assert ShotQueueOf(shared, 1).begin([0]).graph.state(shared.chains[0][0]) is ShotStatus.WAITING
    assert ShotQueueOf(shared, 2).begin([1]).graph.state(shared.chains[0][0]) is ShotStatus.COMMITTED


def test_a_small_job_believes_no_note_at_its_start(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 3)
    CommitLog(shared.run.commits_folder).note(lease_key(shared.chains[0][0]))
    assert shared.queue(1).graph.state(shared.chains[0][0]) is ShotStatus.WAITING


@pytest.mark.usefixtures("large")
def test_the_video_of_a_story_is_looked_for_by_its_own_replica_or_where_nobody_noted_it(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1, 1, 1)
    queue = start(shared, 1, [0])
    stories = queue.graph.stories
    assert [queue.video_is_known(story) for story in stories] == [False, False, False]
    other = CommitLog(shared.run.commits_folder)
    for story in stories[:2]:
        other.note(video_key(story))
    queue.scan(force=True)
    assert [queue.video_is_known(story) for story in stories] == [False, True, False]


def test_among_many_replicas_each_checks_few_holders_and_together_they_find_every_dead_one(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, *[1] * 20, lease_seconds=60.0)
    holders = [shared.queue(number) for number in range(20)]
    assert all(holder.claim(None) is not None for holder in holders)
    looking = [shared.queue(number) for number in range(100, 112)]
    for queue in looking:
        queue.scan(force=True)
    shared.clock.now += 61.0
    for queue in looking:  # those that look beat as well
        queue.leases[0].set_state("working")
    with counting(tmp_path) as operations:
        looking[0].scan(force=True)
    assert operations.total < 40, "20 dead holders: it does not check them all"
    for _ in range(8):  # what nobody happens to check is checked by others later
        for queue in looking:
            queue.leases[0].set_state("working")
            queue.scan(force=True)
        shared.clock.now += 61.0
    assert len(list(shared.run.leases_folder.glob("*.dead"))) == 20
    assert all(queue.graph.count(ShotStatus.LEASED) < 20 for queue in looking)


def test_a_holder_that_one_replica_found_dead_is_dead_for_all(tmp_path: Path) -> None:
    shared = SharedRun(tmp_path, 1, lease_seconds=60.0)
    assert name(shared.queue(1).claim(None)) == "s0:0"
    watching = shared.queue(2)
    watching.scan(force=True)
    shared.clock.now += 61.0
    watching.scan(force=True)
    assert name(shared.queue(3).claim(None)) == "s0:0", "it has waited no lease time itself"
