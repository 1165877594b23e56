"""What a job would do, and how long that may take: for ``launch.dry_run=true``.

The time is known only where shots of the same run folder were rendered before: their records say how long they took.
Touches no file and starts nothing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from storymem_dist.artifacts.records import DamagedRecord
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.config.points import Point
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_story
from storymem_dist.render.check import check_job
from storymem_dist.render.inputs import cost_model, pixel_inputs

_RENDERING_STAGES = ("recall", "condition", "denoise", "decode", "keyframes", "save")


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is left to render. ``device_seconds`` is None where nothing is known about times."""

    num_stories: int
    num_shots: int
    num_committed: int
    longest_chain_share: float
    device_seconds: float | None

    def elapsed_seconds(self, num_replicas: int) -> float | None:
        """Time of rendering alone (without loading weights) with so many replicas like those that rendered before."""
        if self.device_seconds is None:
            return None
        return self.device_seconds * max(1.0 / num_replicas, self.longest_chain_share)


def forecast(points: Sequence[Point]) -> Forecast:
    """Plan a job and compare with what its run folders hold. Raises ``StoryMemError`` as ``check_job`` does."""
    checked = check_job(points)
    chains: list[float] = []
    num_stories = num_shots = num_committed = 0
    seconds_per_tflop: list[float] = []
    for point, batch in zip(points, checked.batches, strict=True):
        part = BatchPart(
            run=RunFolder(point.settings.output),
            stories=batch.stories,
            sampler=point.settings.sampler,
            inputs={kind: pixel_inputs(kind, point.settings, checked.weights) for kind in checked.weights.checkpoints},
            video=VideoSettings(),
            cost=cost_model(point.settings, checked.weights),
        )
        generations = part.run.rerender_generations()
        for story in batch.stories:
            left = 0.0
            for shot in plan_story(0, part, story, generations):
                seconds = _seconds(part.run, shot)
                num_shots += 1
                if seconds is None:
                    left += shot.cost
                else:
                    num_committed += 1
                    seconds_per_tflop.append(seconds / shot.cost)
            num_stories += 1
            chains.append(left)
    work = sum(chains)
    return Forecast(
        num_stories=num_stories,
        num_shots=num_shots,
        num_committed=num_committed,
        longest_chain_share=max(chains) / work if work else 0.0,
        device_seconds=work * statistics.median(seconds_per_tflop) if seconds_per_tflop else None,
    )


def describe(points: Sequence[Point], *, num_replicas: int | None = None) -> str:
    """Say in a few lines what rendering ``points`` means. ``num_replicas``: where known."""
    found = forecast(points)
    left = found.num_shots - found.num_committed
    where = ", ".join(point.settings.output for point in points)
    lines = [
        f"{left} of {found.num_shots} shots are left to render, of {found.num_stories} stories, in {where}",
        _time(found, num_replicas),
    ]
    return "\n".join(lines) + "\n"


def _time(found: Forecast, num_replicas: int | None) -> str:
    if found.device_seconds is None:
        return "estimated time: not known, no shot of this run folder has been rendered with these settings"
    seconds = found.elapsed_seconds(num_replicas or 1)
    assert seconds is not None
    with_replicas = "one replica" if num_replicas in (None, 1) else f"{num_replicas} replicas"
    return (
        f"estimated time: {_duration(seconds)} with {with_replicas} like those that rendered the first "
        f"{found.num_committed} shots, and loading"
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _seconds(run: RunFolder, shot: PlannedShot) -> float | None:
    """How long a committed shot took; None for one that is still to do."""
    try:
        record = run.shot(shot.story.story_id, shot.shot.shot_id).read_record(shot.fingerprint)
    except DamagedRecord:
        return None
    if record is None:
        return None
    stages = record.timing.get("stage_seconds", {})
    return float(sum(stages.get(stage, 0.0) for stage in _RENDERING_STAGES))
