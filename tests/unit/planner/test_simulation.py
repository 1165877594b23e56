"""The fast simulation equals the plain one, and its teams break no rule and come near to the bound."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from benchmarks.shot_workloads import make_chains, make_story, mixed_stories, planned
from storymem_dist.dispatch.merging import ReadyShot, assign_teams, least_makespan, wanted_size
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.planner.simulation import Simulated, simulate, work_of
from storymem_dist.planner.tail import Teams, Times
from tests.helpers.reference_dispatch import plain_simulation

SPEEDUPS = {2: 1.97, 4: 3.75, 8: 6.9}


def _stories(seed: int) -> list[tuple[PlannedShot, ...]]:
    rng = random.Random(seed)
    if seed % 2:
        return planned([make_story(number, rng.randint(1, 8)) for number in range(rng.randint(1, 9))])
    return planned(mixed_stories(rng.randint(1, 10), seed=seed))


def _times(stories: Sequence[Sequence[PlannedShot]], save: float, seed: int = 0) -> Callable[[PlannedShot], Times]:
    """Seconds about as the cost says; no two shots end at the same time."""
    rng = random.Random(seed)
    of = {id(shot): Times(render=shot.cost / 400 * rng.uniform(0.9, 1.1), save=save) for one in stories for shot in one}
    return lambda shot: of[id(shot)]


@pytest.mark.parametrize("seed", range(14))
def test_the_fast_simulation_equals_the_plain_one(seed: int) -> None:
    rng = random.Random(seed)
    stories = _stories(seed)
    times = _times(stories, rng.choice([0.5, 2.8, 50.0]), seed)
    settings = {"swap_seconds": rng.choice([0.0, 60.0, 400.0]), "overlap": rng.random() < 0.7}
    num_replicas = rng.randint(1, 14)
    found = simulate(stories, num_replicas, times, **settings)
    assert (found.makespan, found.num_loads) == pytest.approx(
        plain_simulation(stories, num_replicas, times, **settings), rel=1e-9
    )


def _with_teams(stories: Sequence[Sequence[PlannedShot]], num_replicas: int, per_node: int, save: float) -> Simulated:
    times = _times(stories, save)
    teams = Teams(
        replicas_per_node=per_node,
        speedups={size: gain for size, gain in SPEEDUPS.items() if size <= per_node},
        times=lambda shot, size: Times(render=times(shot).render / SPEEDUPS[size], save=save),
    )
    return simulate(stories, num_replicas, times, swap_seconds=7.0, teams=teams, keep_bars=True)


@pytest.mark.parametrize("seed", range(6))
def test_teams_render_each_shot_once_after_what_it_needs_and_never_share_a_replica(seed: int) -> None:
    stories = _stories(seed)
    found = _with_teams(stories, 8 * (1 + seed % 3), 8 if seed % 4 else 4, 3.0)
    assert sorted((bar.story, bar.position) for bar in found.bars) == sorted(
        (number, shot.index) for number, shots in enumerate(stories) for shot in shots
    )
    at = {(bar.story, bar.position): bar for bar in found.bars}
    for number, shots in enumerate(stories):
        for shot in shots:
            for need in shot.waits_for:
                assert at[number, shot.index].start >= at[number, need].end
    for replica in range(24):
        mine = sorted(bar for bar in found.bars if bar.replica <= replica < bar.replica + bar.size)
        times = sorted((bar.start, bar.end) for bar in mine)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(times))
    assert all(bar.replica % bar.size == 0 for bar in found.bars)


@pytest.mark.parametrize(("num_gpus", "least"), [(8, 0.98), (16, 0.97), (24, 0.96), (32, 0.97), (64, 0.96)])
def test_thirty_stories_come_near_to_the_bound_with_teams(num_gpus: int, least: float) -> None:
    stories = make_chains(30)
    times = lambda shot: Times(render=shot.cost / 400, save=2.8)  # noqa: E731
    speedups = {size: gain for size, gain in SPEEDUPS.items() if size <= 8}
    teams = Teams(
        replicas_per_node=8,
        speedups=speedups,
        times=lambda shot, size: Times(render=times(shot).render / speedups[size], save=2.8),
    )
    bound = work_of(stories, [1] * 30, times).shortest_with_teams(num_gpus, speedups)
    with_teams = simulate(stories, num_gpus, times, swap_seconds=0.0, teams=teams).makespan
    assert bound <= with_teams <= bound / least
    if num_gpus > 30:  # each story has a replica of its own, and most of the others idle
        assert simulate(stories, num_gpus, times, swap_seconds=0.0).makespan > 1.2 * with_teams


def test_one_story_gets_all_replicas_of_a_node() -> None:
    stories = planned([make_story(0, 5)])
    found = _with_teams(stories, 8, 8, 1.0)
    assert {bar.size for bar in found.bars} == {8}


def test_least_makespan_is_work_per_replica_or_the_longest_path() -> None:
    linear = {2: 2.0, 4: 4.0}
    assert least_makespan([10.0] * 8, 80.0, 8, linear) == pytest.approx(10.0)
    assert least_makespan([100.0], 100.0, 8, linear) == pytest.approx(25.0)
    assert least_makespan([100.0], 500.0, 8, linear) == pytest.approx(62.5)
    assert least_makespan([10.0, 30.0], 40.0, 4, {2: 1.6}) == pytest.approx(18.75)  # nothing wider than two
    assert least_makespan([10.0, 30.0], 40.0, 2, {2: 1.6}) > 20.0  # a team of two wastes a fifth of its time


def test_wanted_size_is_the_smallest_that_ends_in_time_else_the_fastest() -> None:
    assert [wanted_size(path, 10.0, SPEEDUPS) for path in (5.0, 10.0, 15.0, 30.0, 60.0, 500.0)] == [1, 1, 2, 4, 8, 8]


def test_the_longest_path_chooses_first_and_waits_for_a_team_only_where_that_is_sooner() -> None:
    ready = [ReadyShot(kind="m2v", seconds=100.0, path=100.0), ReadyShot(kind="m2v", seconds=100.0, path=370.0)]
    idle = dict.fromkeys(range(4), "m2v")
    rules = {"left": 100.0, "replicas_per_node": 8, "speedups": SPEEDUPS}
    assert [(index, team.size) for index, team in assign_teams(ready, idle, **rules)] == [(1, 4)]
    few = {0: "m2v", 1: "m2v", 2: "m2v"}
    soon = assign_teams(ready, few, free_in={3: 1.0}, **rules)
    assert [(index, team.size) for index, team in soon] == [(0, 1)]
    late = assign_teams(ready, few, free_in={3: 90.0}, **rules)
    assert [(index, team.size) for index, team in late] == [(1, 2), (0, 1)]
