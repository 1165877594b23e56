"""Where this rank is: kept from the events that pass on their way to its observer, so that a hang can be told in words.

Taking note costs a few assignments. Two counts are kept. ``number`` counts what all ranks of a replica do in lock step
(stages begun and ended, steps), so ranks with equal numbers are at the same place. ``num_signs`` counts every sign of
life, also of work that is the leader's alone. Knows events; nothing of ranks, clocks or who asks.
"""

from dataclasses import dataclass

from storymem_dist.events import Event, Observer, ShotFailed, StageFinished, StageStarted, StepFinished, WarningIssued

LEADER_STAGES = ("save", "join")
"""Stages that only the leader goes through: they are no part of the lock step."""

SLOW_STAGES = ("text", "load")
"""Stages that read gigabytes, with few signs of life."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A rank's place. ``where`` says it in words; ``is_slow``: it may take long without a sign of life."""

    number: int
    num_signs: int
    where: str
    is_slow: bool


@dataclass(frozen=True, slots=True)
class _Place:
    number: int = 0
    stage: str | None = None
    shot: str = ""
    is_over: bool = False
    step: int | None = None
    num_steps: int = 0


class ProgressBoard:
    """Keeps the place of one rank. ``look`` may be called from any thread; events of the lock step come from one."""

    def __init__(self) -> None:
        self._place = _Place()
        self._beside: dict[str, str] = {}  # stages of the leader's own that are under way, with their shot or story
        self._num_signs = 0

    def watching(self, observer: Observer) -> Observer:
        """An observer that takes note of every event and passes it on."""
        return _Noting(self, observer)

    def sign(self) -> None:
        """Note a sign of life that is no event: somebody looks for work. No sign while the leader's own work goes on,
        which may be what hangs.
        """
        if not self._beside:
            self._num_signs += 1

    def note(self, event: Event) -> None:
        """Take note of ``event``."""
        self._num_signs += 1
        if isinstance(event, StepFinished):
            shot, number = f"{event.story_id}:{event.shot_id}", self._place.number + 1
            self._place = _Place(number, "denoise", shot, step=event.step, num_steps=event.num_steps)
        elif isinstance(event, StageStarted | StageFinished):
            shot = ":".join(filter(None, (event.story_id, event.shot_id)))
            is_over = isinstance(event, StageFinished)
            if event.stage in LEADER_STAGES:
                self._note_beside(event.stage, None if is_over else shot)
            else:
                self._place = _Place(self._place.number + 1, event.stage, shot, is_over)
        elif isinstance(event, ShotFailed):
            self._note_beside("save", None)
        elif isinstance(event, WarningIssued) and event.source in LEADER_STAGES:  # it ended with an error
            self._note_beside(event.source, None)

    def look(self) -> Progress:
        """Where this rank is now."""
        place, beside = self._place, self._beside
        is_slow = place.stage in SLOW_STAGES and not place.is_over
        return Progress(number=place.number, num_signs=self._num_signs, where=_in_words(place, beside), is_slow=is_slow)

    def _note_beside(self, stage: str, shot: str | None) -> None:
        others = {other: of for other, of in self._beside.items() if other != stage}
        self._beside = others if shot is None else {**others, stage: shot}


class _Noting:
    def __init__(self, board: ProgressBoard, observer: Observer) -> None:
        self._board = board
        self._observer = observer

    def notify(self, event: Event) -> None:
        self._board.note(event)
        self._observer.notify(event)


def _in_words(place: _Place, beside: dict[str, str]) -> str:
    leaders = " and ".join(_stage(stage, shot) for stage, shot in beside.items())
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
    return f"{words} (with {leaders} beside it)" if leaders else words


def _stage(stage: str, shot: str) -> str:
    return f"stage '{stage}' of {shot}" if shot else f"stage '{stage}'"
