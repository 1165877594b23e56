import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storymem_dist.dispatch.graph import ShotGraph, ShotStatus, choose_shot, shot_key
from storymem_dist.dispatch.plan import PlannedShot, plan_story
from tests.helpers.fake_renderer import make_part, make_story

COMMITTED, FAILED, LEASED, WAITING = ShotStatus.COMMITTED, ShotStatus.FAILED, ShotStatus.LEASED, ShotStatus.WAITING


def chains_of(*lengths: int) -> list[tuple[PlannedShot, ...]]:
    part = make_part(Path("unused"), [])
    return [plan_story(0, part, make_story(f"s{n}", length), {}) for n, length in enumerate(lengths)]


def name(shot: PlannedShot | None) -> str | None:
    return None if shot is None else f"{shot.story_id}:{shot.index}"


def test_a_shot_is_ready_when_all_before_it_are_committed() -> None:
    graph = ShotGraph(chains_of(3))
    first, second, third = graph.chains[0].shots
    assert (name(graph.best_ready("t2v")), graph.best_ready("m2v")) == ("s0:0", None)
    graph.set_state(first, LEASED)
    assert (graph.best_ready("t2v"), graph.best_ready("m2v")) == (None, None)
    graph.set_state(first, COMMITTED)
    assert name(graph.best_ready("m2v")) == "s0:1"
    graph.set_state(second, COMMITTED)
    graph.set_state(third, COMMITTED)
    assert graph.best_ready("m2v") is None and graph.is_finished and graph.chains[0].is_complete


def test_with_few_replicas_short_chains_come_first_until_the_longest_cannot_wait() -> None:
    graph = ShotGraph(chains_of(4, 9, 2))
    assert name(graph.best_ready("t2v", num_replicas=1)) == "s2:0", "alone, any order takes the same time"
    assert name(graph.best_ready("t2v", num_replicas=3)) == "s1:0", "the longest chain decides when all end"


def test_shots_of_equal_chains_come_in_the_order_of_the_stories() -> None:
    graph = ShotGraph(chains_of(3, 3, 3))
    order = []
    while (shot := graph.best_ready("t2v", num_replicas=3)) is not None:
        order.append(name(shot))
        graph.set_state(shot, LEASED)
    assert order == ["s0:0", "s1:0", "s2:0"]


def test_a_failed_shot_blocks_its_chain_and_no_other() -> None:
    graph = ShotGraph(chains_of(3, 2))
    graph.set_state(graph.chains[0].shots[0], FAILED)
    assert graph.chains[0].is_blocked
    for shot in graph.chains[1].shots:
        assert not graph.is_finished
        graph.set_state(shot, COMMITTED)
    assert graph.is_finished
    graph.set_state(graph.chains[0].shots[0], WAITING)
    assert name(graph.best_ready("t2v")) == "s0:0"


def test_a_damaged_shot_in_the_middle_is_the_front_again_and_its_successors_stay_committed() -> None:
    graph = ShotGraph(chains_of(4))
    for shot in graph.chains[0].shots:
        graph.set_state(shot, COMMITTED)
    damaged = graph.chains[0].shots[1]
    graph.set_state(damaged, WAITING)
    assert graph.best_ready("m2v") is damaged and not graph.is_finished
    graph.set_state(damaged, COMMITTED)
    assert graph.chains[0].is_complete


def test_shots_are_found_by_key_and_counted_by_state() -> None:
    graph = ShotGraph(chains_of(2, 2))
    shot = graph.chains[1].shots[1]
    assert graph.find(shot_key(shot)) == (graph.chains[1], 1)
    assert graph.find((0, "s1", "shot_02", "0" * 16)) is None
    graph.set_state(graph.chains[1].shots[0], LEASED)
    assert graph.leased() == [graph.chains[1].shots[0]]
    assert (graph.count(WAITING), graph.count(LEASED), graph.num_ready("t2v")) == (3, 1, 1)


def never(kind: str) -> float:
    return float("inf")


def test_t2v_comes_first_and_experts_are_swapped_only_when_nothing_is_ready_for_the_loaded_ones() -> None:
    graph = ShotGraph(chains_of(2, 2))
    graph.set_state(graph.chains[0].shots[0], COMMITTED)
    rules = {"num_replicas": 2, "expected_wait": never, "swap_seconds": 60.0}
    assert name(choose_shot(graph, None, **rules)) == "s1:0"
    assert name(choose_shot(graph, "t2v", **rules)) == "s1:0"
    assert name(choose_shot(graph, "m2v", **rules)) == "s0:1"
    graph.set_state(graph.chains[1].shots[0], LEASED)
    assert name(choose_shot(graph, "t2v", **rules)) == "s0:1"
    assert name(choose_shot(graph, None, **rules)) == "s0:1"


@pytest.mark.parametrize(("wait", "expected"), [(30.0, None), (119.0, None), (121.0, "s1:0")])
def test_a_swap_waits_for_a_shot_that_will_be_ready_sooner(wait: float, expected: str | None) -> None:
    graph = ShotGraph(chains_of(3, 2))
    graph.set_state(graph.chains[0].shots[0], COMMITTED)
    graph.set_state(graph.chains[0].shots[1], LEASED)
    chosen = choose_shot(graph, "m2v", num_replicas=2, expected_wait=lambda kind: wait, swap_seconds=60.0)
    assert name(chosen) == expected


def test_a_replica_waits_for_its_own_save_where_the_next_shot_of_that_story_cannot_wait() -> None:
    graph = ShotGraph(chains_of(8, 3))
    rules = {"num_replicas": 2, "expected_wait": never, "swap_seconds": 60.0}
    for chain in graph.chains:
        graph.set_state(chain.shots[0], COMMITTED)
        graph.set_state(chain.shots[1], LEASED)
    long, short = (chain.shots[1] for chain in graph.chains)
    graph.set_state(short, COMMITTED)
    assert choose_shot(graph, "m2v", **rules, saving=long) is None
    assert name(choose_shot(graph, "m2v", **rules)) == "s1:2"
    assert name(choose_shot(graph, "t2v", **rules, saving=long)) == "s1:2", "it waits for no shot of other experts"
    graph.set_state(short, LEASED)
    graph.set_state(long, COMMITTED)
    assert name(choose_shot(graph, "m2v", **rules, saving=short)) == "s0:2"


class SlowGraph:
    """The same rules, looked up from scratch every time."""

    def __init__(self, chains: Sequence[Sequence[PlannedShot]]) -> None:
        self.chains = chains
        self.states = [[WAITING] * len(chain) for chain in chains]

    def front(self, number: int) -> int:
        states = self.states[number]
        return next((i for i, state in enumerate(states) if state is not COMMITTED), len(states))

    def ready(self, kind: str) -> list[PlannedShot]:
        found = []
        for number, chain in enumerate(self.chains):
            front = self.front(number)
            if front < len(chain) and self.states[number][front] is WAITING and chain[front].kind == kind:
                found.append(chain[front])
        return found

    def left(self, number: int) -> float:
        return sum(shot.cost for shot in self.chains[number][self.front(number) :])

    def best(self, kind: str, num_replicas: int) -> list[PlannedShot | None]:
        """The shot to come first; two where rounding decides."""
        ready = self.ready(kind)
        if not ready:
            return [None]
        total, longest = 0.0, 0.0
        for number, chain in enumerate(self.chains):
            front = self.front(number)
            if front == len(chain) or self.states[number][front] is FAILED:
                continue
            half = chain[front].cost / 2 if self.states[number][front] is LEASED else 0.0
            total += self.left(number) - half
            longest = max(longest, self.left(number))
        numbers = {shot.story_id: number for number, chain in enumerate(self.chains) for shot in chain[:1]}
        order = sorted(ready, key=lambda shot: numbers[shot.story_id])
        most = max(order, key=lambda shot: self.left(numbers[shot.story_id]))
        slack = max(total / num_replicas, longest) - self.left(numbers[most.story_id])
        least = min(order, key=lambda shot: self.left(numbers[shot.story_id]))
        if abs(slack - 1.5 * most.cost) < 1e-9 * most.cost:
            return [most, least]
        return [most if slack < 1.5 * most.cost else least]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_quick_graph_always_chooses_what_the_slow_one_does(
    lengths: list[int], num_replicas: int, rng: random.Random
) -> None:
    graph, slow = ShotGraph(chains_of(*lengths)), SlowGraph(chains_of(*lengths))
    for _ in range(40):
        number = rng.randrange(len(lengths))
        index = rng.randrange(lengths[number])
        state = rng.choice([COMMITTED, COMMITTED, LEASED, WAITING, FAILED])
        graph.set_state(graph.chains[number].shots[index], state)
        slow.states[number][index] = state
        for kind in ("t2v", "m2v"):
            assert graph.num_ready(kind) == len(slow.ready(kind))
            assert graph.best_ready(kind, num_replicas) in slow.best(kind, num_replicas)
