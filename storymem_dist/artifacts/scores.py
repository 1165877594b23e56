"""The scores of a run: ``scores.json`` in its folder, written by ``storymem-score`` and read by reports.

    {"format": 1, "run_id": ..., "written": seconds, "models": {name: identity}, "notes": [...],
     "values": {measure: number},                              means of the whole run
     "stories": {story: {"values": {...}, "notes": [...], "shots": {shot: {"clip": sha256, "values": {...}}}}}}

A measure that is not defined for a shot, story or run, or was not computed, is not there; notes say why. Knows the
measures' names and order; nothing of how they are computed. Loads no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storymem_dist.files import canonical_json, read_json, resolve_inside, write_bytes

SCORES_FORMAT = 1
SCORES_FILE = "scores.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One measure: its key in files, its name for people, which way is better, and the digits that are shown.

    ``better``: ``higher`` or ``lower``. ``of_shots``: whether single shots have it.
    """

    key: str
    name: str
    better: str
    digits: int
    of_shots: bool = True


MEASURES = (
    Measure(key="aesthetic_quality", name="aesthetic quality", better="higher", digits=4),
    Measure(key="prompt_following_global", name="prompt following, global", better="higher", digits=4, of_shots=False),
    Measure(key="prompt_following_single", name="prompt following, single shot", better="higher", digits=4),
    Measure(key="consistency_overall", name="consistency, overall", better="higher", digits=4, of_shots=False),
    Measure(key="consistency_top10", name="consistency, top 10", better="higher", digits=4, of_shots=False),
    Measure(key="sharpness", name="sharpness", better="higher", digits=1),
    Measure(key="flicker", name="flicker", better="lower", digits=3),
    Measure(key="seam", name="seam", better="lower", digits=2),
    Measure(key="keyframe_agreement", name="keyframe agreement", better="higher", digits=3),
)
"""In the order of every table: ST-Bench's five, then those that need no weights."""

_KEYS = frozenset(measure.key for measure in MEASURES)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotScores:
    """Scores of one shot. ``clip`` is the SHA-256 of the clip that was scored."""

    clip: str
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryScores:
    """Scores of one story, and of its shots by id. ``notes`` say what is not defined, or was left out, and why."""

    values: Mapping[str, float]
    shots: Mapping[str, ShotScores]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunScores:
    """Scores of a run. ``models``: identity of the weights that judged, by name."""

    run_id: str
    written: float
    values: Mapping[str, float]
    stories: Mapping[str, StoryScores]
    models: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def all_notes(self) -> list[str]:
        """The notes of the run, then those of its stories, each one once with the stories that have it."""
        found: dict[str, list[str]] = {}
        for story_id, story in self.stories.items():
            for note in story.notes:
                found.setdefault(note, []).append(story_id)
        shown = ((names[0] if len(names) == 1 else f"{len(names)} stories", note) for note, names in found.items())
        return [*self.notes, *(f"{where}: {note}" for where, note in shown)]


def write_scores(root: Path, scores: RunScores) -> Path:
    """Write ``scores.json`` into the run folder at ``root``; returns its path. Raises ``OSError``."""
    stories = {
        story_id: {
            "values": dict(story.values),
            "notes": list(story.notes),
            "shots": {key: {"clip": one.clip, "values": dict(one.values)} for key, one in story.shots.items()},
        }
        for story_id, story in scores.stories.items()
    }
    path = root / SCORES_FILE
    write_bytes(
        path,
        canonical_json(
            {
                "format": SCORES_FORMAT,
                "run_id": scores.run_id,
                "written": scores.written,
                "models": dict(scores.models),
                "notes": list(scores.notes),
                "values": dict(scores.values),
                "stories": stories,
            }
        ),
    )
    return path


def read_scores(root: Path) -> RunScores | None:
    """The scores in a run folder of any origin; None where it has none.

    Raises ``OSError`` when they cannot be read, ``ValueError`` for contents that this version does not write.
    """
    try:
        value = read_json(resolve_inside(root, SCORES_FILE))
    except FileNotFoundError:
        return None
    if not isinstance(value, dict) or value.get("format") != SCORES_FORMAT:
        raise ValueError(f"it is not of format {SCORES_FORMAT}")
    return RunScores(
        run_id=_text(value.get("run_id")),
        written=_number(value.get("written")),
        values=_values(value.get("values")),
        stories={str(key): _story(story) for key, story in _mapping(value.get("stories")).items()},
        models={str(key): _text(one) for key, one in _mapping(value.get("models")).items()},
        notes=_notes(value.get("notes")),
    )


def _story(value: Any) -> StoryScores:
    story = _mapping(value)
    shots = {}
    for key, shot in _mapping(story.get("shots")).items():
        one = _mapping(shot)
        shots[str(key)] = ShotScores(clip=_text(one.get("clip")), values=_values(one.get("values")))
    return StoryScores(values=_values(story.get("values")), shots=shots, notes=_notes(story.get("notes")))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an object is expected where it holds a {type(value).__name__}")
    return value


def _values(value: Any) -> dict[str, float]:
    return {key: _number(number) for key, number in _mapping(value).items() if key in _KEYS}


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"a number is expected where it holds a {type(value).__name__}")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text is expected where it holds a {type(value).__name__}")
    return value


def _notes(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of notes is expected")
    return [_text(one) for one in value]
