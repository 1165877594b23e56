"""All chains of a job and the state of every shot: which shots are ready, and which of them comes first.

The shots of one story form a chain. A shot is ready when all shots before it in its chain are committed, so a chain has
at most one ready shot: its *front*.

**Priority.** A batch takes at least ``max(work left / replicas, longest chain left)``. The shortest remaining chain
comes first, until the longest can wait for no other shot without making the batch longer; then the longest comes first.
Longest-first alone makes all chains equally short at the end, and the last round leaves replicas idle (30 stories, 24
replicas: 0.94 of the bound; this rule: 0.96). Shortest-first also completes stories one after the other instead of all
in the last hour. ``benchmarks/dispatch.py`` measures both.

Ready shots are in heaps: a change of state costs O(log chains), and choosing among 30,000 shots takes microseconds.
Knows nothing of files, leases or time.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.story.modes import M2V, T2V

_CRITICAL_SHOTS = 1.5
"""The longest chain comes first when its slack is below this many times the cost of its next shot."""

ShotKey = tuple[int, str, str, str]
"""Identifies a planned shot in a job: part index, story id, shot id, first 16 hex digits of its fingerprint."""


class ShotStatus(Enum):
    """What is known of a shot. ``WAITING`` includes ready shots; some replica renders the ``LEASED`` ones."""

    WAITING = "waiting"
    LEASED = "leased"
    COMMITTED = "committed"
    FAILED = "failed"


class Chain:
    """The shots of one story, in order, with their states."""

    def __init__(self, number: int, shots: Sequence[PlannedShot]) -> None:
        self.number = number
        self.shots = tuple(shots)
        self.states = [ShotStatus.WAITING] * len(self.shots)
        self.remaining = [0.0] * (len(self.shots) + 1)
        for index in reversed(range(len(self.shots))):
            self.remaining[index] = self.remaining[index + 1] + self.shots[index].cost
        self.front = 0

    @property
    def part(self) -> int:
        """Index of its batch part."""
        return self.shots[0].part

    @property
    def story_id(self) -> str:
        """The story's id."""
        return self.shots[0].story_id

    @property
    def is_complete(self) -> bool:
        """Whether all shots are committed."""
        return self.front == len(self.shots)

    @property
    def is_blocked(self) -> bool:
        """Whether the front has failed, so that nothing more can be rendered."""
        return not self.is_complete and self.states[self.front] is ShotStatus.FAILED


class _Heap:
    """Chains by remaining work: ``sign`` 1 has the least on top, -1 the most. Outdated entries are dropped there."""

    def __init__(self, sign: float) -> None:
        self._sign = sign
        self._entries: list[tuple[float, int, int]] = []

    def push(self, chain: Chain) -> None:
        heapq.heappush(self._entries, (self._sign * chain.remaining[chain.front], chain.number, chain.front))

    def top(self, chains: Sequence[Chain], valid: Callable[[Chain], bool]) -> Chain | None:
        while self._entries:
            _, number, front = self._entries[0]
            if chains[number].front == front and valid(chains[number]):
                return chains[number]
            heapq.heappop(self._entries)
        return None


class ShotGraph:
    """Chains, states and the ready shots of each kind."""

    def __init__(self, chains: Iterable[Sequence[PlannedShot]]) -> None:
        self.chains = [Chain(number, shots) for number, shots in enumerate(chains)]
        self._by_key = {
            shot_key(shot): (chain, index) for chain in self.chains for index, shot in enumerate(chain.shots)
        }
        self._longest_ready: dict[str, _Heap] = {}
        self._shortest_ready: dict[str, _Heap] = {}
        self._longest_open = _Heap(-1.0)
        self._work = [0.0] * len(self.chains)
        self._total_work = 0.0
        self._ready_kind: dict[int, str] = {}  # chain number -> kind of its ready front
        self._num_ready: dict[str, int] = {}
        for chain in self.chains:
            self._refresh(chain)

    def find(self, key: ShotKey) -> tuple[Chain, int] | None:
        """Return chain and index of a shot by its key, or None when it is not (or no longer) part of this job."""
        return self._by_key.get(key)

    def chains_of(self, part_index: int) -> list[Chain]:
        """Return the chains of one batch part."""
        return [chain for chain in self.chains if chain.part == part_index]

    def chain_of(self, shot: PlannedShot) -> Chain:
        """Return the chain of a planned shot."""
        return self._by_key[shot_key(shot)][0]

    def state(self, shot: PlannedShot) -> ShotStatus:
        """Return what is known of ``shot``."""
        chain, index = self._by_key[shot_key(shot)]
        return chain.states[index]

    def set_state(self, shot: PlannedShot, state: ShotStatus) -> None:
        """Set the state of ``shot`` and update its chain."""
        chain, index = self._by_key[shot_key(shot)]
        chain.states[index] = state
        self._refresh(chain)

    def best_ready(self, kind: str, num_replicas: int = 1) -> PlannedShot | None:
        """Return the ready shot of ``kind`` that comes first (see the module; ties: order of the stories), or None."""
        if kind not in self._longest_ready:
            return None

        def is_ready(chain: Chain) -> bool:
            return self._ready_kind.get(chain.number) == kind

        longest = self._longest_ready[kind].top(self.chains, is_ready)
        if longest is None:
            return None
        if self._cannot_wait(longest, longest.front, num_replicas):
            return longest.shots[longest.front]
        shortest = self._shortest_ready[kind].top(self.chains, is_ready)
        assert shortest is not None, "both heaps hold the same chains"
        return shortest.shots[shortest.front]

    def kind_after(self, shot: PlannedShot) -> str | None:
        """Return the kind of the shot after ``shot``; None when ``shot`` is the last of its chain."""
        chain, index = self._by_key[shot_key(shot)]
        return chain.shots[index + 1].kind if index + 1 < len(chain.shots) else None

    def is_urgent_after(self, shot: PlannedShot, num_replicas: int = 1) -> bool:
        """Whether the shot after ``shot`` will come first once it is ready, because its chain cannot wait."""
        chain, index = self._by_key[shot_key(shot)]
        return index + 1 < len(chain.shots) and self._cannot_wait(chain, index + 1, num_replicas)

    def num_ready(self, kind: str) -> int:
        """Return how many shots of ``kind`` are ready."""
        return self._num_ready.get(kind, 0)

    def leased(self) -> list[PlannedShot]:
        """Return the leased shots, those of the longest remaining chains first."""
        running = [chain for chain in self.chains if not chain.is_complete]
        running = [chain for chain in running if chain.states[chain.front] is ShotStatus.LEASED]
        running.sort(key=lambda chain: -chain.remaining[chain.front])
        return [chain.shots[chain.front] for chain in running]

    def count(self, state: ShotStatus) -> int:
        """Return how many shots are in ``state``."""
        return sum(chain.states.count(state) for chain in self.chains)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is ready or running: every chain is complete or blocked."""
        return all(chain.is_complete or chain.is_blocked for chain in self.chains)

    def _cannot_wait(self, chain: Chain, index: int, num_replicas: int) -> bool:
        """Whether the batch would get longer if ``chain`` waited for another shot before its shot ``index``."""
        slack = self._shortest_makespan(num_replicas) - chain.remaining[index]
        return slack < _CRITICAL_SHOTS * chain.shots[index].cost

    def _shortest_makespan(self, num_replicas: int) -> float:
        """The bound of the module's docstring, in TFLOP: one replica's share of the work, or the longest chain."""
        longest = self._longest_open.top(self.chains, lambda chain: self._work[chain.number] > 0.0)
        longest_work = 0.0 if longest is None else longest.remaining[longest.front]
        return max(self._total_work / max(1, num_replicas), longest_work)

    def _refresh(self, chain: Chain) -> None:
        """Move the chain's front to its first shot that is not committed; update heaps, counts and sums."""
        committed = ShotStatus.COMMITTED
        front = next((i for i, state in enumerate(chain.states) if state is not committed), len(chain.shots))
        moved, chain.front = front != chain.front, front
        state = None if chain.is_complete else chain.states[front]
        work = 0.0 if state in (None, ShotStatus.FAILED) else chain.remaining[front]
        if state is ShotStatus.LEASED:
            work -= chain.shots[front].cost / 2  # on average half of it is done
        if work > 0.0 and (moved or self._work[chain.number] == 0.0):
            self._longest_open.push(chain)
        self._total_work += work - self._work[chain.number]
        self._work[chain.number] = work
        kind = chain.shots[front].kind if state is ShotStatus.WAITING else None
        before = self._ready_kind.pop(chain.number, None)
        if before is not None:
            self._num_ready[before] -= 1
        if kind is not None:
            self._ready_kind[chain.number] = kind
            self._num_ready[kind] = self._num_ready.get(kind, 0) + 1
            if before is None or moved:
                self._longest_ready.setdefault(kind, _Heap(-1.0)).push(chain)
                self._shortest_ready.setdefault(kind, _Heap(1.0)).push(chain)


def shot_key(shot: PlannedShot) -> ShotKey:
    """Return the key of a planned shot."""
    return shot.part, shot.story_id, shot.shot_id, shot.fingerprint[:16]


def choose_shot(
    graph: ShotGraph,
    loaded: str | None,
    *,
    num_replicas: int,
    expected_wait: Callable[[str], float],
    swap_seconds: float,
    saving: PlannedShot | None = None,
) -> PlannedShot | None:
    """Return the shot that a replica with the experts of kind ``loaded`` should render next; None: wait.

    A shot for the loaded experts comes first; with none loaded, a T2V shot (it opens a chain). If no shot for the
    loaded experts is ready, the replica swaps them, unless ``expected_wait(loaded)``, the seconds until one will be
    ready, is less than two swaps take. ``saving`` is the shot that this replica is saving. If the shot after it needs
    the loaded experts, the replica waits for it when it is urgent, and does not swap experts before it is ready.
    """
    if loaded is None:
        return graph.best_ready(T2V, num_replicas) or graph.best_ready(M2V, num_replicas)
    follows = saving if saving is not None and graph.kind_after(saving) == loaded else None
    if follows is not None and graph.is_urgent_after(follows, num_replicas):
        return None
    if (shot := graph.best_ready(loaded, num_replicas)) is not None:
        return shot
    other = graph.best_ready(M2V if loaded == T2V else T2V, num_replicas)
    if other is None:
        return None
    wait = 0.0 if follows is not None else expected_wait(loaded)  # saving takes no time, compared with swapping
    return None if wait < 2 * swap_seconds else other


def likely_order(graph: ShotGraph, num_replicas: int) -> list[PlannedShot]:
    """Return the ready shots and those after them in about the order in which a job will claim them.

    Marks them as committed in ``graph``, which nobody else may use.
    """
    order: list[PlannedShot] = []
    loaded: str | None = None
    while shot := choose_shot(
        graph, loaded, num_replicas=num_replicas, expected_wait=lambda kind: float("inf"), swap_seconds=0.0
    ):
        order.append(shot)
        loaded = shot.kind
        graph.set_state(shot, ShotStatus.COMMITTED)
    return order
