"""A plan as words, tables and JSON: what ``storymem-plan`` prints."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from storymem_dist.hardware import GIB
from storymem_dist.observe.run import format as fmt
from storymem_dist.planner.hardware import Hardware
from storymem_dist.planner.job import Option
from storymem_dist.planner.memory import PARTS
from storymem_dist.planner.plan import Plan

FORMAT = 1
"""Of the JSON."""

_KEPT = (
    "num_replicas",
    "fits",
    "reason",
    "remedy",
    "load_seconds",
    "compile_seconds",
    "makespan_seconds",
    "bound_seconds",
    "idle_share",
    "clips_per_gpu_hour",
    "gpu_hours",
    "cost",
    "elastic",
    "tail_slack",
    "simulated",
)
"""The fields of an option that JSON has by their names."""

TIME_HEADS = ("layout", "step", "shot", "job", "bound", "idle", "clips per GPU-hour", "GPU-hours")
MEMORY_HEADS = ("layout", "phase", *(part.replace("_", " ") for part in PARTS), "device", "host", "fits")


def layout_of(option: Option) -> str:
    """The layout of an option: ``8 x (cfg 1, ring 1, ulysses 1), replicated, resident, compiled``."""
    cfg, ring, ulysses = option.parallel.axes
    words = [f"{option.num_replicas} x (cfg {cfg}, ring {ring}, ulysses {ulysses})", option.parallel.weights]
    words += [option.model.experts] if option.parallel.weights in ("replicated", "fsdp") else []
    words += ["compiled"] if option.parallel.compile else []
    words += ["elastic tail"] if option.elastic else []
    return ", ".join(words)


def machine_of(hardware: Hardware) -> str:
    """``2 nodes of 8 x H100 80GB``."""
    nodes = fmt.count(hardware.nodes, "node")
    return f"{nodes} of {hardware.gpus_per_node} x {hardware.device}"


def shown_options(plan: Plan, *, fitting: int, others: int) -> list[Option]:
    """The first options of a plan that fit, and those that do not, each axes and weights once: as they do best."""
    found: list[Option] = []
    seen: set[tuple[object, ...]] = set()
    left = {True: fitting, False: others}
    for option in plan.options:
        layout = (option.parallel.axes, option.parallel.weights, option.fits or option.model.experts, option.fits)
        if layout not in seen and left[option.fits] > 0:
            seen.add(layout)
            left[option.fits] -= 1
            found.append(option)
    return found


def time_row(option: Option, price: float | None) -> list[str]:
    """The cells of ``TIME_HEADS``, and the cost where there is a price."""
    worst = option.phases[-1]
    least = "" if option.simulated else ">= "
    row = [
        layout_of(option),
        fmt.step_time(worst.step_seconds),
        fmt.duration(worst.shot_seconds),
        least + fmt.duration(option.makespan_seconds),
        fmt.duration(option.bound_seconds),
        fmt.percent(option.idle_share) if option.simulated else fmt.DASH,
        fmt.number(option.clips_per_gpu_hour, 2),
        fmt.number(option.gpu_hours),
    ]
    return row if price is None else [*row, fmt.number(option.cost, 2)]


def memory_rows(option: Option) -> Iterator[list[str]]:
    """The cells of ``MEMORY_HEADS``, a row for each phase, in GiB at the peak of a rank."""
    for one in option.phases:
        memory = one.memory
        yield [
            layout_of(option),
            one.phase,
            *(f"{getattr(memory, part) / GIB:.1f}" for part in PARTS),
            f"{memory.on_device / GIB:.1f}",
            f"{memory.on_host / GIB:.1f}",
            "yes" if option.fits else "no",
        ]


def summary(plan: Plan) -> list[str]:
    """What is planned and what wins, a sentence a line."""
    lines = [
        f"{fmt.count(plan.num_shots, 'shot')} of {fmt.count(plan.num_stories, 'story', 'stories')} on "
        f"{machine_of(plan.hardware)} ({plan.hardware.name})"
    ]
    lines += [f"pinned: {', '.join(plan.pins)}"] if plan.pins else []
    best = plan.best
    if best is None:
        nearest = plan.options[0]
        lines += [f"nothing fits; the nearest is {layout_of(nearest)}: {nearest.reason}", *plan.reasons]
    else:
        lines.append(
            f"best: {layout_of(best)}: {fmt.duration(best.makespan_seconds)}, "
            f"{fmt.number(best.gpu_hours)} GPU-hours, {fmt.number(best.clips_per_gpu_hour, 2)} clips per GPU-hour"
            + ("" if best.cost is None else f", cost {fmt.number(best.cost, 2)}")
        )
        lines += [f"why: {reason}" for reason in plan.reasons]
    return lines + list(plan.sources)


def rejected_lines(options: Sequence[Option]) -> list[str]:
    """Why each option does not fit, and what would make it fit."""
    return [f"{layout_of(one)}: {one.reason}. {_remedy(one.remedy)}" for one in options if not one.fits]


def _remedy(remedy: str) -> str:
    return f"It fits with {remedy}" if "=" in remedy and ":" not in remedy else remedy.capitalize()


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON values: seconds, bytes, and settings as they are written on a command line."""
    best = plan.best
    return {
        "format": FORMAT,
        "hardware": asdict(plan.hardware),
        "stories": plan.num_stories,
        "shots": plan.num_shots,
        "pinned": list(plan.pins),
        "sources": list(plan.sources),
        "reasons": list(plan.reasons),
        "best": None if best is None else layout_of(best),
        "options": [_option(option) for option in plan.options],
        "timeline": [] if best is None else [bar._asdict() for bar in best.timeline],
    }


def _option(option: Option) -> dict[str, Any]:
    cfg, ring, ulysses = option.parallel.axes
    return {
        "layout": layout_of(option),
        "parallel.cfg": cfg,
        "parallel.ring": ring,
        "parallel.ulysses": ulysses,
        "parallel.across_nodes": option.parallel.across_nodes,
        "parallel.weights": option.parallel.weights,
        "parallel.compile": option.parallel.compile,
        "model.experts": option.model.experts,
        **{name: getattr(option, name) for name in _KEPT},
        "phases": [
            {
                "phase": one.phase,
                "tokens": one.num_tokens,
                "step_seconds": one.step_seconds,
                "shot_seconds": one.shot_seconds,
                "device_bytes": {part: getattr(one.memory, part) for part in PARTS},
                "device_bytes_total": one.memory.on_device,
                "host_bytes": one.memory.on_host,
            }
            for one in option.phases
        ],
    }
