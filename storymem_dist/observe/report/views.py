"""The values that a report shows: a run, its stories, shots, keyframes and requests. Every value has its type here.

Knows nothing of files or HTML.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import storymem_dist.events as ev
from storymem_dist.artifacts.scores import RunScores
from storymem_dist.observe.run.state import RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyframeView:
    """A keyframe of the memory bank. ``image`` is a path relative to the run folder, None when it cannot be found.

    ``shot_index`` is -1 for reference images. The scores are those with which it was kept.
    """

    shot_index: int
    slot: int
    frame_index: int
    image: str | None
    similarity: float | None
    bank_similarity: float | None
    against: str | None
    quality: float | None
    why: str

    @property
    def key(self) -> tuple[int, int]:
        """What identifies it in its story."""
        return (self.shot_index, self.slot)

    @property
    def name(self) -> str:
        """Its name for people."""
        if self.shot_index < 0:
            return f"reference image {self.slot + 1}"
        if self.slot < 0:
            return f"reference image of shot_{self.shot_index + 1:02d}"
        return f"shot_{self.shot_index + 1:02d} keyframe {self.slot}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotView:
    """One shot. ``status``: ``finished``, ``running``, ``failed``, ``blocked`` or ``waiting``.

    ``decisions`` are those of the current record, or of the newest attempt where there is no record. ``own``: what the
    storyboard sets for this shot alone. ``scores``: what it was scored, by measure.
    """

    shot_id: str
    shot_index: int
    scene_num: int
    prompt: str
    cut: bool
    status: str
    reason: str
    mode: str
    seed: int | None
    clip: str | None
    fps: float
    num_frames: int
    height: int
    width: int
    seconds: float | None
    stage_seconds: dict[str, float]
    seconds_per_step: float | None
    num_reused_steps: int
    step: int
    num_steps: int
    num_attempts: int
    why: str
    decisions: tuple[ev.MemoryDecided, ...]
    own: dict[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def recalled(self) -> tuple[ev.MemoryDecided, ...]:
        """Keyframes that the shot was shown, in their order."""
        return tuple(decision for decision in self.decisions if decision.verdict == "recalled")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestView:
    """What somebody asked of the queue. ``when`` in seconds since the epoch; ``effect`` is empty before it has one."""

    number: int
    who: str
    when: float
    via: str
    what: str
    effect: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuePlace:
    """Where a story stands in the queue.

    ``place``: 1 for the story that is rendered next; None where nothing of it is left to render. ``is_first``: somebody
    moved it to the front. ``skipped``: the request to skip it, in words, else empty.
    """

    place: int | None = None
    is_first: bool = False
    skipped: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryView:
    """One story: its shots in order and the keyframes of its memory bank, oldest first.

    ``waits_for``: for each shot the positions of those that it waits for; empty where it is not known.
    """

    story_id: str
    name: str
    overview: str
    video: str | None
    message: str
    shots: tuple[ShotView, ...]
    keyframes: tuple[KeyframeView, ...]
    waits_for: tuple[tuple[int, ...], ...] = ()
    queue: QueuePlace = QueuePlace()

    @property
    def num_finished(self) -> int:
        """Shots that are committed."""
        return sum(shot.status == "finished" for shot in self.shots)

    @property
    def status(self) -> str:
        """``running``, ``failed`` (one of its shots failed or waits for such a one), ``finished``, ``skipped`` or
        ``waiting``.
        """
        found = {shot.status for shot in self.shots}
        if "running" in found:
            return "running"
        if found & {"failed", "blocked"}:
            return "failed"
        if found == {"finished"}:
            return "finished"
        return "skipped" if self.queue.skipped else "waiting"

    @property
    def seconds(self) -> float | None:
        """Seconds that its finished shots took together; None where none is finished."""
        taken = [shot.seconds for shot in self.shots if shot.status == "finished" and shot.seconds is not None]
        return sum(taken) if taken else None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """Everything a report shows. ``status``: ``finished``, ``running``, ``stopped``, ``incomplete`` or ``empty``.

    ``left_out`` names files that could not be used, and why. ``scores`` are those of the clips as they are; None where
    the run is not scored. ``requests``: what people asked of the queue, oldest first. ``paused``: the one of them that
    holds it.
    """

    root: Path
    name: str
    run_id: str
    created: str
    status: str
    written_at: float
    stories: tuple[StoryView, ...]
    state: RunState
    config_hash: str
    config: str
    left_out: tuple[str, ...]
    scores: RunScores | None = None
    requests: tuple[RequestView, ...] = ()
    paused: RequestView | None = None

    @property
    def shots(self) -> tuple[ShotView, ...]:
        """All shots of all stories."""
        return tuple(shot for story in self.stories for shot in story.shots)
