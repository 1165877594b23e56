"""Scores as tables for a terminal. Knows scores and rich; nothing of how they are computed."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from storymem_dist.artifacts.scores import MEASURES, Measure, RunScores
from storymem_dist.observe.run import format as fmt
from storymem_dist.terminal.text import printable

MAX_SHOTS = 40
"""Most shots that are listed; those of larger runs are in ``scores.json`` and in the report."""

_PER_TABLE = 5
"""Measures next to each other; more of them do not fit 80 characters, and a number that is cut short is a wrong one."""

_HEAD_WIDTH = 12

_Row = tuple[str, Mapping[str, float], str]


def run_table(root: Path, scores: RunScores) -> RenderableType:
    """The scores of one run: its means, its stories and their shots. ``notes`` says what is to be said about them."""
    num_shots = sum(len(story.shots) for story in scores.stories.values())
    rows: list[_Row] = [("run", scores.values, "bold")]
    for story_id, story in scores.stories.items():
        rows.append((story_id, story.values, "bold"))
        if num_shots <= MAX_SHOTS:
            rows += [(f"  {shot_id}", shot.values, "") for shot_id, shot in story.shots.items()]
    return _tables(str(root), rows)


def notes(scores: RunScores) -> list[Text]:
    """The notes of a run, a line each: they hold commands, so they should not be folded."""
    found = scores.all_notes()
    num_shots = sum(len(story.shots) for story in scores.stories.values())
    if num_shots > MAX_SHOTS:
        found.append(f"the scores of {num_shots} shots are in scores.json and in the report")
    return [Text(printable(note), style="yellow") for note in found]


def runs_table(scored: Sequence[tuple[Path, RunScores]]) -> RenderableType:
    """Several runs, a line for each."""
    return _tables("all runs", [(str(root), scores.values, "") for root, scores in scored])


def _tables(title: str, rows: Sequence[_Row]) -> RenderableType:
    measures = [measure for measure in MEASURES if any(measure.key in values for _, values, _ in rows)]
    parts = (measures[first : first + _PER_TABLE] for first in range(0, len(measures), _PER_TABLE))
    return Group(*(_table(title, rows, part) for part in parts))


def _table(title: str, rows: Sequence[_Row], measures: Sequence[Measure]) -> Table:
    table = Table(title=printable(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for measure in measures:
        head = f"{measure.name} {'↑' if measure.better == 'higher' else '↓'}"
        table.add_column(textwrap.fill(head, _HEAD_WIDTH), justify="right", no_wrap=True)
    for name, values, style in rows:
        numbers = (fmt.number(values.get(measure.key), measure.digits) for measure in measures)
        table.add_row(Text(printable(name), style=style), *(Text(number, style=style) for number in numbers))
    return table
