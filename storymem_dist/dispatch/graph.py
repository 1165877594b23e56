"""All stories of a job and the state of every shot: which shots are ready, and which of them comes first.

The shots of one story form a graph (``story_graph``). A shot is ready when all that it needs is done; so shots with no
path between them are ready together, for any replicas.

**Priority.** Stories of a lower ``priority`` come first. Among those of one priority a batch takes at least ``max(work
left / replicas, longest path left)``. The shot with the shortest remaining path comes first, until the one with the
longest can wait for no other shot without making the batch longer; then that one comes first. Longest-first alone makes
all paths equally short at the end, and the last round leaves replicas idle (30 stories, 24 replicas: 0.94 of the bound;
this rule: 0.96). Shortest-first also completes stories one after the other instead of all in the last hour.
``benchmarks/dispatch.py`` measures both.

Ready shots are in heaps: a change of state costs O(log shots), and choosing among 30,000 shots takes microseconds.
Knows nothing of files, leases or time.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence

from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.story_graph import ShotStatus, StoryGraph
from storymem_dist.story.modes import GIVEN

_CRITICAL_SHOTS = 1.5
"""The longest path comes first when its slack is below this many times the cost of its next shot."""

ShotKey = tuple[int, str, str, str]
"""Identifies a planned shot in a job: part index, story id, shot id, first 16 hex digits of its fingerprint."""

_Group = tuple[str, str | None]
"""Shots of one kind, and of one ``lora_key`` unless that is None."""


class _Heap:
    """Shots by priority and remaining path: ``sign`` 1 has the least on top, -1 the most. Drops outdated ones there."""

    def __init__(self, sign: float) -> None:
        self._sign = sign
        self._entries: list[tuple[int, float, int, int]] = []

    def push(self, story: StoryGraph, position: int, priority: int = 0) -> None:
        heapq.heappush(self._entries, (priority, self._sign * story.remaining[position], story.number, position))

    def top(self, valid: Callable[[int, int], bool]) -> tuple[int, int] | None:
        """Number of the story and position of the shot on top."""
        while self._entries:
            _, _, number, position = self._entries[0]
            if valid(number, position):
                return number, position
            heapq.heappop(self._entries)
        return None


class ShotGraph:
    """The stories of a job, their states, and the ready shots of each kind."""

    def __init__(self, stories: Iterable[Sequence[PlannedShot]]) -> None:
        self.stories = [StoryGraph(number, shots) for number, shots in enumerate(stories)]
        self._by_key = {
            shot_key(shot): (story, position) for story in self.stories for position, shot in enumerate(story.shots)
        }
        self._longest_ready: dict[_Group, _Heap] = {}
        self._shortest_ready: dict[_Group, _Heap] = {}
        self._longest_open = _Heap(-1.0)
        self._ready = [[False] * len(story.shots) for story in self.stories]
        self._next = [[False] * len(story.shots) for story in self.stories]
        self._work = [[0.0] * len(story.shots) for story in self.stories]
        self._total_work = 0.0
        self._num_ready: dict[str, int] = {}
        self._leased: set[tuple[int, int]] = set()
        self._num_over = 0
        for story in self.stories:
            self._num_over += story.is_over
            for position in range(len(story.shots)):
                self._refresh(story, position)

    def find(self, key: ShotKey) -> tuple[StoryGraph, int] | None:
        """Return a shot by its key, as its story and its position there; None when this job has no such shot."""
        return self._by_key.get(key)

    def stories_of(self, part_index: int) -> list[StoryGraph]:
        """Return the stories of one batch part."""
        return [story for story in self.stories if story.part == part_index]

    def story_of(self, shot: PlannedShot) -> StoryGraph:
        """Return the story of a planned shot."""
        return self._by_key[shot_key(shot)][0]

    def state(self, shot: PlannedShot) -> ShotStatus:
        """Return what is known of ``shot``."""
        story, position = self._by_key[shot_key(shot)]
        return story.states[position]

    def set_state(self, shot: PlannedShot, state: ShotStatus) -> None:
        """Set the state of ``shot`` and update all that depends on it."""
        story, position = self._by_key[shot_key(shot)]
        was_over = story.is_over
        changed = story.set_state(position, state)
        self._num_over += story.is_over - was_over
        for one in changed:
            self._refresh(story, one)

    def best_ready(self, kind: str, num_replicas: int = 1, lora_key: str | None = None) -> PlannedShot | None:
        """Return the ready shot of ``kind`` that comes first (see the module; ties: order of the stories), or None.

        ``lora_key``: only among the shots with these LoRAs.
        """
        group = (kind, lora_key)
        if group not in self._longest_ready:
            return None
        longest = self._longest_ready[group].top(self._is_ready)
        if longest is None:
            return None
        if self._cannot_wait(*longest, num_replicas):
            return self._shot(longest)
        shortest = self._shortest_ready[group].top(self._is_ready)
        assert shortest is not None, "both heaps hold the same shots"
        return self._shot(shortest)

    def freed_by(self, shot: PlannedShot) -> list[PlannedShot]:
        """Return the shots that will be ready once ``shot`` is committed."""
        story, position = self._by_key[shot_key(shot)]
        return [story.shots[one] for one in story.freed_by(position)]

    def followers(self, shot: PlannedShot) -> list[PlannedShot]:
        """Return the shots that wait for ``shot``."""
        story, position = self._by_key[shot_key(shot)]
        return [story.shots[one] for one in story.followers(position)]

    def cannot_wait(self, shot: PlannedShot, num_replicas: int = 1) -> bool:
        """Whether the batch would get longer if ``shot``, once it is ready, waited for another one."""
        story, position = self._by_key[shot_key(shot)]
        return self._cannot_wait(story.number, position, num_replicas)

    def path_from(self, shot: PlannedShot) -> float:
        """Return the TFLOP of the longest path from ``shot`` to the end of its story, itself included."""
        story, position = self._by_key[shot_key(shot)]
        return story.remaining[position]

    def num_ready(self, kind: str | None = None) -> int:
        """Return how many shots (of ``kind``) are ready."""
        return sum(self._num_ready.values()) if kind is None else self._num_ready.get(kind, 0)

    def ready_to_render(self) -> list[PlannedShot]:
        """Return the ready shots that are rendered, those of the longest paths first. Looks at all shots."""
        places = [
            (story.number, position)
            for story, ready in zip(self.stories, self._ready, strict=True)
            for position, is_ready in enumerate(ready)
            if is_ready and story.shots[position].kind != GIVEN
        ]
        places.sort(key=lambda one: (-self.stories[one[0]].remaining[one[1]], one))
        return [self._shot(one) for one in places]

    def open_paths(self) -> list[float]:
        """Return, for each story that is not over, the TFLOP of its longest path. Looks at all shots."""
        longest = (
            max((left for left, is_next in zip(story.remaining, nexts, strict=True) if is_next), default=0.0)
            for story, nexts in zip(self.stories, self._next, strict=True)
        )
        return [path for path in longest if path]

    def leased(self) -> list[PlannedShot]:
        """Return the leased shots, those of the longest remaining paths first."""
        order = sorted(self._leased, key=lambda one: (-self.stories[one[0]].remaining[one[1]], one))
        return [self._shot(one) for one in order]

    def count(self, state: ShotStatus) -> int:
        """Return how many shots are in ``state``."""
        return sum(story.states.count(state) for story in self.stories)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is ready or running: every shot is done, or cannot be."""
        return self._num_over == len(self.stories)

    def longest_path(self) -> float:
        """Return the TFLOP of the longest path of shots that can only be rendered one after the other."""
        longest = self._longest_open.top(lambda number, position: self._next[number][position])
        return 0.0 if longest is None else self.stories[longest[0]].remaining[longest[1]]

    @property
    def work(self) -> float:
        """TFLOP of all shots that are left; half of those that are being rendered."""
        return self._total_work

    def _shot(self, place: tuple[int, int]) -> PlannedShot:
        return self.stories[place[0]].shots[place[1]]

    def _is_ready(self, number: int, position: int) -> bool:
        return self._ready[number][position]

    @staticmethod
    def _is_next(story: StoryGraph, position: int) -> bool:
        """Whether a shot is ready or being rendered."""
        return story.is_free(position) and story.is_open(position)

    def _cannot_wait(self, number: int, position: int, num_replicas: int) -> bool:
        """Whether the batch would get longer if this shot waited for another one."""
        story = self.stories[number]
        shortest_makespan = max(self._total_work / max(1, num_replicas), self.longest_path())
        return shortest_makespan - story.remaining[position] < _CRITICAL_SHOTS * story.shots[position].cost

    def _refresh(self, story: StoryGraph, position: int) -> None:
        """Bring heaps, counts and sums up to date with one shot."""
        number, shot, state = story.number, story.shots[position], story.states[position]
        is_leased = state is ShotStatus.LEASED
        (self._leased.add if is_leased else self._leased.discard)((number, position))
        had_work, work = self._work[number][position], 0.0
        if story.is_open(position) and state is not ShotStatus.COMMITTED:
            work = shot.cost / 2 if is_leased else shot.cost  # on average half of it is done
        self._work[number][position] = work
        self._total_work += work - had_work
        is_next, was_next = self._is_next(story, position), self._next[number][position]
        self._next[number][position] = is_next
        if is_next and not was_next:
            self._longest_open.push(story, position)
        ready, was_ready = state is ShotStatus.WAITING and story.is_free(position), self._ready[number][position]
        if ready == was_ready:
            return
        self._ready[number][position] = ready
        self._num_ready[shot.kind] = self._num_ready.get(shot.kind, 0) + (1 if ready else -1)
        if ready:
            for group in ((shot.kind, None), (shot.kind, shot.lora_key)):
                self._longest_ready.setdefault(group, _Heap(-1.0)).push(story, position, shot.story.priority)
                self._shortest_ready.setdefault(group, _Heap(1.0)).push(story, position, shot.story.priority)


def shot_key(shot: PlannedShot) -> ShotKey:
    """Return the key of a planned shot."""
    return shot.part, shot.story_id, shot.shot_id, shot.fingerprint[:16]
