"""Simulates how replicas share the shots of a job: the project's own choice (``choose_shot``), on predicted seconds.

Renders nothing and reads no clock. A replica renders a shot of another story while it saves one, and a shot must be
saved before those that need it can begin. Replicas that wait with the same experts are asked once per event, so 30,000
shots on 1,024 replicas take seconds. ``tail`` has the last shots, where idle replicas work together.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from storymem_dist.dispatch.choosing import choose_shot
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.merging import Team, least_makespan
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.planner.tail import Tail, Teams, Times

_SAME_TIME = 1e-6
"""Seconds between events that count as one: stories of equal shots run in step."""


class Bar(NamedTuple):
    """One shot in the timeline: ``size`` replicas from ``replica`` on render it from ``start`` to ``end`` (seconds)."""

    replica: int
    size: int
    start: float
    end: float
    story: int
    position: int
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """What a simulation found. ``busy_seconds``: of all replicas, without loading. ``num_loads``: of experts."""

    makespan: float
    busy_seconds: float
    num_loads: int
    bars: tuple[Bar, ...] = ()


class _Idle:
    """Replicas with nothing to do, longest idle first, by the experts that they have loaded.

    Those that save a shot are asked last, one by one: what they answer depends on the shot.
    """

    def __init__(self, num_replicas: int) -> None:
        self._by_loaded: dict[str | None, dict[int, None]] = {None: dict.fromkeys(range(num_replicas))}
        self._saving: dict[int, str | None] = {}

    def add(self, replica: int, loaded: str | None) -> None:
        """``replica`` has nothing to do, and saves nothing."""
        self._saving.pop(replica, None)
        self._by_loaded.setdefault(loaded, {})[replica] = None

    def add_saving(self, replica: int, loaded: str | None) -> None:
        """``replica`` has nothing to do while it saves a shot."""
        self._saving[replica] = loaded

    def is_saving(self, replica: int) -> bool:
        """Whether ``replica`` has nothing to do but its save."""
        return replica in self._saving

    def all(self) -> dict[int, str | None]:
        """All of them, with the experts that each has loaded."""
        waiting = {replica: loaded for loaded, replicas in self._by_loaded.items() for replica in replicas}
        return waiting | self._saving

    def take(self, replica: int, loaded: str | None) -> None:
        """``replica`` has something to do."""
        if self._saving.pop(replica, "") == "":
            del self._by_loaded[loaded][replica]

    def assign(self, begin: Callable[[int], bool], graph: ShotGraph) -> None:
        """Let replicas ``begin`` shots, which takes them, until none is ready, or nobody wants one.

        Replicas with the same experts that save nothing get the same answer until another shot is ready.
        """
        for replicas in list(self._by_loaded.values()):
            while replicas and graph.num_ready() and begin(next(iter(replicas))):
                pass
        for replica in list(self._saving):
            if not graph.num_ready():
                return
            begin(replica)


class _Running:
    """The shots that are rendered or saved, and when each makes others ready."""

    def __init__(self, graph: ShotGraph) -> None:
        self._graph = graph
        self._ends: dict[int, dict[int, tuple[float, frozenset[str]]]] = {}

    def add(self, shot: PlannedShot, end: float) -> None:
        """``shot`` is saved at ``end``."""
        number = self._graph.story_of(shot).number
        self._ends.setdefault(number, {})[shot.index] = (end, self._kinds(shot))

    def remove(self, shot: PlannedShot) -> None:
        """``shot`` is committed."""
        story = self._graph.story_of(shot)
        ends = self._ends[story.number]
        del ends[shot.index]
        for index, (end, _) in list(ends.items()):
            other = next(one for one in story.shots if one.index == index)
            ends[index] = (end, self._kinds(other))
        if not ends:
            del self._ends[story.number]

    def next_ready(self, kind: str) -> float:
        """When the next shot of ``kind`` will be ready; infinity when none will."""
        all_ends = (one for ends in self._ends.values() for one in ends.values())
        return min((end for end, kinds in all_ends if kind in kinds), default=float("inf"))

    def _kinds(self, shot: PlannedShot) -> frozenset[str]:
        return frozenset(freed.kind for freed in self._graph.freed_by(shot))


def simulate(
    stories: Sequence[Sequence[PlannedShot]],
    num_replicas: int,
    times: Callable[[PlannedShot], Times],
    *,
    swap_seconds: float,
    overlap: bool = True,
    teams: Teams | None = None,
    keep_bars: bool = False,
) -> Simulated:
    """Return how ``num_replicas`` equal replicas render ``stories``.

    ``swap_seconds``: a replica loses them each time it loads the experts of a kind, also for its first ones.
    ``overlap``: whether a replica begins another shot while it saves one. ``teams``: how replicas render the last shots
    together; None: each is always on its own.
    """
    graph = ShotGraph(stories)
    running, idle = _Running(graph), _Idle(num_replicas)
    tail = None if teams is None else Tail(graph, num_replicas, times, teams)
    loaded: list[str | None] = [None] * num_replicas
    saving: list[PlannedShot | None] = [None] * num_replicas
    save_ends = [0.0] * num_replicas
    events: list[tuple[float, int, bool, PlannedShot, Team, float]] = []  # time, replica, save to come?, ..., its save
    now, loads, busy = 0.0, 0, 0.0
    bars: list[Bar] = []

    def begin(replica: int) -> bool:
        shot = choose_shot(
            graph,
            loaded[replica],
            num_replicas=num_replicas,
            expected_wait=lambda kind: running.next_ready(kind) - now,
            swap_seconds=swap_seconds,
            saving=saving[replica],
        )
        if shot is not None:
            start(shot, Team(first=replica, size=1), times(shot))
        return shot is not None

    def start(shot: PlannedShot, team: Team, taken: Times) -> None:
        nonlocal loads, busy
        to_load = sum(loaded[replica] != shot.kind for replica in team.replicas)
        end = now + (swap_seconds if to_load else 0.0) + taken.render
        loads += to_load
        busy += team.size * taken.render
        if keep_bars:
            number = graph.story_of(shot).number
            bars.append(Bar(team.first, team.size, end - taken.render, end, number, shot.index, shot.kind))
        end = max(end, save_ends[team.first]) if overlap else end + taken.save
        for replica in team.replicas:
            idle.take(replica, loaded[replica])
            loaded[replica] = shot.kind
        graph.set_state(shot, ShotStatus.LEASED)
        running.add(shot, end + taken.save if overlap else end)
        if tail is not None:
            tail.note_begun(shot, team, end, end + taken.save if overlap else end)
        heapq.heappush(events, (end, team.first, overlap, shot, team, taken.save))

    while True:
        if tail is not None and tail.has_begun():
            for shot, team, taken in tail.assign(idle.all(), now):
                start(shot, team, taken)
        else:
            idle.assign(begin, graph)
        if not events:
            return Simulated(makespan=now, busy_seconds=busy, num_loads=loads, bars=tuple(bars))
        now = events[0][0]
        while events and events[0][0] <= now + _SAME_TIME:
            _, leader, to_save, shot, team, save = heapq.heappop(events)
            if to_save:
                saving[leader], save_ends[leader] = shot, now + save
                heapq.heappush(events, (now + save, leader, False, shot, team, save))
                idle.add_saving(leader, loaded[leader])
            else:
                if tail is not None:
                    tail.note_committed(shot)
                graph.set_state(shot, ShotStatus.COMMITTED)
                running.remove(shot)
                saving[leader] = None
                if not overlap or idle.is_saving(leader):
                    idle.add(leader, loaded[leader])
            if to_save == overlap:
                for replica in team.replicas[1:]:
                    idle.add(replica, loaded[replica])


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Seconds of all shots on one replica: ``rendering`` and ``saving``; ``last_save`` is the shortest save.

    For each kind of story, ``longest_paths`` has the longest path of shots that wait for each other, with their saves,
    ``rendering_paths`` without, and ``counts`` the number of such stories.
    """

    rendering: float
    saving: float
    last_save: float
    longest_paths: tuple[float, ...]
    rendering_paths: tuple[float, ...]
    counts: tuple[int, ...]

    def shortest_possible(self, num_replicas: int) -> float:
        """Seconds that no order of shots on ``num_replicas`` can beat, loading left out."""
        share = self.rendering / num_replicas + self.last_save
        return max(share, self.saving / num_replicas, *self.longest_paths)

    def shortest_with_teams(self, num_replicas: int, speedups: Mapping[int, float]) -> float:
        """The same where replicas render shots together, with what they lose by that."""
        repeated = np.repeat(self.rendering_paths, self.counts)
        return least_makespan(repeated, self.rendering, num_replicas, speedups)


def work_of(
    kinds: Sequence[Sequence[PlannedShot]], counts: Sequence[int], times: Callable[[PlannedShot], Times]
) -> Work:
    """Return the work of as many stories like each of ``kinds`` as ``counts`` says."""
    taken = [[times(shot) for shot in shots] for shots in kinds]
    paths = [
        longest_path(shots, [one.render + one.save for one in all]) for shots, all in zip(kinds, taken, strict=True)
    ]
    without = [longest_path(shots, [one.render for one in all]) for shots, all in zip(kinds, taken, strict=True)]
    return Work(
        rendering=sum(number * sum(one.render for one in all) for number, all in zip(counts, taken, strict=True)),
        saving=sum(number * sum(one.save for one in all) for number, all in zip(counts, taken, strict=True)),
        last_save=min(one.save for all in taken for one in all),
        longest_paths=tuple(paths),
        rendering_paths=tuple(without),
        counts=tuple(counts),
    )


def longest_path(shots: Sequence[PlannedShot], seconds: Sequence[float]) -> float:
    """Return the seconds of the longest path of shots that wait for each other."""
    ends: dict[int, float] = {}
    for shot, own in zip(shots, seconds, strict=True):
        ends[shot.index] = own + max((ends[need] for need in shot.waits_for if need in ends), default=0.0)
    return max(ends.values())
