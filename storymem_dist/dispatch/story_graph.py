"""The shots of one story as a graph, and the state of each: which are done, which wait for which, which cannot be done.

A shot waits for those that it needs (``needs.waits_for``). It is *done* when it is committed and all that it waits for
are done: so a record that turns out damaged makes all that need it wait again. It is *stuck* when it has failed, or a
shot that it waits for is stuck.

A change of state costs as much as the number of shots that it makes ready, done or stuck. Knows nothing of files,
leases or time.
"""

from collections.abc import Callable, Sequence
from enum import Enum

from storymem_dist.dispatch.plan import PlannedShot


class ShotStatus(Enum):
    """What is known of a shot. ``WAITING`` includes ready shots; some replica renders the ``LEASED`` ones."""

    WAITING = "waiting"
    LEASED = "leased"
    COMMITTED = "committed"
    FAILED = "failed"


class StoryGraph:
    """Shots of one story, in order, with their states. Shots of the story that are left out count as done.

    ``remaining``: for each shot the TFLOP of the longest path from it to the end, itself included. ``ShotGraph`` sets
    ``priority`` (stories of a lower one come first) and ``is_skipped`` (nothing of it is to be rendered).
    """

    def __init__(self, number: int, shots: Sequence[PlannedShot]) -> None:
        self.number = number
        self.shots = tuple(shots)
        self.priority = shots[0].story.priority
        self.is_skipped = False
        self.states = [ShotStatus.WAITING] * len(self.shots)
        positions = {shot.index: position for position, shot in enumerate(self.shots)}
        self._waits = [[positions[need] for need in shot.waits_for if need in positions] for shot in self.shots]
        self._followers: list[list[int]] = [[] for _ in self.shots]
        self.remaining = [shot.cost for shot in self.shots]
        for position in reversed(range(len(self.shots))):
            self.remaining[position] += max((self.remaining[one] for one in self._followers[position]), default=0.0)
            for need in self._waits[position]:
                self._followers[need].insert(0, position)
        self._num_missing = [len(waits) for waits in self._waits]
        self._num_stuck_needs = [0] * len(self.shots)
        self._done = [False] * len(self.shots)
        self._stuck = [False] * len(self.shots)
        self._num_done = 0
        self._num_open = len(self.shots)

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
        """Whether all shots are done."""
        return self._num_done == len(self.shots)

    @property
    def is_over(self) -> bool:
        """Whether nothing can be rendered any more: every shot is done or stuck."""
        return self._num_open == 0

    @property
    def is_failed(self) -> bool:
        """Whether it is over and not complete."""
        return self.is_over and not self.is_complete

    @property
    def failed(self) -> list[PlannedShot]:
        """The shots that have failed."""
        return [shot for shot, state in zip(self.shots, self.states, strict=True) if state is ShotStatus.FAILED]

    @property
    def blocked(self) -> list[PlannedShot]:
        """The shots that cannot be rendered because one that they need has failed."""
        ended = (ShotStatus.FAILED, ShotStatus.COMMITTED)
        return [
            shot
            for shot, state, stuck in zip(self.shots, self.states, self._stuck, strict=True)
            if stuck and state not in ended
        ]

    def is_free(self, position: int) -> bool:
        """Whether all that a shot needs is done."""
        return self._num_missing[position] == 0

    def is_open(self, position: int) -> bool:
        """Whether a shot is neither done nor stuck."""
        return not self._done[position] and not self._stuck[position]

    def freed_by(self, position: int) -> list[int]:
        """Return the waiting shots that wait for this one alone."""
        return [
            one
            for one in self._followers[position]
            if self._num_missing[one] == 1 and self.states[one] is ShotStatus.WAITING
        ]

    def followers(self, position: int) -> Sequence[int]:
        """Return the shots that wait for this one."""
        return self._followers[position]

    def set_state(self, position: int, state: ShotStatus) -> set[int]:
        """Set the state of a shot; return it and all whose readiness or openness that changes."""
        self.states[position] = state
        changed = {position}

        def is_done(one: int) -> bool:
            return self.states[one] is ShotStatus.COMMITTED and not self._num_missing[one]

        def is_stuck(one: int) -> bool:
            return self.states[one] is ShotStatus.FAILED or self._num_stuck_needs[one] > 0

        self._spread(position, self._done, is_done, self._num_missing, -1, changed)
        self._spread(position, self._stuck, is_stuck, self._num_stuck_needs, +1, changed)
        return changed

    def _spread(
        self,
        start: int,
        flags: list[bool],
        now: Callable[[int], bool],
        counts: list[int],
        step: int,
        changed: set[int],
    ) -> None:
        """Bring a flag of ``start`` up to date, and those of all that follow from it.

        ``counts`` of the followers of a shot change by ``step`` when its flag is set, and back when it is cleared.
        """
        left = [start]
        while left:
            position = left.pop()
            value = now(position)
            if value == flags[position]:
                continue
            before = self.is_open(position)
            flags[position] = value
            changed.add(position)
            self._num_open += self.is_open(position) - before
            if flags is self._done:
                self._num_done += 1 if value else -1
            for one in self._followers[position]:
                counts[one] += step if value else -step
                changed.add(one)
                left.append(one)
