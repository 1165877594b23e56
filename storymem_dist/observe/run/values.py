"""The values that ``state`` keeps: stories, shots, attempts, and rows of time. Knows nothing of how events change them.

Words: a *row* is one replica over all its starts (a later job continues the rows of an earlier one); an *attempt* is
one try at a shot by one writer.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import storymem_dist.events as ev

RECENT_STEPS = 8
"""Number of last steps over which the shown seconds per step are averaged."""

RowKey = tuple[str, int]
"""Job name and replica number. The name distinguishes jobs that share the folder; it is empty for the first one."""


@dataclass(slots=True)
class Span:
    """A piece of a row's time: a stage, ``wait``, or ``helping`` with a shot of another row.

    Wall times in seconds; ``end`` is None while it lasts.
    """

    kind: str
    start: float
    end: float | None = None
    story_id: str | None = None
    shot_id: str | None = None


@dataclass(kw_only=True, slots=True)
class Attempt:
    """One try at a shot.

    ``outcome``: ``running``, ``finished``, ``failed``, ``stopped`` (on request) or ``interrupted`` (its process
    ended). ``step`` counts finished steps; those up to ``resumed_step`` came from a checkpoint. ``is_rendered``: it is
    being saved, so the next attempt of its row may begin.
    """

    started: ev.ShotStarted
    row: RowKey
    writer: str
    start: float
    end: float | None = None
    outcome: str = "running"
    finished: ev.ShotFinished | None = None
    reason: str = ""
    is_rendered: bool = False
    resumed_step: int = 0
    step: int = 0
    num_steps: int = 0
    num_timed_steps: int = 0
    num_reused_steps: int = 0
    step_seconds: float = 0.0
    expert_steps: dict[str, tuple[int, float]] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    decisions: list[ev.MemoryDecided] = field(default_factory=list)

    def owns(self, span: Span) -> bool:
        """Whether ``span`` is a stage of this attempt's shot."""
        return (span.story_id, span.shot_id) == (self.started.story_id, self.started.shot_id)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the steps this attempt has timed."""
        return self.step_seconds / self.num_timed_steps if self.num_timed_steps else None


@dataclass(kw_only=True, slots=True)
class ShotState:
    """A shot of the batch. ``status``: ``waiting``, ``running``, ``finished``, ``failed`` or ``blocked``."""

    story_id: str
    shot_id: str
    shot_index: int = 0
    status: str = "waiting"
    reason: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    committed_before: bool = False

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None


@dataclass(kw_only=True, slots=True)
class StoryState:
    """A story of the batch and its shots by id. ``waits_for`` and ``priority``: as in ``StoryStarted``.

    ``number`` counts the stories of the run from 0, as events named them.
    """

    story_id: str
    number: int = 0
    name: str = ""
    num_shots: int = 0
    waits_for: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    shots: dict[str, ShotState] = field(default_factory=dict)
    outcome: str = ""
    video: str | None = None
    message: str = ""

    @property
    def num_finished(self) -> int:
        """Shots that are committed."""
        return sum(shot.status == "finished" for shot in self.shots.values())

    @property
    def num_left(self) -> int:
        """Shots that may still be rendered."""
        over = sum(shot.status in ("finished", "failed", "blocked") for shot in self.shots.values())
        return max(self.num_shots, len(self.shots)) - over

    def render_again(self, shot_ids: Sequence[str]) -> None:
        """These committed shots wait to be rendered again."""
        for shot in self.shots.values():
            if shot.shot_id in shot_ids and shot.status == "finished":
                shot.status, shot.committed_before, self.outcome = "waiting", False, ""

    def waits_of(self, shot: ShotState) -> str:
        """The names of the shots that ``shot`` waits for directly, as far as known."""
        position = shot.shot_id.removeprefix("shot_")
        index = int(position) - 1 if position.isdecimal() and len(position) < 10 else -1
        waits = self.waits_for[index] if 0 <= index < len(self.waits_for) else ()
        return ", ".join(f"shot_{need + 1:02d}" for need in waits)

    @property
    def longest_left(self) -> int:
        """How many of the shots that are left can only be rendered one after the other."""
        over = {shot.shot_id for shot in self.shots.values() if shot.status in ("finished", "failed", "blocked")}
        if not self.waits_for:
            return max(self.num_shots, len(self.shots)) - len(over)
        weights = [0 if f"shot_{index + 1:02d}" in over else 1 for index in range(len(self.waits_for))]
        return max((before + weight for before, weight in zip(levels(self.waits_for, weights), weights, strict=True)))


@dataclass(kw_only=True, slots=True)
class Start:
    """One start of a row's process: from ``JobStarted`` to ``JobFinished``, or to the last sign of life."""

    writer: str
    job: ev.JobStarted
    start: float
    last_seen: float
    outcome: str = ""


@dataclass(kw_only=True, slots=True)
class Row:
    """One replica of one job: what it does now, and what it has done.

    ``saving`` is a rendered shot that is still being saved while ``attempt`` is rendered. ``queue_depths`` are the
    numbers of shots that were ready when it took one.
    """

    key: RowKey
    starts: list[Start] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    open_spans: list[Span] = field(default_factory=list)
    attempt: Attempt | None = None
    saving: Attempt | None = None
    recent_steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    weights: dict[str, ev.WeightsProgress] = field(default_factory=dict)
    weights_done: list[ev.WeightsProgress] = field(default_factory=list)
    gpu_memory_gib: float | None = None
    last_seen: float = 0.0
    num_finished: int = 0
    num_failed: int = 0
    num_resumed: int = 0
    waited_seconds: float = 0.0
    collective_seconds: float | None = None
    bytes_read: int | None = None
    queue_depths: list[int] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the last few steps."""
        return sum(self.recent_steps) / len(self.recent_steps) if self.recent_steps else None

    def open_attempt(self, story_id: str, shot_id: str) -> Attempt | None:
        """The open attempt at this shot: being rendered, or being saved while another is rendered."""
        for attempt in (self.attempt, self.saving):
            if attempt is not None and (attempt.started.story_id, attempt.started.shot_id) == (story_id, shot_id):
                return attempt
        return None

    @property
    def stage(self) -> str:
        """The innermost stage under way, or an empty string; stages of a shot in the background do not count."""
        attempt = self.attempt
        spans = [s for s in self.open_spans if attempt is None or s.story_id is None or attempt.owns(s)]
        return spans[-1].kind if spans else ""

    @property
    def is_over(self) -> bool:
        """Whether the newest start has reported its end."""
        return bool(self.starts) and self.starts[-1].outcome != ""

    @property
    def num_devices(self) -> int:
        """Devices of the replica in its newest start."""
        return self.starts[-1].job.num_devices if self.starts else 1

    @property
    def alive_seconds(self) -> float:
        """Seconds that its processes ran, over all starts."""
        return sum(start.last_seen - start.start for start in self.starts)

    @property
    def device_seconds(self) -> float:
        """``alive_seconds``, each start times its devices."""
        return sum((start.last_seen - start.start) * start.job.num_devices for start in self.starts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A shot's failed attempt, or a rejected storyboard (then ``shot_id`` is empty)."""

    wall_time: float
    story_id: str
    shot_id: str
    reason: str
    stage: str = ""
    will_retry: bool = False


@dataclass(kw_only=True, slots=True)
class AppliedRequest:
    """A person's request to the queue and its effects: wall time, row and message of each replica that applied it.

    ``request`` is the event of the replica that was seen first; the other events say the same but for the message.
    """

    request: ev.RequestApplied
    applied: list[tuple[float, RowKey, str]] = field(default_factory=list)

    @property
    def seconds_to_effect(self) -> float | None:
        """From the request until the first replica had applied it; None where the time of the request is not known."""
        return self._seconds(min)

    @property
    def seconds_to_all(self) -> float | None:
        """The same, until the last replica that reports it had."""
        return self._seconds(max)

    @property
    def messages(self) -> list[str]:
        """What the replicas report, in order of time and without repetitions."""
        return list(dict.fromkeys(message for _, _, message in sorted(self.applied) if message))

    def _seconds(self, which: Callable[[Iterable[float]], float]) -> float | None:
        if not self.applied or not self.request.asked_at > 0.0:  # NaN is not, either
            return None
        return max(0.0, which(when for when, _, _ in self.applied) - self.request.asked_at)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Speed of a row or a run. None: the events do not show it.

    ``clips_per_gpu_hour`` counts finished attempts over all device time, loading and waiting included.
    ``tokens_per_second`` counts the tokens of one forward once per step, as ``ShotStarted.num_tokens`` gives them.
    ``flop_utilisation`` is relative to denoising time and the devices' bf16 peak; reused steps (taken from the step
    cache) count as no work. ``reuse_ratio`` is the share of reused steps.
    """

    num_clips: int
    device_seconds: float
    clips_per_gpu_hour: float | None
    seconds_per_step: float | None
    seconds_per_clip: float | None
    tokens_per_second: float | None
    flop_utilisation: float | None
    reuse_ratio: float | None
    wait_ratio: float | None


def levels(waits_for: Sequence[Sequence[int]], weights: Sequence[int] | None = None) -> list[int]:
    """Return for each shot the most shots that come before it, one after the other (each counts its weight, 1)."""
    found: list[int] = []
    for index, waits in enumerate(waits_for):
        known = [need for need in waits if 0 <= need < index]  # a file of another origin may say anything
        found.append(max((found[need] + (1 if weights is None else weights[need]) for need in known), default=0))
    return found
