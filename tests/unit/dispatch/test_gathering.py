"""How replicas find together, with a store in memory; each replica's words are said in turn, or from threads."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from storymem_dist.dispatch.gathering import Gathering, Merge
from storymem_dist.dispatch.merging import Team

PAIR, FOUR = Team(first=0, size=2), Team(first=0, size=4)


class Clock:
    """Seconds that pass only while somebody sleeps; ``meanwhile`` runs at the first sleep."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now = 0.0
        self.meanwhile = meanwhile

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        act, self.meanwhile = self.meanwhile, lambda: None
        act()


def replica(store: Any, number: int, of: int = 2, clock: Clock | None = None) -> Gathering:
    clock = clock or Clock()
    return Gathering(store, replica=number, replicas=range(of), clock=lambda: clock.now, sleep=clock.sleep)


@pytest.fixture
def store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from torch's stubs


def idle(gathering: Gathering, loaded: str | None = "m2v") -> Gathering:
    gathering.look_for_work(loaded)
    gathering.wait(0.01, loaded)
    return gathering


def test_who_is_idle_and_with_which_experts(store: Any) -> None:
    first = replica(store, 0, of=4)
    assert first.neighbours().idle == {} and first.neighbours().soon == {1: None, 2: None, 3: None}, (
        "the others have not begun"
    )
    others = [replica(store, number, of=4) for number in (1, 2, 3)]
    assert first.neighbours().idle == {} and first.neighbours().soon == {1: None, 2: None, 3: None}
    idle(others[0], "t2v")
    others[1].look_for_work("m2v")
    others[2].be_busy()
    assert first.neighbours().idle == {1: "t2v"} and first.neighbours().soon == {2: "m2v"}
    assert others[0].look_for_work("t2v") is None
    others[0].be_busy()
    assert first.neighbours().idle == {}


def test_a_called_replica_takes_part(store: Any) -> None:
    first, second = replica(store, 0), idle(replica(store, 1))
    merge = first.call(PAIR)
    assert merge == Merge(team=PAIR, leader=0)
    assert first.neighbours().idle == {} and first.call(PAIR) is None, "it cannot be called twice"
    assert second.look_for_work("m2v") == merge
    assert second.look_for_work("m2v") is None, "once"
    idle(second)
    assert first.call(PAIR) == merge


def test_any_replica_of_a_team_may_lead_it(store: Any) -> None:
    all_four = [replica(store, number, of=4) for number in range(4)]
    for number in (0, 1, 3):
        idle(all_four[number])
    merge = all_four[2].call(FOUR)
    assert merge == Merge(team=FOUR, leader=2)
    assert [all_four[number].look_for_work("m2v") for number in (0, 1, 3)] == [merge] * 3


def test_a_team_with_a_busy_replica_does_not_come_about(store: Any) -> None:
    all_four = [replica(store, number, of=4) for number in range(4)]
    idle(all_four[1])
    idle(all_four[2])
    all_four[3].be_busy()
    assert all_four[0].call(FOUR) is None
    assert [all_four[number].look_for_work("m2v") for number in (1, 2)] == [None, None], "they were called off"
    idle(all_four[1])
    assert all_four[0].call(PAIR) == Merge(team=PAIR, leader=0)


def test_a_replica_that_looks_for_work_first_is_not_called(store: Any) -> None:
    first, second = replica(store, 0), idle(replica(store, 1))
    states = first._states
    first._states = lambda: (states(), second.look_for_work("m2v"))[0]  # type: ignore[method-assign]  # between the two
    assert first.call(PAIR) is None


def test_an_idle_replica_wakes_up_when_it_is_called(store: Any) -> None:
    clock = Clock()
    first, second = replica(store, 0), replica(store, 1, clock=clock)
    clock.meanwhile = lambda: first.call(PAIR)
    second.wait(1000.0, "m2v")
    assert clock.now < 1.0
    assert second.look_for_work("m2v") == Merge(team=PAIR, leader=0)


def test_a_call_whose_caller_is_gone_is_called_off_by_the_called(store: Any) -> None:
    clock, caller = Clock(), replica(store, 0)
    second = idle(replica(store, 1, clock=clock))
    swap = caller._swap
    caller._swap = lambda key, *words: swap(key, *words) if "call/" not in key else "gone"  # type: ignore[method-assign]
    caller.call(PAIR)
    assert second.look_for_work("m2v") is None and clock.now > 10.0
    caller._swap = swap  # type: ignore[method-assign]
    assert swap("storymem-merge/call/0.1", "open", "on") == "off", "a caller that wakes up finds it called off"


def test_without_the_store_every_replica_is_on_its_own(store: Any) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("Connection reset by peer")

    second = idle(replica(store, 1))
    second._store = Gone()
    assert second.look_for_work("m2v") is None
    second.wait(0.1, "m2v")
    assert second.neighbours().idle == second.neighbours().soon == {} and second.call(PAIR) is None


def test_replicas_that_call_and_look_at_once_always_agree(store: Any) -> None:
    """Four threads look for work, are idle and call each other, many times: who leads and who takes part fit."""
    agreed: list[list[Merge]] = [[] for _ in range(4)]
    ended = threading.Barrier(4, timeout=30)

    def work(number: int) -> None:
        mine = Gathering(store, replica=number, replicas=range(4))
        for turn in range(40):
            called = mine.look_for_work("m2v")
            if called is not None:
                agreed[number].append(called)
                continue
            if (turn + number) % 3 == 0:
                team = FOUR if turn % 2 else Team(first=number - number % 2, size=2)
                if (merge := mine.call(team)) is not None:
                    agreed[number].append(merge)
            mine.wait(0.002 * (1 + (turn * number) % 3), "m2v")
        last = mine.look_for_work("m2v")
        agreed[number] += [] if last is None else [last]
        mine.be_busy()
        ended.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert any(agreed)
    for led in {merge.leader for merges in agreed for merge in merges}:
        for team in (FOUR, Team(first=led - led % 2, size=2)):
            merge = Merge(team=team, leader=led)
            counts = {merges.count(merge) for number, merges in enumerate(agreed) if number in team.replicas}
            assert len(counts) == 1, f"{merge}: {counts}"
