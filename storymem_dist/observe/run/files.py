"""A read-only view of a run folder: its id, storyboards and current records. Never loads torch.

Works on a folder that is being written and on a damaged one: what cannot be read is left out. Knows no events.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord
from storymem_dist.errors import RunFolderError


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryFiles:
    """What the folder of one story holds: the storyboard as it was read ({} if not yet) and the records by shot id."""

    story_id: str
    storyboard: dict[str, Any]
    records: dict[str, ShotRecord]
    video: str | None


class RunFiles:
    """Read access to the run folder at ``root``.

    Raises:
        RunFolderError: ``root`` is not a run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        marker = root / "storymem_run.json"
        try:
            values = json.loads(marker.read_text(encoding="utf-8"))
            self.run_id = str(values["run_id"])
            self.created = str(values.get("created", ""))
        except FileNotFoundError:
            raise RunFolderError(
                f"{root} is not a run folder (it has no {marker.name}); give the folder that was a render's output="
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{marker} cannot be read as the marker of a run folder: {error}") from None

    @property
    def events_folder(self) -> Path:
        """Folder of the event files."""
        return self.root / "events"

    def stories(self) -> list[StoryFiles]:
        """All stories that have a folder, by id."""
        folders = sorted(path for path in (self.root / "stories").glob("*") if path.is_dir())
        return [self._story(folder) for folder in folders]

    def newest_config(self) -> tuple[str, str]:
        """Hash and YAML text of the newest resolved configuration; empty strings when there is none."""
        with contextlib.suppress(OSError):
            files = sorted((self.root / "config").glob("*.yaml"), key=lambda path: path.stat().st_mtime)
            if files:
                return files[-1].stem, files[-1].read_text(encoding="utf-8")
        return "", ""

    def clip_path(self, record: ShotRecord) -> str:
        """Path of the record's clip, relative to the run folder."""
        return self._attempt(record) + record.clip

    def keyframe_paths(self, record: ShotRecord) -> dict[int, str]:
        """Paths of the record's keyframes by slot."""
        return {keyframe.slot: self._attempt(record) + keyframe.file for keyframe in record.keyframes}

    @staticmethod
    def _attempt(record: ShotRecord) -> str:
        return f"stories/{record.story_id}/{record.shot_id}/attempts/{record.attempt_id}/"

    def _story(self, folder: Path) -> StoryFiles:
        storyboard: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            read = json.loads((folder / "storyboard.json").read_text(encoding="utf-8"))
            storyboard = read if isinstance(read, dict) else {}
        records = {}
        for path in sorted(folder.glob("shot_*.json")):
            with contextlib.suppress(OSError, ValueError, DamagedRecord):
                records[path.stem] = ShotRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
        video = f"stories/{folder.name}/story.mp4" if (folder / "story.mp4").is_file() else None
        return StoryFiles(story_id=folder.name, storyboard=storyboard, records=records, video=video)
