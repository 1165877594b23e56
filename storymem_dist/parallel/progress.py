"""Tracks the position of this rank from the events on their way to its observer, so that a hang can be described.

Two counts are kept. ``number`` counts what all ranks of a replica do in lock step (stages begun and ended, steps):
ranks with equal numbers are at the same position. ``num_signs`` counts every sign of life, also of the leader's own
work. Knows events; nothing of other ranks, clocks or the watch that reads it.
"""

from dataclasses import dataclass, replace

from storymem_dist.events import (
    Event,
    NullObserver,
    Observer,
    ShotFailed,
    StageFinished,
    StageStarted,
    StepFinished,
    WarningIssued,
)

LEADER_STAGES = ("save", "join")
"""Stages that only the leader runs, outside the lock step."""

SLOW_STAGES = ("text", "load", "loras")
"""Stages that read gigabytes, with few signs of life."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """A rank's position. ``where`` describes it; ``is_slow``: it may last long without a sign of life."""

    number: int
    num_signs: int
    where: str
    is_slow: bool


@dataclass(frozen=True, slots=True)
class _Position:
    number: int = 0
    stage: str | None = None
    shot: str = ""
    is_over: bool = False
    step: int | None = None
    num_steps: int = 0
    compiles: bool = False


class ProgressBoard:
    """Keeps the position of one rank. ``look`` may be called from any thread; events of the lock step come from one."""

    def __init__(self) -> None:
        self._place = _Position()
        self._background: dict[str, str] = {}  # leader stages under way, each with its shot or story
        self._num_signs = 0

    def watching(self, observer: Observer) -> Observer:
        """Return an observer that notes every event and passes it on to ``observer``."""
        return _Noting(self, observer)

    def silent(self) -> Observer:
        """Return an observer that notes every event and passes none on: another rank reports them."""
        return _Noting(self, NullObserver())

    def sign(self) -> None:
        """Note a sign of life without an event: a look for work. Ignored during leader stages, which may hang."""
        if not self._background:
            self._num_signs += 1

    def note(self, event: Event) -> None:
        """Note ``event``."""
        self._num_signs += 1
        if isinstance(event, StepFinished):
            shot, number = f"{event.story_id}:{event.shot_id}", self._place.number + 1
            self._place = _Position(number, "denoise", shot, step=event.step, num_steps=event.num_steps)
        elif isinstance(event, StageStarted | StageFinished):
            shot = ":".join(filter(None, (event.story_id, event.shot_id)))
            is_over = isinstance(event, StageFinished)
            if event.stage == "compile":  # inside a step; ranks may differ in what they find compiled
                self._place = replace(self._place, compiles=not is_over)
            elif event.stage in LEADER_STAGES:
                self._note_background(event.stage, None if is_over else shot)
            else:
                self._place = _Position(self._place.number + 1, event.stage, shot, is_over)
        elif isinstance(event, ShotFailed):
            self._note_background("save", None)
        elif isinstance(event, WarningIssued) and event.source in LEADER_STAGES:  # it ended with an error
            self._note_background(event.source, None)

    def look(self) -> Whereabouts:
        """Return where this rank is now."""
        place, background = self._place, self._background
        is_slow = (place.stage in SLOW_STAGES and not place.is_over) or place.compiles
        return Whereabouts(
            number=place.number, num_signs=self._num_signs, where=_in_words(place, background), is_slow=is_slow
        )

    def _note_background(self, stage: str, shot: str | None) -> None:
        others = {other: of for other, of in self._background.items() if other != stage}
        self._background = others if shot is None else {**others, stage: shot}


class _Noting:
    def __init__(self, board: ProgressBoard, observer: Observer) -> None:
        self._board = board
        self._observer = observer

    def notify(self, event: Event) -> None:
        self._board.note(event)
        self._observer.notify(event)


def _in_words(place: _Position, background: dict[str, str]) -> str:
    leaders = " and ".join(_stage(stage, shot) for stage, shot in background.items())
    if leaders and (place.stage is None or place.is_over):
        return leaders
    if place.stage is None:
        return "the start of the job"
    words = _stage(place.stage, place.shot)
    if place.is_over:
        words = f"the time after {words}"
    elif place.step is not None:
        following = place.step + 1
        words += f", step {following} of {place.num_steps}" if following <= place.num_steps else ", after its last step"
    elif place.stage == "denoise":
        words += ", before its first step has ended"
    if place.compiles:
        words += ", while blocks are compiled"
    return f"{words} (with {leaders} in the background)" if leaders else words


def _stage(stage: str, shot: str) -> str:
    return f"stage '{stage}' of {shot}" if shot else f"stage '{stage}'"
