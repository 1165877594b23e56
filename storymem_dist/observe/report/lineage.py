"""The memory lineage picture of a story: which keyframe of which shot was shown to which later shot.

One column per shot, one row per keyframe. A keyframe's picture is in the column of the shot it comes from. Its line
runs to the right, with a filled dot under each later shot to which it was shown and a ring where the shot's memory had
no place for it. Every dot shows its scores to pointers and screen readers; a table below repeats them. Knows views, no
files.
"""

from storymem_dist.events import MemoryDecided
from storymem_dist.observe.report.assets import KEYFRAME_HEIGHT, Assets
from storymem_dist.observe.report.html import anchor, details, esc, table
from storymem_dist.observe.report.model import KeyframeView, ShotView, StoryView
from storymem_dist.observe.run import format as fmt

COLUMN, ROW, HEAD, LABEL = 98, KEYFRAME_HEIGHT + 10, 40, 84
THUMB_WIDTH = 84


def lineage(story: StoryView, assets: Assets) -> str:
    """Return the picture and its tables as HTML."""
    if not story.keyframes:
        return '<p class="quiet">Nothing is remembered yet.</p>'
    columns = _columns(story)
    width, height = LABEL + COLUMN * len(columns) + 8, HEAD + ROW * len(story.keyframes) + 8
    parts = [_heads(story, columns, height)]
    for number, keyframe in enumerate(story.keyframes):
        parts.append(_row(story, keyframe, columns, HEAD + ROW * number + ROW // 2, assets))
    name = f"Memory lineage of {story.name}"
    label = f"{name}: {len(story.keyframes)} keyframes, {len(edges(story))} recalls"
    picture = (
        f'<svg class="lineage" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="{esc(label)}">{"".join(parts)}</svg>'
    )
    legend = (
        '<ul class="legend" aria-label="Marks"><li><span class="dot shown"></span>shown to the shot</li>'
        '<li><span class="dot gone"></span>in the bank, but not shown to the shot</li></ul>'
    )
    return (
        f'<div class="scroll" role="region" aria-label="{esc(name)}" tabindex="0">{picture}</div>{legend}'
        + details(f"Keyframes as a table ({len(story.keyframes)})", _keyframe_table(story, assets))
        + details(f"All memory decisions ({sum(len(s.decisions) for s in story.shots)})", _decision_table(story))
    )


def edges(story: StoryView) -> list[tuple[tuple[int, int], str]]:
    """Return every recall as (keyframe: shot index and slot, id of the shot to which it was shown)."""
    return [
        ((decision.source_shot_index, decision.slot), shot.shot_id)
        for shot in story.shots
        for decision in shot.recalled
        if decision.slot is not None
    ]


def _columns(story: StoryView) -> dict[int, int]:
    """Column number of each position in the story; reference images (-1) come first where there are any."""
    positions = [shot.shot_index for shot in story.shots]
    if any(keyframe.shot_index < 0 for keyframe in story.keyframes):
        positions = [-1, *positions]
    return {position: number for number, position in enumerate(positions)}


def _centre(column: int) -> int:
    return LABEL + COLUMN * column + COLUMN // 2


def _heads(story: StoryView, columns: dict[int, int], height: int) -> str:
    parts = []
    if -1 in columns:
        parts.append(f'<text class="head" x="{_centre(0)}" y="18">references</text>')
    for shot in story.shots:
        x = _centre(columns[shot.shot_index])
        parts.append(f'<line class="rule" x1="{x}" y1="{HEAD - 8}" x2="{x}" y2="{height - 4}"/>')
        parts.append(
            f'<a href="#{anchor("shot", story.story_id, shot.shot_id)}" class="column" data-shot="{esc(shot.shot_id)}">'
            f'<text class="head" x="{x}" y="16">{esc(shot.shot_id)}</text> '
            f'<text class="sub" x="{x}" y="30">{esc(shot.mode or shot.status)} · {len(shot.recalled)} shown</text></a>'
        )
    return "".join(parts)


def _row(story: StoryView, keyframe: KeyframeView, columns: dict[int, int], y: int, assets: Assets) -> str:
    birth = _centre(columns.get(keyframe.shot_index, 0))
    source = "reference" if keyframe.shot_index < 0 else f"shot_{keyframe.shot_index + 1:02d}"
    parts = [f'<text class="label" x="8" y="{y + 4}">{source} · {keyframe.slot}</text>']
    uses = [
        (shot, decision)
        for shot in story.shots
        for decision in shot.decisions
        if decision.verdict in ("recalled", "evicted") and (decision.source_shot_index, decision.slot) == keyframe.key
    ]
    if uses:
        last = max(_centre(columns[shot.shot_index]) for shot, _ in uses)
        parts.append(f'<line class="life" x1="{birth}" y1="{y}" x2="{last}" y2="{y}"/>')
    picture = assets.keyframe(keyframe.image)
    corner = f'x="{birth - THUMB_WIDTH // 2}" y="{y - KEYFRAME_HEIGHT // 2}"'
    box = f'{corner} width="{THUMB_WIDTH}" height="{KEYFRAME_HEIGHT}"'
    tip = f"{keyframe.name}, frame {keyframe.frame_index}. {_scores(keyframe)}"
    parts.append(f'<g class="keyframe" role="img" aria-label="{esc(tip)}" data-tip="{esc(tip)}"><rect {box} rx="4"/>')
    if picture:
        parts.append(f'<image {box} href="{picture}" preserveAspectRatio="xMidYMid slice"/>')
    parts.append("</g>")
    parts.extend(_edge(keyframe, shot, decision, _centre(columns[shot.shot_index]), y) for shot, decision in uses)
    return "".join(parts)


def _edge(keyframe: KeyframeView, shot: ShotView, decision: MemoryDecided, x: int, y: int) -> str:
    shown = decision.verdict == "recalled"
    what = "shown to" if shown else "not shown to"
    why = f" {decision.why[:1].upper()}{decision.why[1:]}." if decision.why else ""
    tip = f"{keyframe.name} {what} {shot.shot_id}.{why} {_scores(keyframe)}"
    radius = 8 if shown else 5
    return (
        f'<g class="edge {"shown" if shown else "gone"}" role="img" aria-label="{esc(tip)}" data-tip="{esc(tip)}" '
        f'data-from="{keyframe.shot_index}:{keyframe.slot}" data-to="{esc(shot.shot_id)}">'
        f'<circle class="hit" cx="{x}" cy="{y}" r="20"/><circle cx="{x}" cy="{y}" r="{radius}"/></g>'
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


def _keyframe_table(story: StoryView, assets: Assets) -> str:
    rows = []
    for keyframe in story.keyframes:
        picture = assets.keyframe(keyframe.image)
        image = f'<img src="{picture}" alt="" height="36">' if picture else ""
        used: dict[str, list[str]] = {"recalled": [], "evicted": []}
        for shot in story.shots:
            for decision in shot.decisions:
                if decision.verdict in used and (decision.source_shot_index, decision.slot) == keyframe.key:
                    used[decision.verdict].append(shot.shot_id)
        rows.append(
            (
                esc(keyframe.name),
                image,
                str(keyframe.frame_index),
                fmt.number(keyframe.similarity, 3),
                fmt.number(keyframe.bank_similarity, 3),
                esc(keyframe.against or ""),
                fmt.number(keyframe.quality, 2),
                esc(", ".join(used["recalled"])),
                esc(", ".join(used["evicted"])),
            )
        )
    heads = ("keyframe", "picture", "frame", "similarity", "to the bank", "nearest in the bank", "quality")
    return table(
        f"Keyframes of {story.name}",
        (*heads, "shown to", "not shown to"),
        rows,
        numeric=(2, 3, 4, 6),
        compact=True,
    )


def _decision_table(story: StoryView) -> str:
    rows = []
    fps = {shot.shot_index: shot.fps for shot in story.shots}
    for shot in story.shots:
        for decision in shot.decisions:
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
