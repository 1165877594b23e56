"""Chooses what a job leaves to it: axes, weights, residency of the experts, compiled code. The one place of that.

One rank chooses for all ranks, once they have started: from the free memory of each, the shots that are left, and the
planner's models of memory and time. What a person has set stays as it is. Knows no process groups.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from storymem_dist.config.points import Point
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB
from storymem_dist.observe.run.format import duration
from storymem_dist.parallel.choice import Choice, Choose, StartedRanks
from storymem_dist.parallel.layout import Layout, axes_that_fit, plan_layout
from storymem_dist.parallel.settings import AUTO, OFFLOADED, ParallelSettings
from storymem_dist.parallel.weight_memory import decide_experts
from storymem_dist.planner.calibration import Constants
from storymem_dist.planner.hardware import Hardware, hardware_here
from storymem_dist.planner.memory import PARTS
from storymem_dist.planner.plan import Option, Plan, PlanJob, make_plan
from storymem_dist.render.check import CheckedJob
from storymem_dist.render.compilation import compile_fact, has_compiled_code
from storymem_dist.render.loras import adapter_memory
from storymem_dist.render.planning import plan_job, untouched_part
from storymem_dist.render.prompts import shots_left
from storymem_dist.story.modes import KINDS

logger = logging.getLogger(__name__)

_MOST_CONSIDERED = 6


def chooser(points: Sequence[Point], checked: CheckedJob) -> Choose:
    """Return the function with which ``start_session`` asks for the choice of a job.

    It raises ``ConfigError`` when nothing that the ranks can form fits them, and ``LayoutError`` when they can form
    nothing with what is pinned.
    """
    return partial(_choose, points, checked)


def hardware_of(ranks: StartedRanks) -> Hardware:
    """Return the hardware of the started ranks: known figures of the device, and the memory that all of them have."""
    found = hardware_here(
        ranks.device, nodes=ranks.num_nodes, ranks_per_node=ranks.ranks_per_node, free_bytes=ranks.free_bytes
    )
    return replace(found, host_memory_gib=ranks.host_bytes / GIB)


def _choose(points: Sequence[Point], checked: CheckedJob, ranks: StartedRanks) -> Choice:
    settings = points[0].settings
    compiles, why = compile_fact(settings.parallel, ranks.device)
    parallel = settings.parallel if compiles is None else replace(settings.parallel, compile=compiles)
    config = checked.weights.any_checkpoint.dit_config
    axes = axes_that_fit(
        parallel, world_size=ranks.world_size, ranks_per_node=ranks.ranks_per_node, num_heads=config.num_heads
    )
    if ranks.device.type == "cpu" and len(axes) == 1:
        return _without_plan(axes[0], checked, ranks, why)
    if not parallel.free and compiles is not None and checked.model.experts != AUTO:
        return _without_plan(parallel, checked, ranks, why)
    rerender = settings.dispatch.rerender
    parts = [
        untouched_part(point, batch, checked.weights, rerender)
        for point, batch in zip(points, checked.batches, strict=True)
    ]
    left = shots_left(parts)
    if not any(shot.kind in KINDS for shots in left for shot in shots):
        return _without_plan(axes[0], checked, ranks, why or "nothing is left to render")
    plan = plan_of(points, checked, left, hardware_of(ranks), parallel, compiled_before=has_compiled_code())
    best = best_of(plan, parallel)
    layout = plan_layout(best.parallel, world_size=ranks.world_size, ranks_per_node=ranks.ranks_per_node)
    logger.info("planned %d options for %s; the best is %s", len(plan.options), plan.hardware, layout)
    return _planned(plan, best, why)


def plan_of(
    points: Sequence[Point],
    checked: CheckedJob,
    left: Sequence[Sequence[PlannedShot]],
    hardware: Hardware,
    parallel: ParallelSettings,
    *,
    compiled_before: bool = False,
) -> Plan:
    """Return the plan of a job for what is left of it. Raises ``LayoutError`` where the pins leave no layout."""
    return plan_with(plan_job(points, checked, left, compiled_before=compiled_before), hardware, parallel)


def plan_with(job: PlanJob, hardware: Hardware, parallel: ParallelSettings, constants: Constants | None = None) -> Plan:
    """Return the plan of ``job``; on CPUs without what only GPUs do. Raises as ``make_plan``."""
    if hardware.memory_bytes is None:
        parallel = replace(parallel, compile=parallel.compile is True)
        if job.model.experts == AUTO and parallel.weights not in OFFLOADED:
            job = replace(job, model=replace(job.model, experts="resident"))
    return make_plan(job, hardware, parallel, constants)


def best_of(plan: Plan, parallel: ParallelSettings) -> Option:
    """Return the option to render with. Raises ``ConfigError`` when nothing fits and the choice is the job's.

    A layout that a person has set is tried in any case, with the residency that is nearest to fitting: what cannot fit
    whatever happens is refused when the weights are placed.
    """
    if plan.best is not None:
        return plan.best
    nearest = plan.options[0]
    if parallel.free:
        remedy = f"; {nearest.remedy}" if nearest.remedy else ""
        raise ConfigError(
            f"no layout fits this job on {plan.hardware.nodes} x {plan.hardware.gpus_per_node} {plan.hardware.device}. "
            f"The nearest is {layout_words(nearest)}: {nearest.reason}{remedy}"
        )
    return nearest


def _without_plan(parallel: ParallelSettings, checked: CheckedJob, ranks: StartedRanks, why: str) -> Choice:
    """The choice where there is nothing to compare: whole weights on every rank, unless that is set otherwise."""
    parallel = replace(
        parallel,
        weights="replicated" if parallel.weights == AUTO else parallel.weights,
        compile=parallel.compile is True,
    )
    config = checked.weights.any_checkpoint.dit_config
    model = decide_experts(
        checked.model,
        parallel,
        config,
        ranks.device,
        adapters=adapter_memory(checked.loras, compiled=parallel.may_compile),
        num_tokens=checked.num_tokens,
        scorer_bytes=checked.scorer_bytes,
    )
    return Choice(
        parallel=parallel, experts=model.experts, compile_reason=f"{'on' if parallel.compile else 'off'}: {why}"
    )


def _planned(plan: Plan, best: Option, why: str) -> Choice:
    worst = max(best.phases, key=lambda phase: phase.memory.on_device)
    busiest = best.phases[-1]
    return Choice(
        parallel=best.parallel,
        experts=best.model.experts,
        is_planned=True,
        compile_reason=f"{'on' if best.parallel.compile else 'off'}: {why or compile_reason(plan, best)}",
        reasons=(*plan.reasons, *plan.sources),
        considered=tuple(_considered(plan, best)),
        memory_gib=tuple((part, getattr(worst.memory, part) / GIB) for part in PARTS),
        seconds_per_step=busiest.step_seconds,
        seconds_per_shot=busiest.shot_seconds,
        total_seconds=best.makespan_seconds,
        tail_slack=best.tail_slack if best.elastic else None,
    )


def compile_reason(plan: Plan, best: Option) -> str:
    """Say in one line what compiled code saves in ``best``, and what the compiler costs."""
    other = next((one for one in plan.options if _differ_in_compiling(one, best)), None)
    if other is None:
        return "the only way that was planned"
    on, off = (best, other) if best.parallel.compile else (other, best)
    ahead = off.bound_seconds
    saved = max(0.0, ahead - on.bound_seconds + on.compile_seconds)
    few = "" if best is on else "only "
    return (
        f"{few}about {_about(ahead)} of work are ahead, of which compiled code saves {_about(saved)}; to compile takes "
        f"{_about(on.compile_seconds)}"
    )


def _differ_in_compiling(one: Option, other: Option) -> bool:
    return (
        one.model.experts == other.model.experts
        and replace(one.parallel, compile=False) == replace(other.parallel, compile=False)
        and one.parallel.compile != other.parallel.compile
    )


def layout_words(option: Option) -> str:
    """The layout of an option in words: axes, weights, experts."""
    cfg, ring, ulysses = option.parallel.axes
    layout = Layout(replica=option.num_replicas, cfg=cfg, ring=ring, ulysses=ulysses)
    compiled = ", compiled" if option.parallel.compile else ""
    return f"{layout}, weights {option.parallel.weights}, experts {option.model.experts}{compiled}"


def _considered(plan: Plan, best: Option) -> Iterator[str]:
    """Other options that were looked at: those that fit, then those that do not, half of each."""
    others = [one for one in plan.options if one is not best]
    for fits in (True, False):
        for one in [one for one in others if one.fits is fits][: _MOST_CONSIDERED // 2]:
            verdict = duration(one.makespan_seconds) if fits else f"does not fit: {one.reason}"
            yield f"{layout_words(one)}: {verdict}"


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
