import dataclasses
import json
import os
import random
import threading
from pathlib import Path

import pytest

from storymem_dist.dispatch.helping import Help
from storymem_dist.dispatch.leases import WAITING, WORKING, LeaseFolder
from storymem_dist.dispatch.owners import Owner


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def far_owner(number: int, job_id: str = "job") -> Owner:
    """An owner on another machine: only its counter shows whether it is alive."""
    owner = Owner.this_process(job_id, number)
    return dataclasses.replace(owner, owner_id=f"far-{number}", boot_id=f"boot-{number}", host=f"far{number}")


def folder_of(path: Path, owner: Owner, clock: Clock, lease_seconds: float = 60.0) -> LeaseFolder:
    return LeaseFolder(folder=path, owner=owner, lease_seconds=lease_seconds, clock=clock)


def test_a_key_is_held_by_one_owner_until_it_is_released(tmp_path: Path) -> None:
    clock = Clock()
    one, two = (folder_of(tmp_path, far_owner(n), clock) for n in range(2))
    one.start()
    two.start()
    lease = one.try_claim("story.shot_01.f")
    assert lease is not None and one.is_held(lease)
    assert two.try_claim("story.shot_01.f") is None
    assert two.try_claim("story.shot_01.f", two.scan()["story.shot_01.f"]) is None
    one.release(lease)
    assert not one.is_held(lease)
    assert two.scan() == {}
    assert two.try_claim("story.shot_01.f") is not None
    one.close()
    two.close()
    assert list(tmp_path.iterdir()) == []


def test_of_many_claimants_at_once_exactly_one_gets_the_key(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path, far_owner(n), Clock()) for n in range(12)]
    won: list[int] = []
    barrier = threading.Barrier(12)

    def claim(number: int) -> None:
        barrier.wait()
        if folders[number].try_claim("key"):
            won.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_silent_owner_loses_its_key_only_after_the_lease_time_on_the_observers_clock(tmp_path: Path) -> None:
    clock = Clock()
    silent, observer = folder_of(tmp_path, far_owner(0), clock), folder_of(tmp_path, far_owner(1), clock)
    silent.set_state(WORKING)  # one heartbeat, then none
    lease = silent.try_claim("key")
    assert lease is not None
    for _ in range(6):
        assert observer.try_claim("key", 0) is None
        clock.now += 59.0 / 6
    assert observer.try_claim("key", 0) is None
    clock.now += 2.0
    taken = observer.try_claim("key", 0)
    assert taken is not None and taken.generation == 1
    assert not silent.is_held(lease), "an owner that resumes late finds that it lost"
    silent.release(lease)
    assert observer.is_held(taken), "and cannot release what another holds"


def test_the_first_look_never_finds_an_owner_dead_for_its_silence(tmp_path: Path) -> None:
    clock = Clock()
    owner = folder_of(tmp_path, far_owner(0), clock)
    owner.set_state(WORKING)
    owner.try_claim("key")
    clock.now += 10_000.0
    assert folder_of(tmp_path, far_owner(1), clock).try_claim("key", 0) is None


def test_a_heartbeat_starts_the_lease_time_again(tmp_path: Path) -> None:
    clock = Clock()
    owner, observer = folder_of(tmp_path, far_owner(0), clock), folder_of(tmp_path, far_owner(1), clock)
    owner.set_state(WORKING)
    owner.try_claim("key")
    for _ in range(5):
        assert observer.try_claim("key", 0) is None
        clock.now += 50.0
        owner.set_state(WORKING)
    assert observer.try_claim("key", 0) is None


def test_an_owner_whose_process_is_gone_from_this_machine_loses_its_key_at_once(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        LeaseFolder(folder=tmp_path, owner=Owner.this_process("job"), lease_seconds=60.0).try_claim("key")
        os._exit(0)
    os.waitpid(child, 0)
    observer = LeaseFolder(folder=tmp_path, owner=Owner.this_process("job"), lease_seconds=60.0)
    lease = observer.try_claim("key", 0)
    assert lease is not None and lease.generation == 1


def test_a_process_with_the_same_number_that_started_later_is_not_the_owner() -> None:
    owner = Owner.this_process("job")
    assert owner.is_known_alive() and not owner.is_known_dead()
    recycled = dataclasses.replace(owner, pid_start="1")
    assert recycled.is_known_dead() and not recycled.is_known_alive()
    elsewhere = dataclasses.replace(recycled, boot_id="another machine")
    assert not elsewhere.is_known_dead() and not elsewhere.is_known_alive()


def test_only_one_of_many_observers_takes_a_dead_owners_key(tmp_path: Path) -> None:
    clock = Clock()
    dead = folder_of(tmp_path, far_owner(99), clock)
    dead.try_claim("key")
    folders = [folder_of(tmp_path, far_owner(n), clock) for n in range(8)]
    for folder in folders:
        assert folder.try_claim("key", 0) is None
    clock.now += 61.0
    taken: list[LeaseFolder] = []
    barrier = threading.Barrier(8)

    def take(folder: LeaseFolder) -> None:
        barrier.wait()
        if folder.try_claim("key", 0):
            taken.append(folder)

    threads = [threading.Thread(target=take, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_a_claim_with_an_outdated_scan_does_not_slip_in_under_a_taken_over_key(tmp_path: Path) -> None:
    """The first holder died and was succeeded after the scan that found the key free."""
    clock = Clock()
    first, second, late = (folder_of(tmp_path, far_owner(n), clock) for n in range(3))
    first.try_claim("key")
    second.try_claim("key", 0)
    clock.now += 61.0
    taken = second.try_claim("key", 0)
    assert taken is not None
    (tmp_path / "key.0.lease").unlink()  # the worst case: the dead owner's file is gone already
    assert late.try_claim("key", None) is None
    assert second.is_held(taken)


def test_generations_count_deaths_and_a_release_forgets_them(tmp_path: Path) -> None:
    clock = Clock()
    for generation in range(3):
        holder = folder_of(tmp_path, far_owner(generation), clock)
        known = holder.scan().get("key")
        if known is not None:
            assert holder.try_claim("key", known) is None
            clock.now += 61.0
        lease = holder.try_claim("key", known)
        assert lease is not None and lease.generation == generation
    holder.release(lease)
    assert holder.scan() == {}


def test_a_late_release_does_not_take_a_lease_that_another_has_made_under_the_same_name(tmp_path: Path) -> None:
    clock = Clock()
    late, second, third = (folder_of(tmp_path, far_owner(n), clock) for n in range(3))
    lost = late.try_claim("key")
    second.try_claim("key", 0)
    clock.now += 61.0
    taken = second.try_claim("key", 0)
    assert lost is not None and taken is not None
    second.release(taken)
    current = third.try_claim("key")
    assert current is not None and current.generation == lost.generation == 0
    late.release(lost)
    assert third.is_held(current)


def test_a_folder_that_cannot_be_read_for_a_moment_takes_no_lease_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = folder_of(tmp_path, far_owner(0), Clock())
    lease = leases.try_claim("key")
    assert lease is not None

    def stale(path: Path) -> bytes:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        assert leases.is_held(lease)
    assert leases.is_held(lease)


def test_an_own_lease_that_could_not_be_removed_can_be_claimed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = folder_of(tmp_path, far_owner(0), Clock())
    lease = leases.try_claim("key")
    assert lease is not None
    assert leases.try_claim("key", 0) is None

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        leases.release(lease)
    assert leases.scan() == {"key": 0}
    assert leases.try_claim("key", 0) is not None


def test_random_deaths_pauses_and_wakings_never_give_two_holders(tmp_path: Path) -> None:
    """A model check in miniature: at every moment, at most one living owner believes that it holds the key."""
    for seed in range(30):
        rng, clock = random.Random(seed), Clock()
        path = tmp_path / str(seed)
        owners = [folder_of(path, far_owner(n), clock) for n in range(4)]
        path.mkdir()
        held = {}
        for _ in range(60):
            number = rng.randrange(4)
            action = rng.choice(["beat", "beat", "claim", "claim", "claim stale", "release", "wait"])
            if action == "beat":
                owners[number].set_state(WORKING)
            elif action == "wait":
                clock.now += rng.choice([5.0, 30.0, 65.0])
            elif action == "release" and number in held:
                owners[number].release(held.pop(number))
            elif action.startswith("claim") and number not in held:
                known = owners[number].scan().get("key") if action == "claim" else None
                lease = owners[number].try_claim("key", known)
                if lease is not None:
                    held[number] = lease
            holders = [n for n, lease in held.items() if owners[n].is_held(lease)]
            assert len(holders) <= 1, (seed, holders)


def test_the_heartbeat_continues_by_itself_and_ends_with_close(tmp_path: Path) -> None:
    leases = LeaseFolder(folder=tmp_path, owner=Owner.this_process(), lease_seconds=0.06)
    leases.start()
    path = next(tmp_path.glob("*.alive"))
    first = path.read_text()
    for _ in range(500):
        if path.read_text() != first:
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("the counter stands still")
    leases.close()
    assert not path.exists()


def test_after_a_crash_the_lease_stays_for_the_next_one_to_count(tmp_path: Path) -> None:
    leases = LeaseFolder(folder=tmp_path, owner=Owner.this_process(), lease_seconds=60.0)
    leases.start()
    leases.try_claim("key")
    leases.close(release=False)
    assert [path.name for path in tmp_path.iterdir()] == ["key.0.lease"]


def test_damaged_files_of_other_owners_stop_no_process(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "key.0.lease").write_text("{")
    (tmp_path / "someone.alive").write_text("{")
    (tmp_path / "notes.txt").write_text("hello")
    leases = folder_of(tmp_path, far_owner(0), clock)
    assert leases.scan() == {"key": 0}
    assert leases.others_working() == []
    leases.mark_dead_owners()
    assert not leases.is_alone(), "another process may be writing its first heartbeat"
    assert leases.try_claim("key", 0) is None
    clock.now += 61.0
    leases.mark_dead_owners()
    assert leases.is_alone() and (tmp_path / "notes.txt").exists()
    assert leases.try_claim("key", 0) is not None


def test_working_owners_of_other_jobs_are_found_and_dead_ones_are_marked(tmp_path: Path) -> None:
    clock = Clock()
    mine = folder_of(tmp_path, far_owner(0, "mine"), clock)
    folder_of(tmp_path, far_owner(1, "mine"), clock).set_state(WORKING)
    folder_of(tmp_path, far_owner(2, "other"), clock).set_state(WAITING)
    other = folder_of(tmp_path, far_owner(3, "other"), clock)
    other.set_state(WORKING)
    assert [owner.owner_id for owner in mine.others_working()] == ["far-3"]
    assert mine.surely_working(mine.others_working()) is None, "it may be dead: its counter has not moved yet"
    other.set_state(WORKING)
    assert mine.others_working() and mine.surely_working([other.owner]) == other.owner
    clock.now += 61.0
    assert mine.others_working() == []
    mine.is_silent(far_owner(1))
    mine.is_silent(far_owner(2))
    clock.now += 61.0
    mine.mark_dead_owners()
    assert not list(tmp_path.glob("*.alive"))
    assert [path.name for path in mine.dead_owners()] == ["far-1.dead", "far-2.dead", "far-3.dead"]


def test_an_owner_that_is_paused_on_this_machine_is_never_marked_dead(tmp_path: Path) -> None:
    clock = Clock()
    mine = folder_of(tmp_path, far_owner(0), clock)
    paused = folder_of(tmp_path, Owner.this_process("job"), clock)
    paused.set_state(WORKING)
    assert not mine.is_silent(paused.owner)
    clock.now += 61.0
    assert mine.is_silent(paused.owner)
    mine.mark_dead_owners()
    assert not mine.is_alone() and not mine.dead_owners()


def test_a_death_counts_unless_the_holder_was_asked_to_stop(tmp_path: Path) -> None:
    for asked, deaths in ((False, 1), (True, 1), (False, 2), (True, 2)):
        dying = folder_of_a_dead_process(tmp_path)
        lease = dying.try_claim("a", dying.scan().get("a"))
        assert lease is not None
        if asked:
            dying.note_stopping()
        after = folder_of_a_dead_process(tmp_path)
        taken = after.try_claim("a", after.scan()["a"])
        assert taken is not None and taken.num_deaths == deaths
        taken_path = tmp_path / f"a.{taken.generation}.lease"
        taken_path.unlink()
    last = folder_of_a_dead_process(tmp_path)
    lease = last.try_claim("a", last.scan()["a"])
    assert lease is not None
    last.release(lease)
    assert not list(tmp_path.glob("a.*")), "marks go with their leases"


@pytest.mark.parametrize("ends", [False, True])
def test_a_death_of_one_that_helped_counts_where_the_holder_was_asked_to_stop(tmp_path: Path, ends: bool) -> None:
    """A launcher asks all that are left to stop when one has died, among them the holder."""
    holder = folder_of_a_dead_process(tmp_path)
    assert holder.try_claim("a") is not None
    helper = Help(replica=3)
    helper.begin(tmp_path, "a", 0)
    other = Help(replica=3)
    other.begin(tmp_path, "ab", 0)
    other.begin(tmp_path, "a", 10)
    if ends:
        helper.end()
    holder.note_stopping()
    after = folder_of_a_dead_process(tmp_path)
    taken = after.try_claim("a", 0)
    assert taken is not None and taken.num_deaths == (0 if ends else 1)
    after.release(taken)
    assert [path.name for path in tmp_path.iterdir()] == ["ab.0.3.helping"], "marks go with their leases"
    assert list(after.lease_files().values()) == ["ab"], "and are found by the clean-up"


def test_a_lease_of_a_version_that_did_not_count_deaths_counts_as_one_each(tmp_path: Path) -> None:
    dying = folder_of_a_dead_process(tmp_path)
    assert dying.try_claim("a") is not None
    path = tmp_path / "a.0.lease"
    value = json.loads(path.read_text())
    del value["num_deaths"]
    path.write_text(json.dumps(value))
    after = folder_of_a_dead_process(tmp_path)
    taken = after.try_claim("a", 0)
    assert taken is not None and taken.num_deaths == 1


def folder_of_a_dead_process(root: Path) -> LeaseFolder:
    owner = dataclasses.replace(Owner.this_process(), pid=2**22 + 1, pid_start="1")
    return LeaseFolder(folder=root, owner=owner, lease_seconds=60.0)
