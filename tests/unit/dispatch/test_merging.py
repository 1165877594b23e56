from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from storymem_dist.dispatch.merging import ReadyShot, Team, assign_teams, team_sizes

SPEEDUPS = {2: 1.95, 4: 3.7, 8: 6.7}


@pytest.mark.parametrize(
    ("replicas", "sizes"), [(0, ()), (1, ()), (2, (2,)), (3, ()), (6, (2,)), (8, (2, 4, 8)), (12, (2, 4))]
)
def test_sizes_of_teams_are_powers_of_two_that_divide_the_replicas_of_a_node(
    replicas: int, sizes: tuple[int, ...]
) -> None:
    assert team_sizes(replicas) == sizes


def begun(idle: Iterable[int], *paths: float, left: float = 0.0, speedups: Mapping[int, float] = SPEEDUPS) -> list[Any]:
    """Which of the ready shots (of one second each, with these paths) begin, and on which replicas: first, size."""
    assigned = assign_teams(
        [ReadyShot(kind="m2v", seconds=1.0, path=path) for path in paths],
        dict.fromkeys(idle, "m2v"),
        left=left,
        replicas_per_node=8,
        speedups=speedups,
    )
    return [(index, team.first, team.size) for index, team in assigned]


@pytest.mark.parametrize(
    ("idle", "team"),
    [
        (range(8), (0, 8)),
        ((0, 3), (0, 1)),  # no neighbours
        ((0, 1, 2, 3, 6, 7), (0, 4)),
        ((1, 2, 3, 4, 5, 6), (2, 2)),  # aligned pairs only
        (range(8, 16), (8, 8)),
        (range(6, 10), (6, 2)),  # never over two nodes
    ],
)
def test_a_path_that_is_late_takes_the_fastest_team_that_is_idle(idle: range, team: tuple[int, int]) -> None:
    assert begun(idle, 5.0) == [(0, *team)]


def test_the_longest_path_chooses_first_and_takes_what_it_needs() -> None:
    assert begun(range(8), 2.0, 6.0, left=2.0) == [(1, 0, 4), (0, 4, 1)]
    assert begun(range(8), 2.0, 6.0, left=1.0) == [(1, 0, 8)], "the other one waits"
    assert begun(range(8), 1.0, 1.0, 1.0, left=1.0) == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
    assert begun((), 1.0) == begun(range(8)) == []


def test_a_small_team_leaves_larger_ones_together() -> None:
    assert begun((0, 1, 2, 3, 6, 7), 1.9, left=1.0) == [(0, 6, 2)]


def test_sizes_without_a_speed_are_not_possible() -> None:
    assert begun(range(8), 9.0, speedups={4: 3.0}) == [(0, 0, 4)]
    assert begun(range(8), 9.0, speedups={}) == [(0, 0, 1)]
    assert begun(range(8), 9.0, speedups={2: 1.9, 4: 2.5, 8: 2.2}) == [(0, 0, 4)], "eight are slower than four"


def test_a_team_lists_its_replicas() -> None:
    assert list(Team(first=4, size=4).replicas) == [4, 5, 6, 7]
