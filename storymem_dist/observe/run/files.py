"""A read-only view of a run folder: its id, storyboards and current records. Never loads torch.

Works on a folder that is being written, on a damaged one and on one that comes from somebody else: what cannot be read,
or is not inside the folder, is left out. Knows no events.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord
from storymem_dist.artifacts.sharding import SHARDED_RUN_FORMAT, shard_of
from storymem_dist.errors import RunFolderError
from storymem_dist.files import names_in, parse_json, read_json, read_limited, resolve_inside

MARKER = "storymem_run.json"
MAX_CONFIG_BYTES = 2**20
_LONGEST_ID = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryFiles:
    """What the folder of one story holds: the storyboard as it was read ({} if not yet) and the records by shot id."""

    story_id: str
    storyboard: dict[str, Any]
    records: dict[str, ShotRecord]
    video: str | None


class RunFiles:
    """Read access to the run folder at ``root``. ``left_out`` names each file that could not be read so far, and why.

    Raises:
        RunFolderError: ``root`` is not a run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: list[str] = []
        marker = root / MARKER
        try:
            values = read_json(resolve_inside(root, marker.name))
            self.run_id, self.created = values["run_id"], str(values.get("created", ""))[:_LONGEST_ID]
            self.format: Any = values.get("format")
            if not isinstance(self.run_id, str) or not 0 < len(self.run_id) <= _LONGEST_ID:
                raise ValueError("its run_id is not a name")
        except FileNotFoundError:
            raise RunFolderError(
                f"{root} is not a run folder (it has no {marker.name}); give the folder that was a render's output="
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{marker} cannot be read as the marker of a run folder: {error}") from None

    @property
    def is_sharded(self) -> bool:
        """Whether each story lies in ``sharding.shard_of`` its id."""
        return bool(self.format == SHARDED_RUN_FORMAT)

    @property
    def events_folder(self) -> Path:
        """Folder of the event files."""
        return self.root / "events"

    def stories(self) -> list[StoryFiles]:
        """All stories that have a folder, by id."""
        return [self.story(name) for name in self.story_ids()]

    def story_ids(self) -> list[str]:
        """Ids of all stories that have a folder, sorted."""
        return sorted(
            name
            for folder in self._story_folders()
            for name in self._names(folder)
            if self._is_folder(f"{folder}/{name}")
        )

    def stories_changed_at(self) -> int:
        """When a story came or went, as ``changed_at``."""
        return max(self.changed_at(folder) for folder in ("stories", *self._story_folders()))

    def story_path(self, story_id: str) -> str:
        """Path of the folder of a story, relative to the run folder."""
        return _story_path(story_id, self.is_sharded)

    def _story_folders(self) -> list[str]:
        """The folders that hold those of stories."""
        return [f"stories/{name}" for name in self._names("stories")] if self.is_sharded else ["stories"]

    def storyboard(self, name: str) -> dict[str, Any]:
        """The storyboard of one story as it was read; {} where it is not written yet or cannot be read."""
        storyboard = self._json(f"{self.story_path(name)}/storyboard.json")
        return storyboard if isinstance(storyboard, dict) else {}

    def changed_at(self, path: str) -> int:
        """When the file changed, or a name in the folder, in nanoseconds; -1 where it is not there.

        One operation: of what a link leads to, nothing but its time is seen.
        """
        try:
            return (self.root / path).stat().st_mtime_ns
        except OSError:
            return -1

    def story(self, name: str) -> StoryFiles:
        """What the folder of one story holds."""
        storyboard = self._json(f"{self.story_path(name)}/storyboard.json")
        records = {}
        for file in self._names(self.story_path(name)):
            if not re.fullmatch(r"shot_.+\.json", file):
                continue
            shot_id = file.removesuffix(".json")
            try:
                record = ShotRecord.from_json(read_json(resolve_inside(self.root, f"{self.story_path(name)}/{file}")))
                if (record.story_id, record.shot_id) != (name, shot_id):
                    raise DamagedRecord("it is the record of another shot")
                records[shot_id] = record
            except (OSError, ValueError, DamagedRecord) as error:
                self._leave_out(f"{self.story_path(name)}/{file}", error)
        video = None
        with contextlib.suppress(OSError):
            if resolve_inside(self.root, f"{self.story_path(name)}/story.mp4").is_file():
                video = f"{self.story_path(name)}/story.mp4"
        board = storyboard if isinstance(storyboard, dict) else {}
        return StoryFiles(story_id=name, storyboard=board, records=records, video=video)

    def newest_config(self) -> tuple[str, str]:
        """Hash and JSON text of the newest resolved configuration; empty strings when there is none."""
        files = []
        for name in self._names("config"):
            with contextlib.suppress(OSError):
                if name.endswith(".yaml"):
                    files.append(resolve_inside(self.root, f"config/{name}"))
        with contextlib.suppress(OSError, ValueError):
            if files:
                newest = max(files, key=lambda path: path.stat().st_mtime)
                return newest.stem, read_limited(newest, MAX_CONFIG_BYTES).decode()
        return "", ""

    @staticmethod
    def reference_path(story_id: str, shot_index: int, slot: int, *, is_sharded: bool = False) -> str:
        """Path of the copy of a picture that a storyboard gives, relative to the run folder.

        ``shot_index`` and ``slot`` are those of its keyframe; see ``artifacts.storyboard_copy``.
        """
        name = f"reference_{slot}" if shot_index < 0 else f"shot_{shot_index + 1:02d}_reference_{-slot}"
        return f"{_story_path(story_id, is_sharded)}/references/{name}.jpg"

    def clip_path(self, record: ShotRecord) -> str:
        """Path of the record's clip, relative to the run folder."""
        return self._attempt(record) + record.clip

    def keyframe_paths(self, record: ShotRecord) -> dict[int, str]:
        """Paths of the record's keyframes by slot."""
        return {keyframe.slot: self._attempt(record) + keyframe.file for keyframe in record.keyframes}

    def _attempt(self, record: ShotRecord) -> str:
        return f"{self.story_path(record.story_id)}/{record.shot_id}/attempts/{record.attempt_id}/"

    def _json(self, path: str) -> Any:
        """The contents of a JSON file inside; None if it is missing or left out."""
        try:
            return read_json(resolve_inside(self.root, path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._leave_out(path, error)
            return None

    def _names(self, folder: str) -> list[str]:
        try:
            return names_in(resolve_inside(self.root, folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            self._leave_out(folder, error)
            return []

    def _is_folder(self, path: str) -> bool:
        try:
            return resolve_inside(self.root, path).is_dir()
        except OSError as error:
            self._leave_out(path, error)
            return False

    def _leave_out(self, path: str, error: Exception) -> None:
        self.left_out.append(f"{path}: {str(error)[:300]}")


def _story_path(story_id: str, is_sharded: bool) -> str:
    return f"stories/{shard_of(story_id)}/{story_id}" if is_sharded else f"stories/{story_id}"


def parse_config(text: str) -> dict[str, Any]:
    """Return the values of a configuration's text; {} when it cannot be read."""
    with contextlib.suppress(ValueError):
        values = parse_json(text)
        if isinstance(values, dict):
            return values
    return {}
