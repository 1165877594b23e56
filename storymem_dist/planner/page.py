"""A plan as one self-contained HTML page in the report's style: figures, memory bars, a Gantt chart of the dispatch."""

from collections.abc import Sequence

from storymem_dist.hardware import GIB
from storymem_dist.observe.report.html import chip, document, esc, table, tile
from storymem_dist.observe.report.page import read_asset, theme_button
from storymem_dist.observe.run import format as fmt
from storymem_dist.planner.job import Option, PhaseFigures
from storymem_dist.planner.memory import PARTS
from storymem_dist.planner.plan import Plan
from storymem_dist.planner.simulation import Bar
from storymem_dist.planner.words import TIME_HEADS, layout_of, machine_of, shown_options, summary, time_row

MOST_OPTIONS = 200
MOST_ROWS = 64
MOST_BARS = 4000
"""Shots that are drawn one by one; more of them are drawn as the share of busy replicas."""

_SLICES = 160
_COLOURS = dict(
    zip(
        PARTS,
        ("--denoise", "--text", "--join", "--decode", "--recall", "--save", "--wait-a"),
        strict=True,
    )
)
_STYLE = """
.bars { display: grid; gap: .35rem; }
.bar-row { display: grid; grid-template-columns: 24rem 1fr 9rem; gap: .75rem; align-items: center; }
.bar-row > span:first-child { overflow-wrap: anywhere; font-size: .9rem; }
.bar { position: relative; height: 1.2rem;
  background: var(--screen); border-radius: 4px; overflow: hidden; }
.bar > i { position: absolute; top: 0; bottom: 0; }
.bar > b { position: absolute; top: 0; bottom: 0; width: 2px; background: var(--bad); }
.gantt { display: grid; gap: 2px; min-width: 700px; }
.gantt-row { display: grid; grid-template-columns: 7rem 1fr; gap: .5rem; align-items: center; font-size: .8rem; }
.lane { position: relative; height: 1rem; background: var(--screen); border-radius: 3px; overflow: hidden; }
.lane > i { position: absolute; top: 0; bottom: 0; border-right: 1px solid var(--page); }
.key { display: flex; flex-wrap: wrap; gap: 1rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; vertical-align: -1px; }
#rejected td { min-width: 14rem; }
@media (max-width: 800px) { .bar-row { grid-template-columns: 1fr; } }
"""


def plan_page(plan: Plan) -> str:
    """Return the whole page."""
    options = shown_options(plan, fitting=MOST_OPTIONS, others=MOST_OPTIONS)
    sections = [
        ("times", "Time", _times(plan, options)),
        ("memory", "Memory of a rank", _memory(plan, options)),
        ("dispatch", "Simulated dispatch", _dispatch(plan)),
        ("rejected", "What does not fit", _rejected(options)),
    ]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in sections
    )
    return document(
        title=f"plan for {machine_of(plan.hardware)}",
        style=read_asset("style.css") + _STYLE,
        scripts=[read_asset("script.js")],
        body=(
            f'<a class="skip" href="#times">Skip to the times</a>{_header(plan)}'
            f'<nav aria-label="Parts of the plan"><ul>{links}</ul>{theme_button()}</nav>'
            f'<main>{body}</main><footer>Written by storymem-plan.</footer><div id="tip" role="tooltip" hidden></div>'
        ),
    )


def _header(plan: Plan) -> str:
    best = plan.best
    tiles = [tile("Stories", fmt.number(plan.num_stories, 0)), tile("Shots", fmt.number(plan.num_shots, 0))]
    state = chip("nothing fits", "bad")
    if best is not None:
        state = chip("fits", "good")
        tiles += [
            tile("Time", fmt.duration(best.makespan_seconds), f"bound {fmt.duration(best.bound_seconds)}"),
            tile("Idle", fmt.percent(best.idle_share), "of the device time"),
            tile("Clips per GPU-hour", fmt.number(best.clips_per_gpu_hour, 2)),
            tile("GPU-hours", fmt.number(best.gpu_hours)),
        ]
        tiles += [] if best.cost is None else [tile("Cost", fmt.number(best.cost, 2))]
    lines = "".join(f"<p>{esc(line)}</p>" for line in summary(plan))
    return (
        f'<header><p class="brand">storymem plan</p><h1>{esc(machine_of(plan.hardware))} {state}</h1>'
        f'{lines}<dl class="tiles">{"".join(tiles)}</dl></header>'
    )


def _times(plan: Plan, options: Sequence[Option]) -> str:
    price = plan.hardware.price_per_gpu_hour
    heads = [*TIME_HEADS, *(["cost"] if price is not None else [])]
    rows = [[esc(cell) for cell in time_row(option, price)] for option in options if option.fits]
    if not rows:
        return '<p class="quiet">No layout fits.</p>'
    return table("Options that fit", heads, rows, numeric=range(1, len(heads)), compact=True)


def _memory(plan: Plan, options: Sequence[Option]) -> str:
    room = plan.hardware.memory_bytes
    largest = max([one.memory.on_device for option in options for one in option.phases] + ([room] if room else []))
    rows = "".join(_bar(option, option.worst, room, largest) for option in options)
    key = "".join(
        f'<span><i style="background:var({colour})"></i>{part.replace("_", " ")}</span>'
        for part, colour in _COLOURS.items()
    )
    limit = f" The red line is what a device has: {fmt.gib(room / GIB)}." if room else ""
    return (
        f'<p>Each bar is the peak of a rank in the phase that needs the most.{esc(limit)}</p><p class="key">{key}</p>'
        f'<div class="bars">{rows}</div>'
    )


def _bar(option: Option, phase: PhaseFigures, room: int | None, largest: int) -> str:
    parts, left, words = "", 0.0, []
    for part in PARTS:
        size = getattr(phase.memory, part)
        width = 100 * size / largest
        if size:
            parts += f'<i style="left:{left:.2f}%;width:{width:.2f}%;background:var({_COLOURS[part]})"></i>'
            words.append(f"{part.replace('_', ' ')} {fmt.gib(size / GIB)}")
        left += width
    limit = f'<b style="left:{100 * room / largest:.2f}%"></b>' if room else ""
    name = f"{layout_of(option)}, {phase.phase}: {', '.join(words)}"
    state = chip("fits", "good") if option.fits else chip("does not fit", "bad")
    return (
        f'<div class="bar-row"><span>{esc(layout_of(option))}</span>'
        f'<div class="bar" role="img" aria-label="{esc(name)}" title="{esc(name)}">{parts}{limit}</div>'
        f"<span>{esc(fmt.gib(phase.memory.on_device / GIB))} {state}</span></div>"
    )


def _dispatch(plan: Plan) -> str:
    best = plan.best
    if best is None or not best.timeline:
        return '<p class="quiet">Nothing is rendered.</p>'
    end = max(bar.end for bar in best.timeline)
    if best.num_replicas <= MOST_ROWS and len(best.timeline) <= MOST_BARS:
        lanes = _lanes(best.timeline, best.num_replicas, end)
        text = "Each block is a shot; its colour is that of its story. Empty: waiting, or loading experts."
    else:
        lanes = _busy_lanes(best.timeline, best.num_replicas, end)
        text = "Each lane is several replicas; the darker, the more of them render."
    scale = f'<div class="gantt-row"><span></span><span class="quiet">0 to {esc(fmt.duration(end))}</span></div>'
    return (
        f'<p>{text}</p><div class="scroll" role="region" aria-label="Gantt chart" tabindex="0">'
        f'<div class="gantt">{lanes}{scale}</div></div>'
    )


def _lanes(timeline: Sequence[Bar], num_replicas: int, end: float) -> str:
    blocks: list[list[str]] = [[] for _ in range(num_replicas)]
    for bar in timeline:
        together = f", {bar.size} replicas together" if bar.size > 1 else ""
        name = f"story {bar.story + 1}, shot {bar.position + 1} ({bar.kind}), {fmt.duration(bar.end - bar.start)}"
        block = (
            f'<i style="left:{100 * bar.start / end:.3f}%;width:{100 * (bar.end - bar.start) / end:.3f}%;'
            f'background:hsl({bar.story * 47 % 360} 55% 55%)" title="{esc(name + together)}"></i>'
        )
        for replica in range(bar.replica, bar.replica + bar.size):
            blocks[replica].append(block)
    return "".join(_lane(f"replica {number}", "".join(one)) for number, one in enumerate(blocks))


def _busy_lanes(timeline: Sequence[Bar], num_replicas: int, end: float) -> str:
    """A lane for each group of replicas: how many of them render, in equal slices of the time."""
    group = -(-num_replicas // MOST_ROWS)
    num_lanes = -(-num_replicas // group)
    busy = [[0.0] * _SLICES for _ in range(num_lanes)]
    width = end / _SLICES
    for bar in timeline:
        first, last = int(bar.start / width), min(_SLICES - 1, int(bar.end / width))
        for piece in range(first, last + 1):
            covered = min(bar.end, (piece + 1) * width) - max(bar.start, piece * width)
            for replica in range(bar.replica, bar.replica + bar.size):
                busy[replica // group][piece] += max(0.0, covered)
    lanes = []
    for number, pieces in enumerate(busy):
        first, last = number * group, min(num_replicas, (number + 1) * group) - 1
        blocks = "".join(
            f'<i style="left:{100 * piece / _SLICES:.2f}%;width:{100 / _SLICES:.2f}%;border:0;'
            f'background:var(--denoise);opacity:{min(1.0, seconds / (width * (last - first + 1))):.2f}"></i>'
            for piece, seconds in enumerate(pieces)
        )
        lanes.append(_lane(f"replicas {first}-{last}" if last > first else f"replica {first}", blocks))
    return "".join(lanes)


def _lane(name: str, blocks: str) -> str:
    return f'<div class="gantt-row"><span>{esc(name)}</span><div class="lane">{blocks}</div></div>'


def _rejected(options: Sequence[Option]) -> str:
    rows = [[esc(layout_of(one)), esc(one.reason), esc(one.remedy)] for one in options if not one.fits]
    if not rows:
        return '<p class="quiet">All layouts fit.</p>'
    return table("Options that do not fit", ["layout", "why", "what would make it fit"], rows)
