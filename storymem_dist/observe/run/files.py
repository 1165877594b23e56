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
from storymem_dist.errors import RunFolderError
from storymem_dist.files import names_in, parse_json, read_json, read_limited, resolve_inside

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
        marker = root / "storymem_run.json"
        try:
            values = read_json(resolve_inside(root, marker.name))
            self.run_id, self.created = values["run_id"], str(values.get("created", ""))[:_LONGEST_ID]
            if not isinstance(self.run_id, str) or not 0 < len(self.run_id) <= _LONGEST_ID:
                raise ValueError("its run_id is not a name")
        except FileNotFoundError:
            raise RunFolderError(
                f"{root} is not a run folder (it has no {marker.name}); give the folder that was a render's output="
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{marker} cannot be read as the marker of a run folder: {error}") from None

    @property
    def events_folder(self) -> Path:
        """Folder of the event files."""
        return self.root / "events"

    def stories(self) -> list[StoryFiles]:
        """All stories that have a folder, by id."""
        return [self._story(name) for name in self._names("stories") if self._is_folder(f"stories/{name}")]

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
    def reference_path(story_id: str, shot_index: int, slot: int) -> str:
        """Path of the copy of a picture that a storyboard gives, relative to the run folder.

        ``shot_index`` and ``slot`` are those of its keyframe; see ``artifacts.storyboard_copy``.
        """
        name = f"reference_{slot}" if shot_index < 0 else f"shot_{shot_index + 1:02d}_reference_{-slot}"
        return f"stories/{story_id}/references/{name}.jpg"

    def clip_path(self, record: ShotRecord) -> str:
        """Path of the record's clip, relative to the run folder."""
        return self._attempt(record) + record.clip

    def keyframe_paths(self, record: ShotRecord) -> dict[int, str]:
        """Paths of the record's keyframes by slot."""
        return {keyframe.slot: self._attempt(record) + keyframe.file for keyframe in record.keyframes}

    @staticmethod
    def _attempt(record: ShotRecord) -> str:
        return f"stories/{record.story_id}/{record.shot_id}/attempts/{record.attempt_id}/"

    def _story(self, name: str) -> StoryFiles:
        storyboard = self._json(f"stories/{name}/storyboard.json")
        records = {}
        for file in self._names(f"stories/{name}"):
            if not re.fullmatch(r"shot_.+\.json", file):
                continue
            shot_id = file.removesuffix(".json")
            try:
                record = ShotRecord.from_json(read_json(resolve_inside(self.root, f"stories/{name}/{file}")))
                if (record.story_id, record.shot_id) != (name, shot_id):
                    raise DamagedRecord("it is the record of another shot")
                records[shot_id] = record
            except (OSError, ValueError, DamagedRecord) as error:
                self._leave_out(f"stories/{name}/{file}", error)
        video = None
        with contextlib.suppress(OSError):
            if resolve_inside(self.root, f"stories/{name}/story.mp4").is_file():
                video = f"stories/{name}/story.mp4"
        board = storyboard if isinstance(storyboard, dict) else {}
        return StoryFiles(story_id=name, storyboard=board, records=records, video=video)

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


def parse_config(text: str) -> dict[str, Any]:
    """Return the values of a configuration's text; {} when it cannot be read."""
    with contextlib.suppress(ValueError):
        values = parse_json(text)
        if isinstance(values, dict):
            return values
    return {}
