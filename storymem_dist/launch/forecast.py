"""What a job would do, and how long that may take: for ``launch.dry_run=true``.

Plans as the render does, but writes nothing into run folders and starts nothing. The time is known only where shots of
the same run folder were rendered before: their records say how long they took.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storymem_dist.artifacts.records import DamagedRecord
from storymem_dist.artifacts.run_folder import RunFolder, shot_ids
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.config.points import Point
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_part
from storymem_dist.errors import RunFolderError, StoryboardError
from storymem_dist.observe.run.format import count, duration
from storymem_dist.render.check import check_job
from storymem_dist.render.inputs import cost_model, pixel_inputs
from storymem_dist.story.modes import GIVEN
from storymem_dist.terminal.text import printable

_RENDERING_STAGES = ("recall", "loras", "condition", "denoise", "decode", "keyframes", "save")
_LONGEST = 1e9  # seconds of a stage; a record that says more is not a render's
_NOT_DRAWN = 2**63
"""Replaces a seed that the render will draw. No drawn seed is that large, so no shot is found rendered with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is left to render, of the stories that can be rendered. ``refused``: why each of the others cannot.

    ``warnings`` are those of their storyboards. ``longest_path_share``: of the work that is left, the part that can
    only be done one shot after the other. ``device_seconds`` is None where nothing is known about times.
    """

    num_stories: int
    num_shots: int
    num_committed: int
    refused: Sequence[str]
    warnings: Sequence[str] = ()
    longest_path_share: float
    device_seconds: float | None

    def elapsed_seconds(self, num_replicas: int) -> float | None:
        """Time of rendering alone (without loading weights) with ``num_replicas`` like those that rendered before."""
        if self.device_seconds is None:
            return None
        return self.device_seconds * max(1.0 / num_replicas, self.longest_path_share)


class _UntouchedFolder(RunFolder):
    """A run folder as a plan reads it before the job has begun: what the job will decide there is not written."""

    def __init__(self, root: str | Path, *, rerender: Sequence[tuple[str, str]]) -> None:
        super().__init__(root)
        self._rerender = frozenset(rerender)

    def drawn_seed(self, name: str) -> int:
        seed = self.known_seed(name)
        return _NOT_DRAWN if seed is None else seed

    def rerender_generations(self) -> dict[tuple[str, str], int]:
        generations = super().rerender_generations()
        return generations | {shot: generations.get(shot, 0) + 1 for shot in self._rerender}


def forecast(points: Sequence[Point]) -> Forecast:
    """Plan a job and compare with what its run folders hold.

    Raises ``StoryMemError`` as ``check_job`` does, and when ``dispatch.rerender`` names a shot that does not exist.
    """
    checked = check_job(points)
    rerender = points[0].settings.dispatch.rerender
    left: list[list[PlannedShot]] = []
    num_stories = 0
    refused: list[str] = []
    warnings: list[str] = []
    num_shots = num_committed = 0
    seconds_per_tflop: list[float] = []
    for point, batch in zip(points, checked.batches, strict=True):
        of_point = f"{point.name}: " if point.name else ""
        refused += [of_point + rejected.message for rejected in batch.rejected]
        warnings += [of_point + warning for warning in batch.all_warnings]
        known = [(story.story_id, {shot.shot_id: shot.name for shot in story.shots}) for story in batch.stories]
        part = BatchPart(
            run=_UntouchedFolder(point.settings.output, rerender=shot_ids(rerender, known)),
            stories=batch.stories,
            sampler=point.settings.sampler,
            inputs={kind: pixel_inputs(kind, point.settings, checked.weights) for kind in checked.weights.checkpoints},
            video=VideoSettings(),
            cost=cost_model(point.settings, checked.weights),
            memory=point.settings.memory,
        )
        for story, planned in plan_part(0, part):
            if isinstance(planned, StoryboardError):
                refused.append(f"{of_point}{story.story_id}: {planned}")
                continue
            num_stories += 1
            of_story = []
            for shot in planned:
                seconds = _seconds(part.run, shot)
                num_shots += 1
                if seconds is None:
                    of_story.append(shot)
                else:
                    num_committed += 1
                    if shot.kind != GIVEN:
                        seconds_per_tflop.append(seconds / shot.cost)
            if of_story:
                left.append(of_story)
    graph = ShotGraph(left)
    return Forecast(
        num_stories=num_stories,
        num_shots=num_shots,
        num_committed=num_committed,
        refused=refused,
        warnings=warnings,
        longest_path_share=graph.longest_path() / graph.work if graph.work else 0.0,
        device_seconds=graph.work * statistics.median(seconds_per_tflop) if seconds_per_tflop else None,
    )


def describe(points: Sequence[Point], *, num_replicas: int | None = None) -> str:
    """Return a few lines about what rendering ``points`` would do. ``num_replicas``: None where unknown."""
    try:
        found = forecast(points)
    except OSError as error:
        raise RunFolderError(f"the run folder cannot be read: {error}") from error
    left = found.num_shots - found.num_committed
    where = ", ".join(point.settings.output for point in points)
    stories = count(found.num_stories, "story", "stories")
    lines = [
        *(f"refused: {message}" for message in found.refused),
        *(f"warning: {message}" for message in found.warnings),
        f"{left} of {found.num_shots} shots are left to render, of {stories}, in {where}",
        _time(found, num_replicas),
    ]
    return "".join(f"{printable(line)}\n" for line in lines)


def _time(found: Forecast, num_replicas: int | None) -> str:
    if found.device_seconds is None:
        return "estimated time: not known, no shot of this run folder has been rendered with these settings"
    seconds = found.elapsed_seconds(num_replicas or 1)
    assert seconds is not None
    with_replicas = "one replica" if num_replicas in (None, 1) else f"{num_replicas} replicas"
    return (
        f"estimated time: {duration(seconds)} with {with_replicas} like those that rendered "
        f"{count(found.num_committed, 'shot')} before, and loading"
    )


def _seconds(run: RunFolder, shot: PlannedShot) -> float | None:
    """How long a committed shot took, without the compiler's time, which no later shot needs; None for one to do."""
    try:
        record = run.shot(shot.story_id, shot.shot_id).read_record(shot.fingerprint, set_aside=False)
    except DamagedRecord:
        return None
    if record is None:
        return None
    stages = record.timing.get("stage_seconds")
    taken = {
        stage: seconds
        for stage, seconds in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(seconds, int | float) and 0 < seconds < _LONGEST
    }
    return float(max(0, sum(taken.get(stage, 0) for stage in _RENDERING_STAGES) - taken.get("compile", 0)))
