"""The last shots of a simulated job: which of them idle replicas render together (``dispatch.merging``)."""

from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.merging import SLACK, ReadyShot, Team, assign_teams, least_makespan
from storymem_dist.dispatch.plan import PlannedShot

_MORE_THAN_IDLE = 8
"""Ready shots that are looked at beyond one for each idle replica: those before them may wait for a team."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Seconds of a shot: ``render`` keeps its replicas busy, ``save`` goes on next to the shot after that."""

    render: float
    save: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Teams:
    """Idle replicas that render a shot together.

    ``replicas_per_node`` replicas sit on a node. ``speedups`` maps the sizes of teams to their speed over that of one
    replica; ``times`` gives the seconds of a shot on a team of more than one. ``slack``: see ``merging.SLACK``.
    """

    replicas_per_node: int
    speedups: Mapping[int, float]
    times: Callable[[PlannedShot, int], Times]
    slack: float = SLACK


class Tail:
    """Follows a simulation; from the moment when at most one ready shot is left for each replica, assigns the shots."""

    def __init__(
        self, graph: ShotGraph, num_replicas: int, times: Callable[[PlannedShot], Times], teams: Teams
    ) -> None:
        self._graph, self._num_replicas, self._times, self._teams = graph, num_replicas, times, teams
        self._ready: list[tuple[float, int, int]] = []  # path (negative), number of the story, position
        self._ends: dict[tuple[int, int], float] = {}
        self._busy_until = [0.0] * num_replicas
        self._deadline: float | None = None
        self._has_begun = False
        self._seconds: list[list[float]] = []
        self._paths: list[list[float]] = []
        self._places = {
            id(shot): (story.number, position) for story in graph.stories for position, shot in enumerate(story.shots)
        }
        for story in graph.stories:
            seconds = [taken.render + taken.save for taken in map(times, story.shots)]
            paths = list(seconds)
            for position in reversed(range(len(seconds))):
                paths[position] += max((paths[one] for one in story.followers(position)), default=0.0)
            self._seconds.append(seconds)
            self._paths.append(paths)
            for position in range(len(seconds)):
                if story.is_free(position):
                    insort(self._ready, (-paths[position], story.number, position))

    def has_begun(self) -> bool:
        """Whether the tail has begun."""
        self._has_begun = self._has_begun or self._graph.num_ready() <= self._num_replicas
        return self._has_begun

    def note_begun(self, shot: PlannedShot, team: Team, free_at: float, end: float) -> None:
        """``team`` renders ``shot``: it is free again at ``free_at``, and the shot is saved at ``end``."""
        number, position = self._places[id(shot)]
        self._ready.remove((-self._paths[number][position], number, position))
        self._ends[number, position] = end
        for replica in team.replicas:
            self._busy_until[replica] = free_at

    def note_committed(self, shot: PlannedShot) -> None:
        """``shot`` is about to be committed."""
        number, position = self._places[id(shot)]
        del self._ends[number, position]
        for one in self._graph.stories[number].freed_by(position):
            insort(self._ready, (-self._paths[number][one], number, one))

    def assign(self, idle: Mapping[int, str | None], now: float) -> Iterator[tuple[PlannedShot, Team, Times]]:
        """The shots that begin at ``now``, each with its team and the time that it takes."""
        if not idle or not self._ready:
            return
        if self._deadline is None or now >= self._deadline:
            self._deadline = now + (1.0 + self._teams.slack) * self._least_makespan(now)
        first = [(number, position) for _, number, position in self._ready[: len(idle) + _MORE_THAN_IDLE]]
        ready = [
            ReadyShot(
                kind=self._graph.stories[number].shots[position].kind,
                seconds=self._seconds[number][position],
                path=self._paths[number][position],
            )
            for number, position in first
        ]
        assigned = assign_teams(
            ready,
            idle,
            left=self._deadline - now,
            replicas_per_node=self._teams.replicas_per_node,
            speedups=self._teams.speedups,
            free_in={replica: end - now for replica, end in enumerate(self._busy_until) if replica not in idle},
        )
        for index, team in assigned:
            number, position = first[index]
            shot = self._graph.stories[number].shots[position]
            yield shot, team, self._times(shot) if team.size == 1 else self._teams.times(shot, team.size)

    def _least_makespan(self, now: float) -> float:
        work, longest = 0.0, dict[int, float]()
        for path, number, _ in self._ready:
            longest[number] = max(longest.get(number, 0.0), -path)
        for (number, position), end in self._ends.items():
            done = self._seconds[number][position] - (end - now)
            longest[number] = max(longest.get(number, 0.0), self._paths[number][position] - max(0.0, done))
            work -= max(0.0, done)
        for story in self._graph.stories:
            if not story.is_complete:
                work += sum(
                    self._seconds[story.number][position]
                    for position in range(len(story.shots))
                    if story.is_open(position)
                )
        return least_makespan(list(longest.values()), work, self._num_replicas, self._teams.speedups)
