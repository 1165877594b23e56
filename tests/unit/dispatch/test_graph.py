import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storymem_dist.dispatch.choosing import choose_shot
from storymem_dist.dispatch.graph import ShotGraph, shot_key
from storymem_dist.dispatch.plan import PlannedShot, plan_story
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import make_part, make_story
from tests.helpers.story_graphs import shot_of, stories, story_of

COMMITTED, FAILED, LEASED, WAITING = ShotStatus.COMMITTED, ShotStatus.FAILED, ShotStatus.LEASED, ShotStatus.WAITING


def chains_of(*lengths: int) -> list[tuple[PlannedShot, ...]]:
    part = make_part(Path("unused"), [])
    return [plan_story(0, part, make_story(f"s{n}", length), {}) for n, length in enumerate(lengths)]


def name(shot: PlannedShot | None) -> str | None:
    return None if shot is None else f"{shot.story_id}:{shot.index}"


def test_a_shot_is_ready_when_all_before_it_are_committed() -> None:
    graph = ShotGraph(chains_of(3))
    first, second, third = graph.stories[0].shots
    assert (name(graph.best_ready("t2v")), graph.best_ready("m2v")) == ("s0:0", None)
    graph.set_state(first, LEASED)
    assert (graph.best_ready("t2v"), graph.best_ready("m2v")) == (None, None)
    graph.set_state(first, COMMITTED)
    assert name(graph.best_ready("m2v")) == "s0:1"
    graph.set_state(second, COMMITTED)
    graph.set_state(third, COMMITTED)
    assert graph.best_ready("m2v") is None and graph.is_finished and graph.stories[0].is_complete


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
    graph.set_state(graph.stories[0].shots[0], FAILED)
    assert graph.stories[0].is_failed and graph.stories[0].blocked == list(graph.stories[0].shots[1:])
    for shot in graph.stories[1].shots:
        assert not graph.is_finished
        graph.set_state(shot, COMMITTED)
    assert graph.is_finished
    graph.set_state(graph.stories[0].shots[0], WAITING)
    assert name(graph.best_ready("t2v")) == "s0:0"


def test_a_damaged_shot_in_the_middle_is_the_front_again_and_its_successors_stay_committed() -> None:
    graph = ShotGraph(chains_of(4))
    for shot in graph.stories[0].shots:
        graph.set_state(shot, COMMITTED)
    damaged = graph.stories[0].shots[1]
    graph.set_state(damaged, WAITING)
    assert graph.best_ready("m2v") is damaged and not graph.is_finished
    graph.set_state(damaged, COMMITTED)
    assert graph.stories[0].is_complete


def test_shots_are_found_by_key_and_counted_by_state() -> None:
    graph = ShotGraph(chains_of(2, 2))
    shot = graph.stories[1].shots[1]
    assert graph.find(shot_key(shot)) == (graph.stories[1], 1)
    assert graph.find((0, "s1", "shot_02", "0" * 16)) is None
    graph.set_state(graph.stories[1].shots[0], LEASED)
    assert graph.leased() == [graph.stories[1].shots[0]]
    assert (graph.count(WAITING), graph.count(LEASED), graph.num_ready("t2v")) == (3, 1, 1)


def never(kind: str) -> float:
    return float("inf")


def test_t2v_comes_first_and_experts_are_swapped_only_when_nothing_is_ready_for_the_loaded_ones() -> None:
    graph = ShotGraph(chains_of(2, 2))
    graph.set_state(graph.stories[0].shots[0], COMMITTED)
    rules = {"num_replicas": 2, "expected_wait": never, "swap_seconds": 60.0}
    assert name(choose_shot(graph, None, **rules)) == "s1:0"
    assert name(choose_shot(graph, "t2v", **rules)) == "s1:0"
    assert name(choose_shot(graph, "m2v", **rules)) == "s0:1"
    graph.set_state(graph.stories[1].shots[0], LEASED)
    assert name(choose_shot(graph, "t2v", **rules)) == "s0:1"
    assert name(choose_shot(graph, None, **rules)) == "s0:1"


@pytest.mark.parametrize(("wait", "expected"), [(30.0, None), (119.0, None), (121.0, "s1:0")])
def test_a_swap_waits_for_a_shot_that_will_be_ready_sooner(wait: float, expected: str | None) -> None:
    graph = ShotGraph(chains_of(3, 2))
    graph.set_state(graph.stories[0].shots[0], COMMITTED)
    graph.set_state(graph.stories[0].shots[1], LEASED)
    chosen = choose_shot(graph, "m2v", num_replicas=2, expected_wait=lambda kind: wait, swap_seconds=60.0)
    assert name(chosen) == expected


def test_a_replica_waits_for_its_own_save_where_the_next_shot_of_that_story_cannot_wait() -> None:
    graph = ShotGraph(chains_of(8, 3))
    rules = {"num_replicas": 2, "expected_wait": never, "swap_seconds": 60.0}
    for chain in graph.stories:
        graph.set_state(chain.shots[0], COMMITTED)
        graph.set_state(chain.shots[1], LEASED)
    long, short = (chain.shots[1] for chain in graph.stories)
    graph.set_state(short, COMMITTED)
    assert choose_shot(graph, "m2v", **rules, saving=long) is None
    assert name(choose_shot(graph, "m2v", **rules)) == "s1:2"
    assert name(choose_shot(graph, "t2v", **rules, saving=long)) == "s1:2", "it waits for no shot of other experts"
    graph.set_state(short, LEASED)
    graph.set_state(long, COMMITTED)
    assert name(choose_shot(graph, "m2v", **rules, saving=short)) == "s0:2"


def two_branches() -> ShotGraph:
    """The first shot, then two branches that recall it alone; the second branch has two shots."""
    story = story_of(
        "s",
        shot_of(0),
        shot_of(1, recall=(0,)),
        shot_of(2, recall=(0,)),
        shot_of(3, recall=(2,)),
        shot_of(4, recall=(1,)),
    )
    return ShotGraph([plan_story(0, make_part(Path("unused"), []), story, {})])


def test_shots_with_no_path_between_them_are_ready_together() -> None:
    graph = two_branches()
    first, *_ = graph.stories[0].shots
    assert graph.num_ready() == 1 and [shot.index for shot in graph.freed_by(first)] == [1, 2]
    graph.set_state(first, COMMITTED)
    assert graph.num_ready("m2v") == 2
    for shot in graph.stories[0].shots[1:3]:
        graph.set_state(shot, LEASED)
    assert [shot.index for shot in graph.leased()] == [1, 2] and not graph.is_finished


def test_a_failed_shot_blocks_only_those_that_need_it() -> None:
    graph = two_branches()
    story = graph.stories[0]
    for index, state in ((0, COMMITTED), (1, FAILED)):
        graph.set_state(story.shots[index], state)
    assert [shot.index for shot in story.blocked] == [4] and [shot.index for shot in story.failed] == [1]
    assert not story.is_over and graph.best_ready("m2v") is story.shots[2]
    for index in (2, 3):
        graph.set_state(story.shots[index], COMMITTED)
    assert story.is_failed and graph.is_finished
    graph.set_state(story.shots[1], WAITING)
    assert not graph.is_finished and graph.best_ready("m2v") is story.shots[1]


def test_a_damaged_record_makes_all_that_need_it_wait_and_no_other() -> None:
    graph = two_branches()
    story = graph.stories[0]
    for shot in story.shots[:4]:
        graph.set_state(shot, COMMITTED)
    graph.set_state(story.shots[1], WAITING)
    assert graph.num_ready() == 1 and not story.is_free(4)
    graph.set_state(story.shots[1], COMMITTED)
    assert story.is_free(4) and graph.best_ready("m2v") is story.shots[4]


def test_a_story_of_a_lower_priority_comes_first_and_before_the_loaded_experts() -> None:
    part = make_part(Path("unused"), [])
    urgent, long = make_story("urgent", 2, priority=-1), make_story("long", 9)
    graph = ShotGraph([plan_story(0, part, long, {}), plan_story(0, part, urgent, {})])
    rules = {"num_replicas": 2, "expected_wait": never, "swap_seconds": 60.0}
    assert name(choose_shot(graph, None, **rules)) == "urgent:0", "the longest comes first within a priority only"
    graph.set_state(graph.stories[1].shots[0], COMMITTED)
    assert name(choose_shot(graph, "t2v", **rules)) == "urgent:1", "experts are swapped for it"
    graph.set_state(graph.stories[1].shots[1], LEASED)
    assert name(choose_shot(graph, "t2v", **rules)) == "long:0"


def test_ready_shots_with_the_loaded_loras_come_first_unless_another_cannot_wait() -> None:
    planned = [
        [dataclasses.replace(shot, lora_key=key) for shot in shots]
        for shots, key in zip(chains_of(2, 2, 8), "abc", strict=True)
    ]
    graph = ShotGraph(planned)
    rules = {"expected_wait": never, "swap_seconds": 60.0}
    assert name(choose_shot(graph, "t2v", num_replicas=1, **rules, lora_key="b")) == "s1:0"
    assert name(choose_shot(graph, "t2v", num_replicas=1, **rules, lora_key="x")) == "s0:0"
    assert name(choose_shot(graph, "t2v", num_replicas=4, **rules, lora_key="b")) == "s2:0"


class SlowGraph:
    """The same rules, looked up from scratch every time."""

    def __init__(self, stories: Sequence[Sequence[PlannedShot]]) -> None:
        self.stories = stories
        self.states = [[WAITING] * len(shots) for shots in stories]

    def is_done(self, number: int, index: int) -> bool:
        return self.states[number][index] is COMMITTED and self.is_free(number, index)

    def is_free(self, number: int, index: int) -> bool:
        shot = self.stories[number][index]
        needed = {*shot.needs.memory, *([index - 1] if shot.needs.continues else [])}
        return all(self.is_done(number, one) for one in needed)

    def is_stuck(self, number: int, index: int) -> bool:
        failed = self.states[number][index] is FAILED
        return failed or any(self.is_stuck(number, one) for one in self.stories[number][index].waits_for)

    def left(self, number: int, index: int) -> float:
        shots = self.stories[number]
        after = [self.left(number, one.index) for one in shots if index in one.waits_for]
        return shots[index].cost + max(after, default=0.0)

    def ready(self, kind: str) -> list[tuple[int, int]]:
        return [
            (number, index)
            for number, shots in enumerate(self.stories)
            for index, shot in enumerate(shots)
            if shot.kind == kind and self.states[number][index] is WAITING and self.is_free(number, index)
        ]

    def best(self, kind: str, num_replicas: int) -> list[PlannedShot | None]:
        """The shot to come first; two where rounding decides."""
        ready = self.ready(kind)
        if not ready:
            return [None]
        total, longest = 0.0, 0.0
        for number, shots in enumerate(self.stories):
            for index, shot in enumerate(shots):
                state = self.states[number][index]
                if self.is_stuck(number, index) or self.is_done(number, index):
                    continue
                total += {COMMITTED: 0.0, LEASED: 0.5}.get(state, 1.0) * shot.cost
                longest = max(longest, self.left(number, index)) if self.is_free(number, index) else longest
        lowest = min(self.stories[number][index].story.priority for number, index in ready)
        first = [place for place in ready if self.stories[place[0]][place[1]].story.priority == lowest]
        most, least = max(first, key=lambda place: self.left(*place)), min(first, key=lambda place: self.left(*place))
        cost = self.stories[most[0]][most[1]].cost
        slack = max(total / num_replicas, longest) - self.left(*most)
        chosen = [most, least] if abs(slack - 1.5 * cost) < 1e-9 * cost else [most if slack < 1.5 * cost else least]
        return [self.stories[number][index] for number, index in chosen]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).flatmap(
        lambda numbers: st.tuples(*(stories(f"s{n}", 6) for n in range(len(numbers))))
    ),
    st.sampled_from(["window", "anchored", "entities"]),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_the_quick_graph_always_chooses_what_the_slow_one_does(
    some: tuple[Story, ...], rule: str, num_replicas: int, rng: random.Random
) -> None:
    part = dataclasses.replace(make_part(Path("unused"), []), memory=MemorySettings(recall=rule))
    planned = [plan_story(0, part, story, {}) for story in some]
    graph, slow = ShotGraph(planned), SlowGraph(planned)
    for _ in range(30):
        number = rng.randrange(len(planned))
        index = rng.randrange(len(planned[number]))
        state = rng.choice([COMMITTED, COMMITTED, COMMITTED, LEASED, WAITING, FAILED])
        graph.set_state(planned[number][index], state)
        slow.states[number][index] = state
        for kind in ("t2v", "m2v"):
            assert graph.num_ready(kind) == len(slow.ready(kind))
            assert graph.best_ready(kind, num_replicas) in slow.best(kind, num_replicas)
    over = [all(slow.is_stuck(n, i) or slow.is_done(n, i) for i in range(len(one))) for n, one in enumerate(planned)]
    assert [story.is_over for story in graph.stories] == over
