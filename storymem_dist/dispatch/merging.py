"""Which replicas may render one shot together when there are fewer ready shots than idle replicas. Pure functions.

A *team* is an aligned run of neighbouring replicas of one node; its sizes are powers of two. The planner's simulation
and a running job (``gathering``) use the same rule. Knows numbers; nothing of ranks, stores or shots.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

LEAST_SPEEDUP = 1.05
"""A team is worth it only where it is faster than a single replica by this factor."""

SLACK = 0.04
"""The last shots may take this much longer than the least time, as a ratio: shots cannot be cut. Less asks for wider
teams, which lose more; more leaves long stories on narrow ones."""

SLACKS = (0.0, 0.02, SLACK, 0.06, 0.08)
"""What a plan tries: which slack is best depends on the number of stories for each replica, and on what teams lose."""

_HALVINGS = 30
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """``size`` neighbouring replicas from ``first`` on."""

    first: int
    size: int

    @property
    def replicas(self) -> range:
        """Their indices in the job."""
        return range(self.first, self.first + self.size)


def team_sizes(replicas_per_node: int) -> tuple[int, ...]:
    """Return the sizes of teams on a node: the powers of two, above 1, that divide its number of replicas."""
    powers = (2**power for power in range(1, replicas_per_node.bit_length()))
    return tuple(size for size in powers if replicas_per_node % size == 0)


def least_makespan(
    paths: Sequence[float] | np.ndarray[Any, Any], work: float, num_replicas: int, speedups: Mapping[int, float]
) -> float:
    """Return the least time in which ``num_replicas`` can end ``work``, if shots could be cut as one likes.

    ``paths``: for each story the longest path that is left, in the seconds (or TFLOP) of one replica; ``work`` is all
    that is left, in the same unit. A path ends in time when its shots have teams of some mix of sizes. A larger team
    costs more replica-seconds for the same shot: that is why this is more than ``work / num_replicas``.
    """
    sizes = sorted({1: 1.0, **speedups}.items(), key=lambda one: -one[1])
    seconds, areas = (np.array(one) for one in zip(*((1 / gain, size / gain) for size, gain in sizes), strict=True))
    longest = np.asarray(paths, dtype=float)
    rest = max(0.0, work - longest.sum())
    low = max(work / num_replicas, longest.max(initial=0.0) * seconds[0])
    high = max(longest.max(initial=0.0), (longest.sum() * areas.max() + rest) / num_replicas)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        area = (longest * np.interp(middle / np.maximum(longest, _TINY), seconds, areas)).sum() + rest
        low, high = (low, middle) if area <= num_replicas * middle else (middle, high)
    return float(high)


def wanted_size(path: float, left: float, speedups: Mapping[int, float]) -> int:
    """Return the smallest team (1: a single replica) with which ``path`` ends within ``left``; else the fastest.

    ``path``: of a shot and the longest path after it, in the time of one replica; ``left``: as ``least_makespan`` says.
    """
    sizes = sorted({1: 1.0, **speedups}.items())
    return next((size for size, gain in sizes if gain * left >= path), max(sizes, key=lambda one: one[1])[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyShot:
    """A ready shot: its ``kind``, its ``seconds`` on one replica, and those of the longest ``path`` from it on."""

    kind: str
    seconds: float
    path: float


def assign_teams(
    ready: Sequence[ReadyShot],
    idle: Mapping[int, str | None],
    *,
    left: float,
    replicas_per_node: int,
    speedups: Mapping[int, float],
    free_in: Mapping[int, float] = MappingProxyType({}),
) -> list[tuple[int, Team]]:
    """Return which of the ``ready`` shots (by index) begin now, each on a team (of size 1: a single replica).

    ``idle`` maps the replicas that have nothing to do to the kind of experts that each has loaded. The shot with the
    longest path chooses first: the smallest team with which its path ends within ``left`` seconds (see
    ``least_makespan``), or what is idle of it. It waits for a team that will be idle soon where it ends sooner with it.
    ``free_in``: seconds until each of the other replicas is idle, as far as known.
    """
    free, begun = dict(idle), list[tuple[int, Team]]()
    for index in sorted(range(len(ready)), key=lambda one: (-ready[one].path, one)):
        if not free:
            break
        shot = ready[index]
        size = wanted_size(shot.path, left, speedups)
        while size > 1 and not (teams := _idle_teams(size, free)):
            soonest = _soonest(size, free, free_in)
            smaller = max((one for one in speedups if one < size and _idle_teams(one, free)), default=1)
            if soonest + shot.seconds / speedups[size] < shot.seconds / speedups.get(smaller, 1.0):
                break
            size = smaller
        else:
            teams = _idle_teams(size, free)
            team = min(teams, key=lambda one: _preference(one, shot.kind, free, replicas_per_node))
            for replica in team.replicas:
                del free[replica]
            begun.append((index, team))
    return begun


def _idle_teams(size: int, free: Collection[int]) -> list[Team]:
    firsts = {replica - replica % size for replica in free}
    return [Team(first=first, size=size) for first in firsts if all(one in free for one in range(first, first + size))]


def _soonest(size: int, free: Collection[int], free_in: Mapping[int, float]) -> float:
    """Seconds until some team of ``size`` is idle."""
    firsts = {replica - replica % size for replica in free_in}
    waits = (
        max(0.0 if one in free else free_in.get(one, math.inf) for one in range(first, first + size))
        for first in firsts
    )
    return min(waits, default=math.inf)


def _preference(team: Team, kind: str, free: Mapping[int, str | None], replicas_per_node: int) -> tuple[Any, ...]:
    """Least first: replicas that must load other experts, idle replicas around it, its place."""
    loads = sum(free[replica] != kind for replica in team.replicas)
    return loads > 0, _idle_around(team, frozenset(free), replicas_per_node), team.first


def _idle_around(team: Team, free: frozenset[int], replicas_per_node: int) -> tuple[int, ...]:
    """How many replicas are idle in the aligned runs around ``team``, from twice its size up to the node."""
    counts, size = [], 2 * team.size
    while size <= replicas_per_node and replicas_per_node % size == 0:
        first = team.first - team.first % size
        counts.append(sum(replica in free for replica in range(first, first + size)))
        size *= 2
    return tuple(counts)
