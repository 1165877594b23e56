"""The graph of a story as a picture: which shot waits for which.

A column holds the shots that can be rendered at once, when all columns to its left are done. A line comes from each
shot that a shot waits for directly. A table below says the same. Knows views, no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from storymem_dist.observe.report.html import anchor, details, esc, table
from storymem_dist.observe.report.views import ShotView, StoryView
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.values import levels

LONG_STORY = 16
"""Shots from which on a story is drawn small: with numbers instead of names."""

MARGIN = 12
_KINDS = {"finished": "good", "running": "busy", "failed": "bad", "blocked": "bad"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a drawing in pixels: of a box, and from one box to the next."""

    width: int
    height: int
    column: int
    row: int

    def corner(self, place: tuple[int, int]) -> tuple[int, int]:
        """Upper left corner of the box in a column and row."""
        return MARGIN + self.column * place[0], MARGIN + self.row * place[1]


_LARGE, _SMALL = Sizes(96, 34, 156, 46), Sizes(34, 22, 64, 30)


def needs_picture(story: StoryView) -> str:
    """Return the picture and its table as HTML; a sentence for a story whose shots follow one another, or ''."""
    waits = story.waits_for
    shots = {shot.shot_index: shot for shot in story.shots if 0 <= shot.shot_index < len(waits)}
    if len(waits) < 2 or len(shots) != len(waits):
        return ""
    if all(wait == (index - 1,) for index, wait in enumerate(waits) if index):
        return '<p class="quiet">Each shot waits for the one before it.</p>'
    columns = levels(waits)
    places = _places(columns)
    sizes = _LARGE if len(waits) < LONG_STORY else _SMALL
    width = MARGIN * 2 + sizes.column * max(columns) + sizes.width
    height = MARGIN * 3 + sizes.row * max(row for _, row in places) + sizes.height
    lines = [_line(sizes, places[need], places[index]) for index, wait in enumerate(waits) for need in wait]
    boxes = [_box(sizes, story, shots[index], waits[index], places[index]) for index in sorted(shots)]
    name = f"Which shot waits for which in {story.name}"
    at_once = max(columns.count(column) for column in set(columns))
    words = f"{fmt.count(max(columns) + 1, 'step')} one after the other; at most {fmt.count(at_once, 'shot')} at once."
    picture = (
        f'<svg class="graph" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="{esc(name)}">{"".join(lines)}{"".join(boxes)}</svg>'
    )
    return (
        f"<p>{esc(words)}</p>"
        f'<div class="scroll tall" role="region" aria-label="{esc(name)}" tabindex="0">{picture}</div>'
        + details(f"The graph as a table ({len(waits)} shots)", _table(story, shots, waits))
    )


def _places(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Column and row of each shot: the shots of a column stand below each other, in order."""
    used: dict[int, int] = {}
    places = []
    for column in columns:
        places.append((column, used.get(column, 0)))
        used[column] = used.get(column, 0) + 1
    return places


def _line(sizes: Sizes, start: tuple[int, int], end: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = sizes.corner(start), sizes.corner(end)
    x1, y1, y2 = x1 + sizes.width, y1 + sizes.height // 2, y2 + sizes.height // 2
    bend = (sizes.column - sizes.width) // 2
    dip = sizes.row * 2 // 3 if start[1] == end[1] and end[0] - start[0] > 1 else 0  # below the boxes between them
    return f'<path d="M{x1} {y1} C{x1 + bend} {y1 + dip} {x2 - bend} {y2 + dip} {x2} {y2}"/>'


def _box(sizes: Sizes, story: StoryView, shot: ShotView, wait: Sequence[int], place: tuple[int, int]) -> str:
    x, y = sizes.corner(place)
    needs = ", ".join(f"shot_{need + 1:02d}" for need in wait) or "no shot"
    tip = f"{shot.shot_id}: {shot.status}; waits for {needs}"
    target = anchor("shot", story.story_id, shot.shot_id)
    middle = x + sizes.width // 2
    words = f'<text x="{middle}" y="{y + 15}">{esc(shot.shot_id)}</text>'
    words += f'<text class="sub" x="{middle}" y="{y + 28}">{esc(shot.mode or shot.status)}</text>'
    if sizes is _SMALL:
        words = f'<text x="{middle}" y="{y + 15}">{esc(shot.shot_id.removeprefix("shot_"))}</text>'
    return (
        f'<a href="#{target}" class="{_KINDS.get(shot.status, "calm")}" aria-label="{esc(tip)}" data-tip="{esc(tip)}">'
        f'<rect x="{x}" y="{y}" width="{sizes.width}" height="{sizes.height}" rx="6"/>{words}</a>'
    )


def _table(story: StoryView, shots: dict[int, ShotView], waits: Sequence[Sequence[int]]) -> str:
    rows = [
        (
            esc(shots[index].shot_id),
            esc(shots[index].status),
            esc(", ".join(f"shot_{need + 1:02d}" for need in wait)),
            esc("the shot before it" if wait and not shots[index].cut else ""),
        )
        for index, wait in enumerate(waits)
    ]
    return table(
        f"Shots of {story.name} and what they wait for",
        ("shot", "status", "waits for", "continues"),
        rows,
        compact=True,
    )
