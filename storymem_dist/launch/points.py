"""The points of a sweep: their names, their run folders, why they could not begin, and the table at the end.

Everything that is told about a point is read from its run folder, so it does not matter who rendered it, where and
when. Knows files only.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from storymem_dist.artifacts.run_folder import MARKER
from storymem_dist.config.composing import to_plain, to_settings
from storymem_dist.config.points import Point
from storymem_dist.errors import ShotFailed, StoryMemError
from storymem_dist.files import canonical_json, names_in, read_json, write_bytes

_LONGEST_NAME = 120
_ERROR_FILE = Path("logs") / "error.json"  # launchers may put logs/ into a folder before it becomes a run folder


def point_of(config: DictConfig | ListConfig, name: str = "") -> Point:
    """The settings of one composed configuration. A named one is a point of a sweep: its run folder is in ``output``.

    Raises ``ConfigError``.
    """
    settings, plain = to_settings(config), to_plain(config)
    if not name:
        return Point(settings=settings, plain=plain)
    output = str(point_folder(settings.output, name))
    return Point(settings=replace(settings, output=output), plain={**plain, "output": output}, name=folder_name(name))


def folder_name(name: str) -> str:
    """A point's name as a folder: what file systems or shells could misread is replaced, and a hash tells it apart."""
    plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", name).strip("-.")[:_LONGEST_NAME]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def point_folder(sweep_folder: str | Path, name: str) -> Path:
    """The run folder of a point."""
    return Path(sweep_folder) / folder_name(name)


def keep_error(sweep_folder: str | Path, name: str, error: StoryMemError) -> None:
    """Note in a point's folder why it could not begin."""
    path = point_folder(sweep_folder, name) / _ERROR_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, canonical_json({"exit_code": error.exit_code, "message": str(error)}))


def forget_error(sweep_folder: str | Path, name: str) -> None:
    """Remove the note of an earlier attempt."""
    (point_folder(sweep_folder, name) / _ERROR_FILE).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class PointState:
    """How one point stands: that of its ``stop.json``, or ``not started``, ``running`` (or killed), ``refused``."""

    name: str
    state: str
    exit_code: int
    stories: str = ""
    num_shots: int = 0
    num_failed: int = 0
    message: str = ""


def read_point(folder: Path) -> PointState:
    """How the point in ``folder`` stands."""
    if (folder / _ERROR_FILE).exists():
        error = read_json(folder / _ERROR_FILE)
        return PointState(
            name=folder.name, state="refused", exit_code=int(error["exit_code"]), message=str(error["message"])
        )
    num_shots = len(list(folder.glob("stories/*/shot_*.mp4")))
    try:
        stop = read_json(folder / "stop.json")
    except FileNotFoundError:
        state = "running" if (folder / MARKER).exists() else "not started"
        return PointState(name=folder.name, state=state, exit_code=1, num_shots=num_shots)
    return PointState(
        name=folder.name,
        state=str(stop["state"]),
        exit_code=ShotFailed.exit_code if stop["state"] == "failed" else 0,
        stories=f"{stop['num_stories_done']}/{stop['num_stories']}",
        num_shots=num_shots,
        num_failed=int(stop["num_failed"]),
        message=str(stop["reason"]),
    )


def read_points(sweep_folder: str | Path) -> list[PointState]:
    """All points in a sweep's folder, by name."""
    folders = [Path(sweep_folder) / name for name in names_in(Path(sweep_folder))]
    return [read_point(folder) for folder in folders if (folder / MARKER).exists() or (folder / _ERROR_FILE).exists()]


def points_table(points: Sequence[PointState]) -> str:
    """One line for each point, with a heading."""
    heading = ("point", "state", "stories", "shots", "failed", "")
    rows = [
        (point.name, point.state, point.stories, str(point.num_shots), str(point.num_failed), point.message)
        for point in points
    ]
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading) - 1)]
    lines = []
    for row in (heading, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines) + "\n"
