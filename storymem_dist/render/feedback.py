"""Feeds measured times back to the planner: what the steps of a render took, next to what its model of time says.

The figures go into a file of the user's cache, by device (``planner.calibration.record_measured``). Knows events, and
nothing of stories.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from storymem_dist.config.points import Point
from storymem_dist.dispatch.shot_settings import shot_sampler
from storymem_dist.events import Event, Observer, ShotStarted, StepFinished
from storymem_dist.parallel.choice import Choice
from storymem_dist.parallel.session import Session
from storymem_dist.planner.calibration import load_constants, record_measured
from storymem_dist.planner.hardware import Hardware, hardware_here
from storymem_dist.planner.timing import TimeModel
from storymem_dist.render.check import CheckedJob

LEAST_SECONDS = 30.0
"""A render whose counted steps took less says nothing: small models measure the overhead of Python."""

LEAST_STEPS = 8


class Feedback:
    """Compares the steps of one replica with what ``predict`` gives for their tokens: their median ratio is recorded.

    The first step of each expert in an attempt is left out (it loads, compiles and tunes), and so are steps that the
    step cache skipped.
    """

    def __init__(self, predict: Callable[[int], float], record: Callable[[float, float, int], None]) -> None:
        """``predict``: seconds of a step by its tokens. ``record``: predicted and measured seconds, number of steps."""
        self._predict, self._record = predict, record
        self._tokens: dict[tuple[str, str], int] = {}
        self._expert: dict[tuple[str, str], str] = {}
        self._seconds = self._predicted = 0.0
        self._ratios: list[float] = []

    def watching(self, observer: Observer) -> Observer:
        """Return an observer that counts steps and passes every event on to ``observer``."""
        return _Counting(self, observer)

    def note(self, event: Event) -> None:
        """Count ``event`` if it is a step."""
        if isinstance(event, ShotStarted):
            shot = event.story_id, event.shot_id
            self._expert.pop(shot, None)
            if event.num_tokens is None or event.replicas:  # a team of replicas has another layout
                self._tokens.pop(shot, None)
            else:
                self._tokens[shot] = event.num_tokens
        elif isinstance(event, StepFinished):
            shot = event.story_id, event.shot_id
            is_first = self._expert.get(shot) != event.expert
            self._expert[shot] = event.expert
            if not is_first and not event.reused and shot in self._tokens:
                predicted = self._predict(self._tokens[shot])
                self._seconds += event.elapsed_seconds
                self._predicted += predicted
                self._ratios.append(event.elapsed_seconds / predicted)

    def close(self) -> None:
        """Record what was measured, if it was enough to say something."""
        num_steps = len(self._ratios)
        if self._seconds >= LEAST_SECONDS and num_steps >= LEAST_STEPS:
            predicted = self._predicted / num_steps
            self._record(predicted, predicted * statistics.median(self._ratios), num_steps)


def feedback_of(points: Sequence[Point], checked: CheckedJob, session: Session, choice: Choice) -> Feedback | None:
    """Return what measures this job; None on other ranks than the first, and where a step has no one time.

    That is where blocks are streamed (how many stay on the device changes with the shot), and where steps or shots
    differ in their guidance passes.
    """
    samplers = [
        shot_sampler(shot, point.settings.sampler)
        for point, batch in zip(points, checked.batches, strict=True)
        for story in batch.stories
        for shot in story.shots
    ]
    passes = {sampler.passes_per_step for sampler in samplers}
    if session.rank != 0 or choice.experts == "stream" or len(passes) != 1 or not passes <= {1.0, 2.0}:
        return None
    config = checked.weights.any_checkpoint.dit_config
    model, layout = replace(checked.model, experts=choice.experts), session.layout
    num_nodes = max(1, layout.world_size // layout.ranks_per_node)
    hardware = hardware_here(session.device, nodes=num_nodes, ranks_per_node=layout.ranks_per_node)

    @cache
    def predict(num_tokens: int) -> float:
        time = TimeModel(hardware=hardware, constants=load_constants(hardware).without_renders)
        return time.step_seconds(choice.parallel, model, config, num_tokens, passes=passes.copy().pop()).total

    return Feedback(predict, partial(_record, hardware))


def _record(hardware: Hardware, predicted: float, measured: float, num_steps: int) -> None:
    record_measured(hardware, predicted_seconds=predicted, measured_seconds=measured, num_steps=num_steps)


class _Counting:
    def __init__(self, feedback: Feedback, observer: Observer) -> None:
        self._feedback, self._observer = feedback, observer

    def notify(self, event: Event) -> None:
        self._feedback.note(event)
        self._observer.notify(event)
