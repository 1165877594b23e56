"""The scores of a run as tables: of the run, its stories and shots, and of two runs side by side.

Knows the report's values and HTML; nothing of how scores are computed.
"""

from collections.abc import Mapping, Sequence

from storymem_dist.artifacts.scores import MEASURES, Measure, StoryScores
from storymem_dist.observe.report.html import details, esc, table
from storymem_dist.observe.report.views import RunView, ShotView, StoryView
from storymem_dist.observe.run import format as fmt

_INTRO = (
    '<p class="quiet">ST-Bench&#39;s five metrics come first, this project&#39;s own follow; docs/evaluation.md '
    "says which can be compared with what. Lower is better for flicker and seam.</p>"
)


_NOT_SCORED = '<p class="quiet">Not scored yet. storymem-score scores the run folder.</p>'


def scores_section(run: RunView, *, shots: bool = True) -> str:
    """Return a table with a column for each measure, and the notes. ``shots``: with a row for each shot."""
    scores = run.scores
    if scores is None:
        return _NOT_SCORED
    rows = [("<strong>run</strong>", scores.values)]
    for story_id, story in scores.stories.items():
        rows += _story_rows(story_id, story, shots=shots)
    return _table(rows, scores.all_notes())


def story_scores(run: RunView, story: StoryView) -> str:
    """Return the table of one story and its shots."""
    scores = run.scores.stories.get(story.story_id) if run.scores is not None else None
    return _table(_story_rows(story.story_id, scores, shots=True), scores.notes) if scores is not None else _NOT_SCORED


def _table(rows: Sequence[tuple[str, Mapping[str, float]]], notes: Sequence[str]) -> str:
    measures = [measure for measure in MEASURES if any(measure.key in values for _, values in rows)]
    cells = [(name, *(_number(values, measure) for measure in measures)) for name, values in rows]
    heads = ("", *(esc(measure.name) for measure in measures))
    listed = details(f"Notes ({len(notes)})", "".join(f"<p>{esc(note)}</p>" for note in notes)) if notes else ""
    return _INTRO + table("Scores", heads, cells, numeric=range(1, len(heads))) + listed


def _story_rows(story_id: str, story: StoryScores, *, shots: bool) -> list[tuple[str, Mapping[str, float]]]:
    """Names (as HTML) and values of a story, and of its shots."""
    rows: list[tuple[str, Mapping[str, float]]] = [(f"<strong>{esc(story_id)}</strong>", story.values)]
    if shots:
        rows += [(esc(shot_id.replace("_", " ")), shot.values) for shot_id, shot in story.shots.items()]
    return rows


def _number(values: Mapping[str, float], measure: Measure) -> str:
    return fmt.number(values.get(measure.key), measure.digits)


def shot_scores(shot: ShotView) -> str:
    """Return the scores of one shot in words."""
    return ", ".join(f"{one.name} {_number(shot.scores, one)}" for one in MEASURES if one.key in shot.scores)


def compared_figures(left: RunView, right: RunView) -> list[tuple[str, float | None, float | None, int]]:
    """Return name, both values and digits of each measure that one of two runs has."""
    a, b = (run.scores.values if run.scores is not None else {} for run in (left, right))
    return [(one.name, a.get(one.key), b.get(one.key), one.digits) for one in MEASURES if one.key in a or one.key in b]


def compared_stories(left: RunView, right: RunView) -> str:
    """Return the scores of every story in both runs, and which one is better."""
    a, b = (run.scores.stories if run.scores is not None else {} for run in (left, right))
    rows = []
    for story_id in sorted({*a, *b}):
        ours, theirs = (side[story_id].values if story_id in side else {} for side in (a, b))
        for measure in MEASURES:
            one, other = ours.get(measure.key), theirs.get(measure.key)
            if one is None and other is None:
                continue
            better = ""
            if one is not None and other is not None and one != other:
                better = "B" if (other > one) == (measure.better == "higher") else "A"
            numbers = (_number(ours, measure), _number(theirs, measure))
            rows.append((esc(story_id), esc(measure.name), *numbers, better))
    if not rows:
        return '<p class="quiet">Neither run is scored. storymem-score scores both.</p>'
    return _INTRO + table("Scores of both runs", ("story", "measure", "A", "B", "better"), rows, numeric=(2, 3))
