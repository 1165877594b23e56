"""The points of a sweep: their names, their run folders, why they could not begin, and the table at the end.

The state of a point is read from its run folder alone: any process on any machine may have rendered it. Knows files
only.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from storymem_dist.artifacts.run_folder import MARKER, RunFolder
from storymem_dist.config.composing import to_plain, to_settings
from storymem_dist.config.points import Point
from storymem_dist.errors import ShotError, StoryboardError, StoryMemError
from storymem_dist.files import canonical_json, names_in, read_json, write_bytes
from storymem_dist.terminal.text import printable

_LONGEST_NAME = 120
_ERROR_FILE = Path("logs") / "error.json"  # launchers may put logs/ into a folder before it becomes a run folder


def point_of(config: DictConfig | ListConfig, name: str = "") -> Point:
    """Return the point of one composed configuration. With ``name`` it is in a sweep: its run folder is in ``output``.

    Raises ``ConfigError``.
    """
    settings, plain = to_settings(config), to_plain(config)
    if not name:
        return Point(settings=settings, plain=plain)
    output = str(point_folder(settings.output, name))
    return Point(settings=replace(settings, output=output), plain={**plain, "output": output}, name=folder_name(name))


def folder_name(name: str) -> str:
    """Return a point's name as a folder name: unsafe characters are replaced, and then a hash keeps it distinct."""
    plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", name).strip("-.")[:_LONGEST_NAME]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def point_folder(sweep_folder: str | Path, name: str) -> Path:
    """Return the run folder of a point."""
    return Path(sweep_folder) / folder_name(name)


def keep_error(sweep_folder: str | Path, name: str, error: StoryMemError) -> None:
    """Write into a point's folder why it could not begin."""
    path = point_folder(sweep_folder, name) / _ERROR_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, canonical_json({"exit_code": error.exit_code, "message": str(error)}))


def forget_error(sweep_folder: str | Path, name: str) -> None:
    """Remove what ``keep_error`` wrote in an earlier attempt."""
    (point_folder(sweep_folder, name) / _ERROR_FILE).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class PointState:
    """One point. ``state``: that of its ``stop.json``, else ``not started``, ``running`` (or killed) or ``refused``."""

    name: str
    state: str
    exit_code: int
    stories: str = ""
    num_shots: int = 0
    num_failed: int = 0
    num_refused: int = 0
    message: str = ""


def read_point(folder: Path) -> PointState:
    """Return the state of the point in ``folder``; ``unreadable`` where its files say none."""
    try:
        return _read_point(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{type(error).__name__}: {error}"
        return PointState(name=folder.name, state="unreadable", exit_code=StoryMemError.exit_code, message=message)


def _read_point(folder: Path) -> PointState:
    if (folder / _ERROR_FILE).exists():
        error = read_json(folder / _ERROR_FILE)
        return PointState(
            name=folder.name, state="refused", exit_code=int(error["exit_code"]), message=str(error["message"])
        )
    run = RunFolder(folder)
    num_shots = len(list(run.stories_folder.glob("*/*/shot_*.mp4" if run.is_sharded else "*/shot_*.mp4")))
    try:
        stop = read_json(folder / "stop.json")
    except FileNotFoundError:
        state = "running" if (folder / MARKER).exists() else "not started"
        return PointState(name=folder.name, state=state, exit_code=1, num_shots=num_shots)
    num_refused = int(stop.get("num_refused", 0))  # a version before this one did not count them
    exit_code = StoryboardError.exit_code if num_refused else 0
    if stop["state"] == "failed":
        exit_code = ShotError.exit_code
    return PointState(
        name=folder.name,
        state=str(stop["state"]),
        exit_code=exit_code,
        stories=f"{stop['num_stories_done']}/{stop['num_stories'] + num_refused}",
        num_shots=num_shots,
        num_failed=int(stop["num_failed"]),
        num_refused=num_refused,
        message=str(stop["reason"]),
    )


def read_points(sweep_folder: str | Path) -> list[PointState]:
    """Return all points in a sweep's folder, sorted by name."""
    folders = [Path(sweep_folder) / name for name in names_in(Path(sweep_folder))]
    return [read_point(folder) for folder in folders if (folder / MARKER).exists() or (folder / _ERROR_FILE).exists()]


def points_table(points: Sequence[PointState]) -> str:
    """Return a table with a heading and one line for each point."""
    heading = ("point", "state", "stories", "shots", "failed", "")
    rows = [
        (point.name, point.state, point.stories, str(point.num_shots), str(point.num_failed), printable(point.message))
        for point in points
    ]
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading) - 1)]
    lines = []
    for row in (heading, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines) + "\n"
