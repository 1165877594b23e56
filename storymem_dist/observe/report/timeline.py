"""The timeline of replicas and stages: what each did when, and where devices waited.

Times at which no replica was up (as between a stop and a restart) are cut out and marked. Pieces too small to see are
merged. Knows folded events; nothing of event files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from storymem_dist.events import STAGES
from storymem_dist.observe.report.html import details, esc, table
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import Attempt, Row, RowKey, Span

SMALLEST_SHARE = 0.0004
"""Pieces shorter than this share of the whole (half a pixel) are merged with equal neighbours or left out."""

CHARACTERS_ACROSS = 95
"""Characters of a label that fit across the whole picture at its smallest width."""

SPAN_KINDS = (*STAGES, "helping", "wait")
"""``helping``: the replica renders a shot together with others, one of which reports it."""

MAX_ROWS = 64

MAX_PIECES = 1200
"""Pieces of all rows together. Where there are more, a piece stands for what happened within its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeAxis:
    """Wall time on the page: the stretches in which something ran, one after the other, as shares of the width."""

    stretches: tuple[tuple[float, float], ...]

    @property
    def seconds(self) -> float:
        """Total time shown."""
        return sum(end - start for start, end in self.stretches) or 1.0

    def share(self, wall_time: float) -> float:
        """Where ``wall_time`` lies, 0 to 1."""
        before = 0.0
        for start, end in self.stretches:
            if wall_time <= end:
                return (before + max(0.0, wall_time - start)) / self.seconds
            before += end - start
        return 1.0


def make_axis(state: RunState) -> TimeAxis:
    """Join the times at which any replica was up."""
    starts = sorted((s.start, s.last_seen) for row in state.rows.values() for s in row.starts)
    stretches: list[tuple[float, float]] = []
    gap = 0.02 * sum(end - start for start, end in starts)
    for start, end in starts:
        if stretches and start - stretches[-1][1] <= gap:
            stretches[-1] = (stretches[-1][0], max(stretches[-1][1], end))
        else:
            stretches.append((start, end))
    return TimeAxis(stretches=tuple(stretches))


def timeline(state: RunState) -> str:
    """Return the picture and its table as HTML."""
    if not any(row.starts for row in state.rows.values()):
        return '<p class="quiet">No replica has started yet.</p>'
    axis = make_axis(state)
    rows = sorted(state.rows.items())
    attempts: dict[RowKey, list[Attempt]] = {}
    for attempt in state.attempts():
        attempts.setdefault(attempt.row, []).append(attempt)
    pieces = max(24, MAX_PIECES // len(rows))
    tracks = "".join(_track(state, key, row, attempts.get(key, []), axis, pieces) for key, row in rows[:MAX_ROWS])
    more = f'<p class="quiet">and {len(rows) - MAX_ROWS} more replicas</p>' if len(rows) > MAX_ROWS else ""
    breaks = "".join(
        f'<span class="break" style="left:{100 * axis.share(start):.2f}%" title="{esc(_pause(state, axis, n))}"></span>'
        for n, (start, _) in enumerate(axis.stretches)
        if n
    )
    scale = f'<span class="track-label"></span><div class="axis">{_ticks(axis)}{breaks}</div>'
    return (
        '<div class="scroll" role="region" aria-label="Timeline of replicas" tabindex="0"><div class="timeline">'
        f'{tracks}<div class="track-row">{scale}</div></div></div>{more}'
        + _legend(state)
        + details("Timeline as a table", _stage_table(state, rows[:MAX_ROWS]) + more)
    )


def stage_totals(row: Row) -> dict[str, float]:
    """Seconds of each kind of a row's finished pieces."""
    totals: dict[str, float] = {}
    for span in row.spans:
        if span.end is not None:
            totals[span.kind] = totals.get(span.kind, 0.0) + span.end - span.start
    return totals


def _track(state: RunState, key: RowKey, row: Row, attempts: list[Attempt], axis: TimeAxis, pieces: int) -> str:
    label = state.row_label(key)
    totals = stage_totals(row)
    times = ", ".join(f"{kind} {fmt.duration(totals[kind])}" for kind in SPAN_KINDS if kind in totals)
    name = f"{label}: {fmt.count(row.num_finished, 'shot')} finished, {row.num_failed} failed. {times}"
    if len(attempts) > pieces:
        shots = "".join(_shots_block(group, axis, state.last_time) for group in _groups(attempts, axis, pieces))
    else:
        shots = "".join(_shot_block(attempt, axis, state.last_time) for attempt in attempts)
    merged = _merged(row, axis, state.last_time)
    if len(merged) > pieces:
        stages = "".join(_mixed_blocks(row, axis, state.last_time, pieces))
    else:
        later = [span.start for span in merged[1:]]
        stages = "".join(
            _stage_block(span, axis, overlaps=span.end is not None and start < span.end)
            for span, start in zip(merged, [*later, float("inf")], strict=False)  # no span: a replica just started
        )
    return (
        f'<div class="track-row"><span class="track-label">{esc(label)}</span>'
        f'<div class="track" role="img" aria-label="{esc(name)}"><div class="shots">{shots}</div>'
        f'<div class="stages">{stages}</div></div></div>'
    )


def _place(start: float, end: float, axis: TimeAxis) -> str:
    left, right = axis.share(start), axis.share(end)
    return f"left:{100 * left:.3f}%;width:{max(0.05, 100 * (right - left)):.3f}%"


def _shot_block(attempt: Attempt, axis: TimeAxis, now: float) -> str:
    end = attempt.end if attempt.end is not None else now
    name = f"{attempt.started.story_id}/{attempt.started.shot_id}"
    tip = f"{name}: {attempt.outcome}, {fmt.duration(end - attempt.start)}"
    tip += f". {attempt.reason}" if attempt.reason else ""
    room = CHARACTERS_ACROSS * (axis.share(end) - axis.share(attempt.start))
    shot_id = attempt.started.shot_id
    label = next((text for text in (name, shot_id, shot_id.removeprefix("shot_")) if len(text) < room), "")
    return (
        f'<span class="shot {esc(attempt.outcome)}" style="{_place(attempt.start, end, axis)}" data-tip="{esc(tip)}">'
        f"{esc(label)}</span>"
    )


def _groups(attempts: list[Attempt], axis: TimeAxis, pieces: int) -> list[list[Attempt]]:
    """Attempts in order of time; those that began in the same one of ``pieces`` parts of the axis are one group."""
    groups: dict[int, list[Attempt]] = {}
    for attempt in sorted(attempts, key=lambda attempt: attempt.start):
        groups.setdefault(min(pieces - 1, int(pieces * axis.share(attempt.start))), []).append(attempt)
    return list(groups.values())


def _shots_block(attempts: list[Attempt], axis: TimeAxis, now: float) -> str:
    """One block for attempts that followed one another; its colour is that of the worst outcome."""
    if len(attempts) == 1:
        return _shot_block(attempts[0], axis, now)
    outcomes = [attempt.outcome for attempt in attempts]
    worst = next((kind for kind in ("failed", "interrupted", "stopped", "running") if kind in outcomes), "finished")
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
    end = max(attempt.end if attempt.end is not None else now for attempt in attempts)
    tip = f"{len(attempts)} shots: {counts}"
    return f'<span class="shot {worst}" style="{_place(attempts[0].start, end, axis)}" data-tip="{esc(tip)}"></span>'


def _mixed_blocks(row: Row, axis: TimeAxis, now: float, pieces: int) -> Iterator[str]:
    """Blocks for ``pieces`` equal parts of the axis, each with what took the most time; equal neighbours are one."""
    seconds: dict[int, dict[str, float]] = {}
    for span in (*row.spans, *row.open_spans):
        end = span.end if span.end is not None else now
        first, last = (pieces * axis.share(when) for when in (span.start, end))
        for part in range(int(first), min(pieces - 1, int(last)) + 1):
            share = (min(part + 1, last) - max(part, first)) * axis.seconds / pieces
            kinds = seconds.setdefault(part, {})
            kinds[span.kind] = kinds.get(span.kind, 0.0) + share

    def most(part: int) -> str | None:
        kinds = seconds.get(part)
        return max(kinds, key=kinds.__getitem__) if kinds else None

    for kind, group in groupby(range(pieces), key=most):
        parts = list(group)
        if kind is None:
            continue
        total: dict[str, float] = {}
        for part in parts:
            for name, share in seconds[part].items():
                total[name] = total.get(name, 0.0) + share
        tip = ", ".join(f"{name} {fmt.duration(took)}" for name, took in sorted(total.items(), key=lambda one: -one[1]))
        place = f"left:{100 * parts[0] / pieces:.3f}%;width:{100 * len(parts) / pieces:.3f}%"
        name = kind if kind in SPAN_KINDS else "other"
        yield f'<span class="k-{name}" style="{place}" data-tip="{esc(tip)}"></span>'


def _stage_block(span: Span, axis: TimeAxis, *, overlaps: bool) -> str:
    """``overlaps``: it lasted into the next one, as saving a shot may; drawn half as high."""
    end = span.end if span.end is not None else span.start
    shot = f"{span.story_id}/{span.shot_id} " if span.shot_id else ""
    tip = f"{shot}{span.kind}, {fmt.duration(end - span.start)}"
    kind = span.kind if span.kind in SPAN_KINDS else "other"
    overlap = " overlap" if overlaps else ""
    return f'<span class="k-{kind}{overlap}" style="{_place(span.start, end, axis)}" data-tip="{esc(tip)}"></span>'


def _merged(row: Row, axis: TimeAxis, now: float) -> list[Span]:
    """The row's pieces in order of time, small ones joined or left out."""
    smallest = SMALLEST_SHARE * axis.seconds
    open_spans = [
        Span(kind=span.kind, start=span.start, end=now, story_id=span.story_id, shot_id=span.shot_id)
        for span in row.open_spans
    ]
    merged: list[Span] = []
    for span in sorted((*row.spans, *open_spans), key=lambda span: span.start):
        end = span.end if span.end is not None else now
        last = merged[-1] if merged else None
        if last is not None and last.end is not None and last.kind == span.kind and span.start - last.end < smallest:
            small = end - span.start < smallest or last.end - last.start < smallest
            if small:
                last.end = max(last.end, end)
                continue
        if end - span.start >= smallest:
            merged.append(Span(kind=span.kind, start=span.start, end=end, story_id=span.story_id, shot_id=span.shot_id))
    return merged


def _ticks(axis: TimeAxis) -> str:
    step = next(
        (
            step
            for step in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200)
            if axis.seconds / step <= 8
        ),
        max(86400.0, axis.seconds / 8),
    )
    marks = []
    second = 0.0
    while second <= 0.97 * axis.seconds:
        label = f"{second:g} s" if step < 60 else fmt.duration(second)
        marks.append(f'<span class="tick" style="left:{100 * second / axis.seconds:.2f}%">{label}</span>')
        second += step
    return "".join(marks)


def _pause(state: RunState, axis: TimeAxis, number: int) -> str:
    away = axis.stretches[number][0] - axis.stretches[number - 1][1]
    return f"nothing ran for {fmt.duration(away)} here"


def _legend(state: RunState) -> str:
    seen = {span.kind for row in state.rows.values() for span in row.spans}
    items = "".join(f'<li><span class="swatch k-{kind}"></span>{kind}</li>' for kind in SPAN_KINDS if kind in seen)
    return f'<ul class="legend" aria-label="Stages">{items}</ul>'


def _stage_table(state: RunState, shown: Sequence[tuple[RowKey, Row]]) -> str:
    seen = {span.kind for row in state.rows.values() for span in row.spans}
    kinds = [kind for kind in SPAN_KINDS if kind in seen]
    rows = []
    for key, row in shown:
        totals = stage_totals(row)
        cells = [fmt.duration(totals[kind]) if kind in totals else "" for kind in kinds]
        rows.append((esc(state.row_label(key)), fmt.duration(row.alive_seconds), *cells))
    return table("Seconds per replica and stage", ("replica", "up", *kinds), rows, numeric=range(1, len(kinds) + 2))
