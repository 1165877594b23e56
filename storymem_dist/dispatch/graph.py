"""All chains of a job and the state of every shot: what is ready, and what comes first.

A shot is ready when all shots before it in its chain are committed, so a chain has at most one ready shot: its *front*.
Ready shots are kept in one heap per kind, longest remaining chain first; every change of state costs O(log chains), so
choosing among 30,000 shots takes microseconds. Knows nothing of files, leases or time.
"""

import heapq
from collections.abc import Iterable, Sequence
from enum import Enum

from storymem_dist.dispatch.plan import PlannedShot

ShotKey = tuple[int, str, str, str]
"""What names a planned shot in a job: part, story, shot, and the first 16 digits of its fingerprint."""


class ShotState(Enum):
    """What is known of a shot. ``WAITING`` includes ready shots; ``LEASED`` ones are rendered by some replica."""

    WAITING = "waiting"
    LEASED = "leased"
    COMMITTED = "committed"
    FAILED = "failed"


class Chain:
    """The shots of one story, in order, with their states."""

    def __init__(self, number: int, shots: Sequence[PlannedShot]) -> None:
        self.number = number
        self.shots = tuple(shots)
        self.states = [ShotState.WAITING] * len(self.shots)
        self.remaining = [0.0] * (len(self.shots) + 1)
        for index in reversed(range(len(self.shots))):
            self.remaining[index] = self.remaining[index + 1] + self.shots[index].cost
        self.front = 0

    @property
    def part(self) -> int:
        """Number of the batch part it belongs to."""
        return self.shots[0].part

    @property
    def story_id(self) -> str:
        """The story's id."""
        return self.shots[0].story.story_id

    @property
    def is_complete(self) -> bool:
        """Whether all shots are committed."""
        return self.front == len(self.shots)

    @property
    def is_blocked(self) -> bool:
        """Whether the front has failed, so that nothing more can be rendered."""
        return not self.is_complete and self.states[self.front] is ShotState.FAILED


class ShotGraph:
    """Chains, states and the ready shots of each kind."""

    def __init__(self, chains: Iterable[Sequence[PlannedShot]]) -> None:
        self.chains = [Chain(number, shots) for number, shots in enumerate(chains)]
        self._places = {
            shot_key(shot): (chain, index) for chain in self.chains for index, shot in enumerate(chain.shots)
        }
        self._heaps: dict[str, list[tuple[float, int, int]]] = {}
        self._num_ready: dict[str, int] = {}
        self._in_heap: dict[int, int] = {}  # chain number -> index of its shot that counts as ready
        for chain in self.chains:
            self._refresh(chain)

    def place(self, key: ShotKey) -> tuple[Chain, int] | None:
        """Return chain and index of a shot by its key, or None when it is not (or no longer) part of this job."""
        return self._places.get(key)

    def chain_of(self, shot: PlannedShot) -> Chain:
        """Return the chain of a planned shot."""
        return self._places[shot_key(shot)][0]

    def state(self, shot: PlannedShot) -> ShotState:
        """Return what is known of ``shot``."""
        chain, index = self._places[shot_key(shot)]
        return chain.states[index]

    def set_state(self, shot: PlannedShot, state: ShotState) -> None:
        """Note a new state of ``shot`` and what follows from it for its chain."""
        chain, index = self._places[shot_key(shot)]
        chain.states[index] = state
        self._refresh(chain)

    def best_ready(self, kind: str) -> PlannedShot | None:
        """Return the ready shot of ``kind`` whose chain has the most work left (ties: the order of the stories)."""
        heap = self._heaps.get(kind, [])
        while heap:
            _, number, index = heap[0]
            if self._in_heap.get(number) == index and self.chains[number].shots[index].kind == kind:
                return self.chains[number].shots[index]
            heapq.heappop(heap)
        return None

    def num_ready(self, kind: str) -> int:
        """Return how many shots of ``kind`` are ready."""
        return self._num_ready.get(kind, 0)

    def leased(self) -> list[PlannedShot]:
        """Return the shots that are being rendered, those of the longest remaining chains first."""
        running = [chain for chain in self.chains if not chain.is_complete]
        running = [chain for chain in running if chain.states[chain.front] is ShotState.LEASED]
        running.sort(key=lambda chain: -chain.remaining[chain.front])
        return [chain.shots[chain.front] for chain in running]

    def count(self, state: ShotState) -> int:
        """Return how many shots are in ``state``."""
        return sum(chain.states.count(state) for chain in self.chains)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is ready or running: every chain is complete or blocked."""
        return all(chain.is_complete or chain.is_blocked for chain in self.chains)

    def _refresh(self, chain: Chain) -> None:
        """Move the chain's front to its first shot that is not committed and keep the ready heaps true."""
        front = next(
            (index for index, state in enumerate(chain.states) if state is not ShotState.COMMITTED), len(chain.shots)
        )
        before = self._in_heap.get(chain.number)
        chain.front = front
        ready = front < len(chain.shots) and chain.states[front] is ShotState.WAITING
        if before == (front if ready else None):
            return
        if before is not None:
            self._num_ready[chain.shots[before].kind] -= 1
            del self._in_heap[chain.number]
        if ready:
            kind = chain.shots[front].kind
            self._in_heap[chain.number] = front
            self._num_ready[kind] = self._num_ready.get(kind, 0) + 1
            heapq.heappush(self._heaps.setdefault(kind, []), (-chain.remaining[front], chain.number, front))


def shot_key(shot: PlannedShot) -> ShotKey:
    """Return the key of a planned shot."""
    return shot.part, shot.story.story_id, shot.shot.shot_id, shot.fingerprint[:16]
