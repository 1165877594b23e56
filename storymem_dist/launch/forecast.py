"""What a job would do, and how long that may take: for ``launch.dry_run=true``.

Plans as the render does, but writes nothing into run folders and starts nothing. Where shots of the same run folder
were rendered before, their records say how long they took; else the planner's constants do.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from storymem_dist.artifacts.records import DamagedRecord
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.config.points import Point
from storymem_dist.config.schema import RenderConfig
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.plan import PlannedShot, plan_part
from storymem_dist.errors import LayoutError, RunFolderError, StoryboardError
from storymem_dist.hardware import GIB
from storymem_dist.observe.run.format import count, duration
from storymem_dist.planner.hardware import HERE, Hardware, complete, hardware_here, with_given
from storymem_dist.planner.plan import Option, Plan
from storymem_dist.render.check import CheckedJob, check_job
from storymem_dist.render.choice import best_of, layout_words, plan_of
from storymem_dist.render.planning import untouched_part
from storymem_dist.story.modes import GIVEN
from storymem_dist.terminal.text import printable

_RENDERING_STAGES = ("recall", "loras", "condition", "denoise", "decode", "keyframes", "save")
_LONGEST = 1e9  # seconds of a stage; a record that says more is not a render's


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is left to render, of the stories that can be rendered. ``refused``: why each of the others cannot.

    ``warnings`` are those of their storyboards. ``longest_path_share``: of the work that is left, the part that can
    only be done one shot after the other. ``device_seconds`` is None where no shot of the run folders says how long it
    took. ``checked`` and ``left``: the job, and its shots that are left, for a plan.
    """

    num_stories: int
    num_shots: int
    num_committed: int
    refused: Sequence[str]
    warnings: Sequence[str] = ()
    longest_path_share: float
    device_seconds: float | None
    checked: CheckedJob | None = None
    left: Sequence[Sequence[PlannedShot]] = ()

    def elapsed_seconds(self, num_replicas: int) -> float | None:
        """Time of rendering alone (without loading weights) with ``num_replicas`` like those that rendered before."""
        if self.device_seconds is None:
            return None
        return self.device_seconds * max(1.0 / num_replicas, self.longest_path_share)


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
        part = untouched_part(point, batch, checked.weights, rerender)
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
        checked=checked,
        left=left,
    )


def describe(points: Sequence[Point], *, num_replicas: int | None = None, hardware: Hardware | None = None) -> str:
    """Return a few lines about what rendering ``points`` would do.

    ``hardware``: what it would run on, for a plan; None where that is not known. ``num_replicas``: where there is no
    plan; None: unknown, too. Raises ``StoryMemError`` as ``forecast`` does, and where no layout would fit.
    """
    try:
        found = forecast(points)
    except OSError as error:
        raise RunFolderError(f"the run folder cannot be read: {error}") from error
    planned = _planned(points, found, hardware)
    if planned is not None:
        num_replicas = planned.option.num_replicas
    left = found.num_shots - found.num_committed
    where = ", ".join(point.settings.output for point in points)
    stories = count(found.num_stories, "story", "stories")
    lines = [
        *(f"refused: {message}" for message in found.refused),
        *(f"warning: {message}" for message in found.warnings),
        f"{left} of {found.num_shots} shots are left to render, of {stories}, in {where}",
        *(_layout(planned) if planned is not None else ()),
        _time(found, num_replicas, planned),
    ]
    return "".join(f"{printable(line)}\n" for line in lines)


def hardware_of(settings: RenderConfig) -> Hardware | None:
    """Return what a job would run on: ``hardware`` as it is set, or this machine; None for an unknown cluster.

    The numbers of nodes and devices are those that ``launch`` sets, where it does. Figures of this machine that
    ``hardware`` sets replace what is found.
    """
    launch, given = settings.launch, settings.hardware
    nodes = launch.cluster_nodes if launch.submits else launch.num_nodes
    per_node = launch.processes_per_node or (launch.cluster_gpus if launch.submits else None)
    if given.name != HERE:
        nodes = given.nodes if nodes in (None, 1) else nodes
        return complete(replace(given, nodes=nodes, gpus_per_node=per_node or given.gpus_per_node))
    if launch.submits:  # a login node is no compute node
        return None
    on_gpu = settings.parallel.device != "cpu" and torch.cuda.is_available()
    if launch.mode == "inline":
        nodes, per_node = None, given.gpus_per_node or int(os.environ.get("WORLD_SIZE", "1"))
    found = hardware_here(
        torch.device("cuda" if on_gpu else "cpu"),
        nodes=nodes or 1,
        ranks_per_node=per_node or given.gpus_per_node or (torch.cuda.device_count() if on_gpu else 1),
    )
    return with_given(found, replace(given, nodes=given.nodes if nodes in (None, 1) else nodes, gpus_per_node=None))


@dataclass(frozen=True, kw_only=True)
class _Planned:
    plan: Plan
    option: Option


def _planned(points: Sequence[Point], found: Forecast, hardware: Hardware | None) -> _Planned | None:
    """The plan of the job; None where the hardware is not known or not right for it, or nothing is left to render."""
    if (
        hardware is None
        or found.checked is None
        or not any(shot.kind != GIVEN for shots in found.left for shot in shots)
    ):
        return None
    parallel = points[0].settings.parallel
    try:
        plan = plan_of(points, found.checked, found.left, hardware, parallel)
    except LayoutError:
        if parallel.free:
            raise
        return None  # the layout is set, and this process is not the one that will start its ranks
    return _Planned(plan=plan, option=best_of(plan, parallel))


def _layout(planned: _Planned) -> list[str]:
    memory = max(phase.memory.on_device for phase in planned.option.phases) / GIB
    why = f": {planned.plan.reasons[0]}" if planned.plan.reasons else ""
    hardware = planned.plan.hardware
    return [
        f"planned for {hardware.nodes} x {hardware.gpus_per_node} {hardware.device} ({hardware.name})",
        f"layout: {layout_words(planned.option)}; {memory:.1f} GiB on each device{why}",
    ]


def _time(found: Forecast, num_replicas: int | None, planned: _Planned | None) -> str:
    if found.device_seconds is None and planned is not None:
        sources = f" ({'; '.join(planned.plan.sources)})" if planned.plan.sources else ""
        return f"estimated time: {duration(planned.option.makespan_seconds)} by the planner's constants{sources}"
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
