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
While the batch is rendered, stories may join it, be planned anew, get another priority or be skipped, and all stories
of a part may be held back (``requests``).
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
        self.stories: list[StoryGraph] = []
        self._by_key: dict[ShotKey, tuple[StoryGraph, int]] = {}
        self._by_id: dict[tuple[int, str], StoryGraph] = {}
        self._longest_ready: dict[_Group, _Heap] = {}
        self._shortest_ready: dict[_Group, _Heap] = {}
        self._longest_open = _Heap(-1.0)
        self._ready: list[list[bool]] = []
        self._next: list[list[bool]] = []
        self._work: list[list[float]] = []
        self._total_work = 0.0
        self._num_ready: dict[str, int] = {}
        self._leased: set[tuple[int, int]] = set()
        self._num_over = 0
        self._held_parts: set[int] = set()
        for shots in stories:
            self.add_story(shots)

    # -- stories -------------------------------------------------------------------------------------------------------

    def add_story(self, shots: Sequence[PlannedShot]) -> StoryGraph:
        """Add a story, all of whose shots are still to be rendered, and return it."""
        story = StoryGraph(len(self.stories), shots)
        self.stories.append(story)
        self._ready.append([False] * len(shots))
        self._next.append([False] * len(shots))
        self._work.append([0.0] * len(shots))
        self._enter(story)
        return story

    def replace_story(self, story: StoryGraph, shots: Sequence[PlannedShot]) -> StoryGraph:
        """Put the same story, planned anew, in place of ``story``; return it.

        Shots whose fingerprint is the same keep their states. The others are still to be rendered.
        """
        new, number = StoryGraph(story.number, shots), story.number
        new.priority, new.is_skipped = story.priority, story.is_skipped
        states = {shot_key(shot): state for shot, state in zip(story.shots, story.states, strict=True)}
        for position, shot in enumerate(story.shots):
            self._total_work -= self._work[number][position]
            self._num_ready[shot.kind] = self._num_ready.get(shot.kind, 0) - self._ready[number][position]
            self._leased.discard((number, position))
        self._num_over -= _is_closed(story)
        self.stories[number] = new
        self._ready[number], self._next[number] = [False] * len(shots), [False] * len(shots)
        self._work[number] = [0.0] * len(shots)
        self._enter(new)
        for key in states.keys() - {shot_key(shot) for shot in shots}:  # after that: a thread may look for the others
            del self._by_key[key]
        for shot in shots:
            if (state := states.get(shot_key(shot))) is not None:
                self.set_state(shot, state)
        return new

    def _enter(self, story: StoryGraph) -> None:
        self._by_id[story.part, story.story_id] = story
        self._by_key |= {shot_key(shot): (story, position) for position, shot in enumerate(story.shots)}
        self._num_over += _is_closed(story)
        self._refresh_all(story)

    def set_priority(self, story: StoryGraph, priority: int) -> None:
        """Give ``story`` a priority that is not higher than its own."""
        if priority < story.priority:
            story.priority = priority
            for position, is_ready in enumerate(self._ready[story.number]):
                if is_ready:
                    self._push_ready(story, position)

    def set_skipped(self, story: StoryGraph, is_skipped: bool) -> None:
        """Skip ``story``: none of its shots is ready any more, and the batch ends without it; or take that back."""
        if is_skipped != story.is_skipped:
            self._num_over -= _is_closed(story)
            story.is_skipped = is_skipped
            self._num_over += _is_closed(story)
            self._refresh_all(story)

    def set_held(self, part_index: int, is_held: bool) -> None:
        """Hold back all shots of a part that are not leased, without ending the batch; or take that back."""
        if is_held != (part_index in self._held_parts):
            (self._held_parts.add if is_held else self._held_parts.discard)(part_index)
            for story in self.stories_of(part_index):
                self._refresh_all(story)

    def story(self, part_index: int, story_id: str) -> StoryGraph | None:
        """Return a story by its id; None when this job has no such story."""
        return self._by_id.get((part_index, story_id))

    # -- shots ---------------------------------------------------------------------------------------------------------

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
        was_closed = _is_closed(story)
        changed = story.set_state(position, state)
        self._num_over += _is_closed(story) - was_closed
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

    def priority(self, shot: PlannedShot) -> int:
        """Return the priority of the story of ``shot``."""
        return self.story_of(shot).priority

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
        """Whether nothing is ready or running: every shot is done, or cannot be, or belongs to a skipped story."""
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
        return story.is_free(position) and story.is_open(position) and not story.is_skipped

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
        if story.is_open(position) and not story.is_skipped and state is not ShotStatus.COMMITTED:
            work = shot.cost / 2 if is_leased else shot.cost  # on average half of it is done
        self._work[number][position] = work
        self._total_work += work - had_work
        is_next, was_next = self._is_next(story, position), self._next[number][position]
        self._next[number][position] = is_next
        if is_next and not was_next:
            self._longest_open.push(story, position)
        is_claimable = not story.is_skipped and story.part not in self._held_parts
        ready = state is ShotStatus.WAITING and story.is_free(position) and is_claimable
        if ready == self._ready[number][position]:
            return
        self._ready[number][position] = ready
        self._num_ready[shot.kind] = self._num_ready.get(shot.kind, 0) + (1 if ready else -1)
        if ready:
            self._push_ready(story, position)

    def _push_ready(self, story: StoryGraph, position: int) -> None:
        """Put a ready shot into its heaps. An entry with an earlier, higher priority may stay: it comes later."""
        shot = story.shots[position]
        for group in ((shot.kind, None), (shot.kind, shot.lora_key)):
            self._longest_ready.setdefault(group, _Heap(-1.0)).push(story, position, story.priority)
            self._shortest_ready.setdefault(group, _Heap(1.0)).push(story, position, story.priority)

    def _refresh_all(self, story: StoryGraph) -> None:
        for position in range(len(story.shots)):
            self._refresh(story, position)


def _is_closed(story: StoryGraph) -> bool:
    """Whether nothing of a story is to be rendered any more."""
    return story.is_over or story.is_skipped


def shot_key(shot: PlannedShot) -> ShotKey:
    """Return the key of a planned shot."""
    return shot.part, shot.story_id, shot.shot_id, shot.fingerprint[:16]
