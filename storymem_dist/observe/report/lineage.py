"""The memory lineage picture of a story: which keyframe of which shot was shown to which later shot.

One column per shot, one row per keyframe, whose line runs to the right from the shot it comes from. There is a filled
dot under each later shot to which it was shown and a ring where the shot's memory had no place for it. Every dot shows
its scores to pointers and screen readers; tables below repeat them. A long story is drawn small enough to be seen
whole: names are numbers, keyframes' pictures stand at the left, rings are plain dots. Names of shots stay in view.
Knows views, no files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from storymem_dist.events import MemoryDecided
from storymem_dist.observe.report.assets import KEYFRAME_HEIGHT, Assets
from storymem_dist.observe.report.html import anchor, details, esc, table
from storymem_dist.observe.report.views import KeyframeView, ShotView, StoryView
from storymem_dist.observe.run import format as fmt

LONG_STORY = 16
"""Shots from which on a story is drawn small."""

Uses = Mapping[tuple[int, int], Sequence[tuple[ShotView, MemoryDecided]]]
"""The shots that a keyframe was shown to, or could have been, by ``KeyframeView.key``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Sizes of a drawing in pixels; ``columns``: number of the column of each position in the story."""

    column: int
    row: int
    head: int
    label: int
    thumb: tuple[int, int]
    is_small: bool
    columns: Mapping[int, int]

    def x(self, position: int) -> int:
        """Centre of the column of a position in the story, without the labels."""
        return self.column * self.columns.get(position, 0) + self.column // 2


def lineage(story: StoryView, assets: Assets) -> str:
    """Return the picture and its tables as HTML."""
    if not story.keyframes:
        return '<p class="quiet">Nothing is remembered yet.</p>'
    grid, uses = _grid(story), _uses(story)
    width, height = grid.column * len(grid.columns) + 8, grid.row * len(story.keyframes) + 4
    centres = [(keyframe, grid.row * number + grid.row // 2) for number, keyframe in enumerate(story.keyframes)]
    rows = "".join(_row(keyframe, uses.get(keyframe.key, ()), grid, y, assets) for keyframe, y in centres)
    name = f"Memory lineage of {story.name}"
    label = f"{name}: {len(story.keyframes)} keyframes, {len(edges(story))} recalls"
    picture = (
        f'<div class="lineage{" small" * grid.is_small}" role="group" aria-label="{esc(label)}" '
        f'style="width:{grid.label + width}px">{_heads(story, grid, grid.label + width)}'
        f'<svg class="labels" width="{grid.label}" height="{height}">'
        f"{''.join(_label(keyframe, grid, y, assets) for keyframe, y in centres)}</svg>"
        f'<svg width="{width}" height="{height}">{_rules(story, grid, height)}{rows}</svg></div>'
    )
    legend = (
        '<ul class="legend" aria-label="Marks"><li><span class="dot shown"></span>shown to the shot</li>'
        '<li><span class="dot gone"></span>in the bank, but not shown to the shot</li></ul>'
    )
    listed = [d for s in story.shots for d in s.decisions if not (grid.is_small and d.verdict == "evicted")]
    return (
        f'<div class="scroll tall" role="region" aria-label="{esc(name)}" tabindex="0">{picture}</div>{legend}'
        + details(f"Keyframes as a table ({len(story.keyframes)})", _keyframe_table(story, uses))
        + details(
            f"{'Memory' if grid.is_small else 'All memory'} decisions ({len(listed)})", _decision_table(story, grid)
        )
    )


def edges(story: StoryView) -> list[tuple[tuple[int, int], str]]:
    """Return every recall as (keyframe: shot index and slot, id of the shot to which it was shown)."""
    return [
        ((decision.source_shot_index, decision.slot), shot.shot_id)
        for shot in story.shots
        for decision in shot.recalled
        if decision.slot is not None
    ]


def _grid(story: StoryView) -> Grid:
    positions = [shot.shot_index for shot in story.shots]
    if any(keyframe.shot_index < 0 for keyframe in story.keyframes):
        positions = [-1, *positions]  # reference images come first
    columns = {position: number for number, position in enumerate(positions)}
    if len(story.shots) < LONG_STORY:
        thumb = (84, KEYFRAME_HEIGHT)
        return Grid(column=98, row=thumb[1] + 10, head=40, label=84, thumb=thumb, is_small=False, columns=columns)
    return Grid(column=22, row=28, head=24, label=104, thumb=(42, 24), is_small=True, columns=columns)


def _uses(story: StoryView) -> Uses:
    uses: dict[tuple[int, int], list[tuple[ShotView, MemoryDecided]]] = {}
    for shot in story.shots:
        for decision in shot.decisions:
            if decision.verdict in ("recalled", "evicted") and decision.slot is not None:
                uses.setdefault((decision.source_shot_index, decision.slot), []).append((shot, decision))
    return uses


def _heads(story: StoryView, grid: Grid, width: int) -> str:
    parts = []
    if -1 in grid.columns:
        name = "ref" if grid.is_small else "references"
        parts.append(f'<text class="head" x="{grid.label + grid.x(-1)}" y="16">{name}</text>')
    for shot in story.shots:
        x = grid.label + grid.x(shot.shot_index)
        facts = f"{shot.mode or shot.status} · {len(shot.recalled)} shown"
        name = _number(shot.shot_id) if grid.is_small else shot.shot_id
        names = f'<text class="head" x="{x}" y="16">{esc(name)}</text>'
        if not grid.is_small:
            names += f' <text class="sub" x="{x}" y="30">{esc(facts)}</text>'
        parts.append(
            f'<a href="#{anchor("shot", story.story_id, shot.shot_id)}" class="column" data-shot="{esc(shot.shot_id)}" '
            f'data-tip="{esc(f"{shot.shot_id}: {facts}")}">{names}</a>'
        )
    return f'<svg class="heads" width="{width}" height="{grid.head}">{"".join(parts)}</svg>'


def _rules(story: StoryView, grid: Grid, height: int) -> str:
    """A line down from each shot, as one shape."""
    path = "".join(f"M{grid.x(shot.shot_index)} 0V{height - 4}" for shot in story.shots)
    return f'<path class="rule" d="{path}"/>'


def _label(keyframe: KeyframeView, grid: Grid, y: int, assets: Assets) -> str:
    source = "reference" if keyframe.shot_index < 0 else f"shot_{keyframe.shot_index + 1:02d}"
    if not grid.is_small:
        return f'<text class="label" x="8" y="{y + 4}">{source} · {keyframe.slot}</text>'
    source = "ref" if keyframe.shot_index < 0 else _number(source)
    picture = _thumb(keyframe, grid, grid.label - grid.thumb[0] // 2 - 6, y, assets)
    return f'<text class="label" x="8" y="{y + 4}">{source} · {keyframe.slot}</text>{picture}'


def _number(shot_id: str) -> str:
    return shot_id.removeprefix("shot_")


def _thumb(keyframe: KeyframeView, grid: Grid, x: int, y: int, assets: Assets) -> str:
    width, height = grid.thumb
    box = f'x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}"'
    picture = assets.keyframe(keyframe.image)
    tip = f"{keyframe.name}, frame {keyframe.frame_index}. {_scores(keyframe)}"
    return (
        f'<g class="keyframe" role="img" aria-label="{esc(tip)}" data-tip="{esc(tip)}"><rect {box} rx="4"/>'
        + (f'<image {box} href="{picture}" preserveAspectRatio="xMidYMid slice"/>' if picture else "")
        + "</g>"
    )


def _row(
    keyframe: KeyframeView, uses: Sequence[tuple[ShotView, MemoryDecided]], grid: Grid, y: int, assets: Assets
) -> str:
    parts = []
    birth = grid.x(keyframe.shot_index)
    if uses:
        last = max(grid.x(shot.shot_index) for shot, _ in uses)
        parts.append(f'<line class="life" x1="{birth}" y1="{y}" x2="{last}" y2="{y}"/>')
    if grid.is_small:
        parts.append(f'<rect class="birth" x="{birth - 4}" y="{y - 4}" width="8" height="8"/>')
        gone = "".join(f"M{grid.x(shot.shot_index)} {y}h0" for shot, one in uses if one.verdict == "evicted")
        parts.append(f'<path class="gone" d="{gone}"/>' if gone else "")
        uses = [(shot, one) for shot, one in uses if one.verdict == "recalled"]
    else:
        parts.append(_thumb(keyframe, grid, birth, y, assets))
    parts += [_edge(keyframe, shot, decision, grid, y) for shot, decision in uses]
    return "".join(parts)


def _edge(keyframe: KeyframeView, shot: ShotView, decision: MemoryDecided, grid: Grid, y: int) -> str:
    shown, x = decision.verdict == "recalled", grid.x(shot.shot_index)
    what = "shown to" if shown else "not shown to"
    why = f" {decision.why[:1].upper()}{decision.why[1:]}." if decision.why else ""
    tip = f"{keyframe.name} {what} {shot.shot_id}.{why} {_scores(keyframe)}"
    radius = (6 if grid.is_small else 8) if shown else 5
    return (
        f'<g class="edge {"shown" if shown else "gone"}" role="img" aria-label="{esc(tip)}" data-tip="{esc(tip)}" '
        f'data-from="{keyframe.shot_index}:{keyframe.slot}" data-to="{esc(shot.shot_id)}">'
        f'<circle class="hit" cx="{x}" cy="{y}" r="{grid.column // 2 if grid.is_small else 20}"/>'
        f'<circle cx="{x}" cy="{y}" r="{radius}"/></g>'
    )


def _scores(keyframe: KeyframeView) -> str:
    against = f" (to {keyframe.against})" if keyframe.against else ""
    parts = [
        f"{name} {value:.3f}{extra}"
        for name, value, extra in (
            ("similarity to the frame before it", keyframe.similarity, ""),
            ("to the bank", keyframe.bank_similarity, against),
            ("quality", keyframe.quality, ""),
        )
        if value is not None
    ]
    return f"Scores: {', '.join(parts)}." if parts else "No scores."


def _shots_in_words(shots: Iterable[ShotView]) -> str:
    """``shot_02, shot_05 to shot_09``: neighbours in the story are one range."""
    runs: list[list[ShotView]] = []
    for shot in shots:
        if runs and shot.shot_index == runs[-1][-1].shot_index + 1:
            runs[-1].append(shot)
        else:
            runs.append([shot])
    words = []
    for run in runs:
        words += [f"{run[0].shot_id} to {run[-1].shot_id}"] if len(run) > 2 else [shot.shot_id for shot in run]
    return ", ".join(words)


def _keyframe_table(story: StoryView, uses: Uses) -> str:
    rows = []
    for keyframe in story.keyframes:
        used = uses.get(keyframe.key, ())
        rows.append(
            (
                esc(keyframe.name),
                str(keyframe.frame_index),
                fmt.number(keyframe.similarity, 3),
                fmt.number(keyframe.bank_similarity, 3),
                esc(keyframe.against or ""),
                fmt.number(keyframe.quality, 2),
                *(
                    esc(_shots_in_words(shot for shot, decision in used if decision.verdict == verdict))
                    for verdict in ("recalled", "evicted")
                ),
            )
        )
    heads = ("keyframe", "frame", "similarity", "to the bank", "nearest in the bank", "quality")
    return table(
        f"Keyframes of {story.name}", (*heads, "shown to", "not shown to"), rows, numeric=(1, 2, 3, 5), compact=True
    )


def _decision_table(story: StoryView, grid: Grid) -> str:
    """One row per decision; in a long story without those that left a keyframe out, which are far too many."""
    rows = []
    fps = {shot.shot_index: shot.fps for shot in story.shots}
    for shot in story.shots:
        for decision in shot.decisions:
            if grid.is_small and decision.verdict == "evicted":
                continue
            source = decision.source_shot_index
            frame = f"frame {decision.source_frame_index}"
            if source in fps:
                target = anchor("shot", story.story_id, f"shot_{source + 1:02d}")
                seconds = decision.source_frame_index / fps[source]
                frame = f'<a href="#{target}" data-seek="{seconds:.4f}">shot_{source + 1:02d} {frame}</a>'
            else:
                frame = f"reference image {(decision.slot or 0) + 1}"
            rows.append(
                (
                    esc(shot.shot_id),
                    esc(decision.verdict.replace("_", " ")),
                    frame,
                    fmt.number(decision.similarity, 3),
                    fmt.number(decision.bank_similarity, 3),
                    fmt.number(decision.quality, 2),
                    esc(decision.why),
                )
            )
    return table(
        f"Memory decisions of {story.name}",
        ("for", "verdict", "frame", "similarity", "to the bank", "quality", "why"),
        rows,
        numeric=(3, 4, 5),
        compact=True,
    )
