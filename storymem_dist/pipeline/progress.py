"""How far a story is, folded from its events."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.events import (
    Event,
    ShotFailed,
    ShotFinished,
    ShotResumed,
    ShotSkipped,
    ShotStarted,
    StageStarted,
    StepFinished,
    WarningIssued,
    WeightsProgress,
)
from storymem_dist.story.schema import Story


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a story is. Shots that were there before count as done.

    ``shot`` is the latest one that something happened to (``shot_02``), ``stage`` what is done (``load``, ``denoise``,
    ``decode``, ...), ``text`` a line for people. ``preview`` is the first keyframe of the latest finished shot, if it
    left one, in the one call that follows its end.
    """

    done_steps: int
    total_steps: int
    num_done_shots: int
    num_shots: int
    shot: str = ""
    stage: str = ""
    text: str = ""
    preview: Path | None = None


@dataclass(kw_only=True)
class ProgressFold:
    """Folds events of one story, in the order of their arrival."""

    run_folder: Path
    steps_of: dict[str, int]
    _done: dict[str, int] = field(default_factory=dict)
    _finished: set[str] = field(default_factory=set)
    _shot: str = ""
    _stage: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    num_rendered: int = 0
    resumed_at: int = 0

    @classmethod
    def of(cls, story: Story, sampler: SamplerSettings, run_folder: Path) -> "ProgressFold":
        """Begin with a story of which nothing is done."""
        steps = {
            shot.shot_id: 0
            if shot.video is not None
            else shot.options.num_inference_steps or sampler.num_inference_steps
            for shot in story.shots
        }
        return cls(run_folder=run_folder, steps_of=steps)

    def apply(self, event: Event) -> Progress | None:
        """Return the progress after ``event``; None where that changes nothing."""
        text, preview = "", None
        match event:
            case WeightsProgress():
                self._stage, text = "load", f"loading {event.what}: {event.bytes_done / max(1, event.bytes_total):.0%}"
            case ShotStarted():
                self._shot, self._done[event.shot_id] = event.shot_id, 0
                self._finished.discard(event.shot_id)
            case ShotResumed():
                self._done[event.shot_id] = self.resumed_at = event.step
            case StepFinished():
                self._shot, self._stage = event.shot_id, "denoise"
                self._done[event.shot_id] = event.step
                text = f"{event.shot_id}: step {event.step} of {event.num_steps}"
            case StageStarted():
                self._shot, self._stage = event.shot_id or self._shot, event.stage
            case ShotFinished() | ShotSkipped(reason="committed"):
                self._finish(event.shot_id)
                if isinstance(event, ShotFinished):
                    self.num_rendered += not event.already_committed
                    preview = self.run_folder / event.keyframes[0] if event.keyframes else None
                    text = f"{event.shot_id} is finished"
            case ShotFailed():
                text = f"{event.shot_id}: {event.reason}"
                if not event.will_retry:
                    self.failures[event.shot_id] = event.reason
            case WarningIssued():
                text = event.message
            case _:
                return None
        return replace(self.now, text=text or f"{self._shot}: {self._stage}".strip(": "), preview=preview)

    @property
    def now(self) -> Progress:
        """The progress without a text."""
        return Progress(
            done_steps=sum(self._done.values()),
            total_steps=sum(self.steps_of.values()),
            num_done_shots=len(self._finished),
            num_shots=len(self.steps_of),
            shot=self._shot,
            stage=self._stage,
        )

    def _finish(self, shot_id: str) -> None:
        self._finished.add(shot_id)
        self._done[shot_id] = self.steps_of.get(shot_id, 0)
