"""The last shots of a job: when a replica renders a shot together with idle ones, and when it leaves it to others.

Asks ``gathering`` which replicas of its node are idle, and ``merging`` which team should render which shot. Without a
``Gathering``, a replica is always on its own. Knows queue and graph; nothing of ranks or pixels.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from storymem_dist.dispatch.gathering import Gathering, Merge
from storymem_dist.dispatch.merging import LEAST_SPEEDUP, SLACK, ReadyShot, Team, assign_teams, least_makespan
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.queue import Claim, ShotQueue
from storymem_dist.story.modes import GIVEN

_LONGEST_HOLD = 12.0  # units of poll_seconds for which a replica leaves shots to others
_CALLS, _CALL_SECONDS = 8, 0.1  # calls of one team, and the pause between two


@dataclass(frozen=True, kw_only=True)
class TeamRules:
    """``replica`` is this one; ``speedups`` maps sizes of teams to their speed over that of one replica.

    ``slack``: see ``merging.SLACK``.
    """

    gathering: Gathering
    replica: int
    replicas_per_node: int
    speedups: Mapping[int, float]
    slack: float = SLACK


class ElasticTail:
    """One replica's decisions to work with others. ``rules``: made when the batch opens; None: it never does."""

    def __init__(
        self,
        rules: Callable[[], TeamRules] | None,
        *,
        poll_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._make_rules = rules
        self._rules: TeamRules | None = None
        self._longest_hold = _LONGEST_HOLD * poll_seconds
        self._clock, self._sleep = clock, sleep
        self._loaded: str | None = None
        self._holds_since: float | None = None
        self._team: Team | None = None

    def open(self) -> None:
        """Let other replicas know of this one."""
        rules = None if self._make_rules is None else self._make_rules()
        if rules is not None:
            speedups = {size: gain for size, gain in rules.speedups.items() if gain >= LEAST_SPEEDUP}
            self._rules = replace(rules, speedups=speedups) if speedups else None

    def look_for_work(self, loaded: str | None) -> Merge | None:
        """Begin to look for a shot, with the experts of kind ``loaded``; what this replica was called for, if it was.

        A replica that was called must take part.
        """
        self._loaded = loaded
        return None if self._rules is None else self._rules.gathering.look_for_work(loaded)

    def wait(self, seconds: float) -> None:
        """Be idle for ``seconds``, or until this replica is called."""
        if self._rules is None:
            self._sleep(seconds)
        else:
            self._rules.gathering.wait(seconds, self._loaded)

    def end(self) -> None:
        """This replica has ended; it cannot be called any more."""
        if self._rules is not None:
            self._rules.gathering.be_busy()

    def instead(self, shot: PlannedShot, queue: ShotQueue) -> PlannedShot | None:
        """Return the shot that this replica should claim where it would claim ``shot``; None: wait.

        It waits where another team is better for all ready shots, or where replicas that may soon be idle belong to
        its own team; for a limited time, then it takes what it can have.
        """
        self._team = None
        if self._rules is None or shot.kind == GIVEN:
            return shot
        others = self._rules.gathering.neighbours()
        idle = self._able(others.idle, shot, queue)
        not_begun = {replica: None for replica, loaded in others.soon.items() if loaded is None}
        soon = self._able(others.soon, shot, queue) | not_begun
        num_ready = queue.graph.num_ready()
        num_idle = 1 + len(idle) + len(soon)
        num_idle_anywhere = num_idle + self._num_idle_elsewhere(queue, others.num_busy)
        if num_ready >= num_idle_anywhere:
            self._holds_since = None
            return shot
        share = math.ceil(num_ready * num_idle / num_idle_anywhere)
        best, team = self._assignment({**idle, **soon}, queue, share)
        if best is None or not all(replica in idle for replica in team.replicas if replica != self._rules.replica):
            if self._may_hold():
                return None
            best, team = self._assignment(idle, queue, share)
        self._holds_since = None
        self._team = team
        return best or shot

    def gather(self, claim: Claim, queue: ShotQueue) -> Merge | None:
        """Call the idle replicas that should render a claimed shot together with this one; None: it is alone.

        A shot that ran out of memory, or on which a process died, is not rendered by a team again.
        """
        if self._rules is None:
            return None
        team, merge = self._team or Team(first=self._rules.replica, size=1), None
        if claim.low_memory or claim.lease.num_deaths:
            team = replace(team, size=1)
        for size in sorted((one for one in self._rules.speedups if one <= team.size), reverse=True):
            first = self._rules.replica - self._rules.replica % size
            if (merge := self._call(Team(first=first, size=size))) is not None:
                break  # else one of them has found something else to do
        self._rules.gathering.be_busy()
        return merge

    def _call(self, team: Team) -> Merge | None:
        """Call a team, again if one of its replicas happened to look for work: it finds none and is idle again."""
        assert self._rules is not None
        gathering = self._rules.gathering
        for _ in range(_CALLS):
            if (merge := gathering.call(team)) is not None:
                return merge
            self._sleep(_CALL_SECONDS)
            others = gathering.neighbours()
            if not {self._rules.replica, *others.idle, *others.soon}.issuperset(team.replicas):
                break
        return None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _num_idle_elsewhere(self, queue: ShotQueue, num_busy: int) -> int:
        """Replicas of other nodes and jobs that hold no shot, as far as known; ``num_busy`` of this node hold one."""
        assert self._rules is not None
        others = queue.num_sharing - self._rules.replicas_per_node
        held_by_others = len(queue.graph.leased()) - num_busy
        return max(0, others - max(0, held_by_others))

    def _may_hold(self) -> bool:
        now = self._clock()
        if self._holds_since is None:
            self._holds_since = now
        return now - self._holds_since < self._longest_hold

    def _assignment(
        self, idle: Mapping[int, str | None], queue: ShotQueue, share: int
    ) -> tuple[PlannedShot | None, Team]:
        """The shot that this replica should render, and with which team, of the first ``share`` ready ones."""
        assert self._rules is not None
        rules, graph = self._rules, queue.graph
        shots = graph.ready_to_render()[:share]
        least = least_makespan(graph.open_paths(), graph.work, queue.num_sharing, rules.speedups)
        assigned = assign_teams(
            [ReadyShot(kind=shot.kind, seconds=shot.cost, path=graph.path_from(shot)) for shot in shots],
            {**idle, rules.replica: self._loaded},
            left=(1.0 + rules.slack) * least,
            replicas_per_node=rules.replicas_per_node,
            speedups=rules.speedups,
        )
        own = ((shots[index], team) for index, team in assigned if rules.replica in team.replicas)
        return next(own, (None, Team(first=rules.replica, size=1)))

    def _able(self, idle: Mapping[int, str | None], shot: PlannedShot, queue: ShotQueue) -> dict[int, str | None]:
        """Those of the ``idle`` replicas that may take part: with the right experts, or where to load them pays.

        It does while this replica must load them as well, or where the rest of the story is long.
        """
        assert self._rules is not None
        seconds = queue.seconds_after(shot)
        fastest = max(self._rules.speedups.values(), default=1.0)
        pays = seconds is not None and seconds * (1.0 - 1.0 / fastest) > queue.swap_seconds
        if pays or shot.kind != self._loaded:
            return dict(idle)
        return {replica: loaded for replica, loaded in idle.items() if loaded == shot.kind}
