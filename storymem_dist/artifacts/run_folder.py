"""The run folder: the single source of truth of a batch, shared by all its replicas, jobs and restarts.

    storymem_run.json                     marker: format, run id; a folder without it is used only if it is empty
    config/<config hash>.yaml             resolved configurations that were used
    stories/<story>/storyboard.json       the story as it was read
    stories/<story>/references/           small copies of its pictures, for reports (``storyboard_copy.py``)
    stories/<story>/<shot>/...            attempts and records (``shot_folder.py``)
    stories/<story>/<shot>.mp4, .json     the current clip and record of a shot
    stories/<story>/keyframes/            its current keyframes
    stories/<story>/story.mp4             the whole story
    leases/                               heartbeats and leases (``dispatch/leases.py``)
    failures/<story>.<shot>.<fp>.json     shots that failed, with reasons
    checkpoints/<story>/<shot>/           denoising states of running shots
    rerender/<story>.<shot>.<n>.json      forced re-renders; their number is the shot's generation
    requests/                             what people ask of the queue (``requests.py``)
    seeds/<name>.json                     seeds drawn where a negative one was given
    events/<writer>.jsonl, cache/         written by other modules
    STOP                                  made by a person or a script: all replicas stop after the running step
    stop.json                             how the last replica ended

Knows names and how to write files safely; does not decide what is rendered.
"""

import contextlib
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.requests import RequestLog
from storymem_dist.artifacts.sharding import RUN_FORMATS, SHARDED_RUN_FORMAT, format_for, shard_of
from storymem_dist.artifacts.shot_folder import ShotFolder
from storymem_dist.artifacts.storyboard_copy import write_storyboard
from storymem_dist.errors import RunFolderError, shown
from storymem_dist.files import (
    TEMPORARY_PREFIX,
    UnsafePath,
    canonical_json,
    create_exclusively,
    names_in,
    read_json,
    write_bytes,
)
from storymem_dist.story.schema import Story

MARKER = "storymem_run.json"
STOP_FILE = "STOP"

SMALL_FOLDERS = ("config", "seeds", "rerender")
"""Folders with a few files each, written at the start of jobs."""

# Names that a folder may hold before it becomes a run folder: launchers and people put them there.
_HARMLESS = {"logs", "STOP", "cache"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureRecord:
    """Why a shot could not be rendered.

    ``error_type`` is the exception's name. ``is_final``: False if the shot is retried automatically, with
    ``low_memory`` (after it ran out of memory). ``job_id``: the job in which it failed. ``details``: the stack trace.
    """

    story_id: str
    shot_id: str
    fingerprint: str
    reason: str
    error_type: str
    is_final: bool
    low_memory: bool
    job_id: str
    details: str = ""


class RunFolder:
    """Paths and safe operations of one run folder. Creating the object touches no file; ``open`` does."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._format: int | str | None = None

    @property
    def stories_folder(self) -> Path:
        """Folder of all stories."""
        return self.root / "stories"

    @property
    def leases_folder(self) -> Path:
        """Folder of leases and heartbeats."""
        return self.root / "leases"

    @property
    def failures_folder(self) -> Path:
        """Folder of failure marks."""
        return self.root / "failures"

    @property
    def events_folder(self) -> Path:
        """Folder of event files."""
        return self.root / "events"

    @property
    def cache_folder(self) -> Path:
        """Folder of values that can be computed again."""
        return self.root / "cache"

    @property
    def commits_folder(self) -> Path:
        """Folder of the notes of commits (``commit_log.py``)."""
        return self.cache_folder / "commits"

    @property
    def stop_file(self) -> Path:
        """The file whose appearance asks all replicas to stop."""
        return self.root / STOP_FILE

    @property
    def is_sharded(self) -> bool:
        """Whether stories lie in ``sharding.shard_of`` their names. Reads the marker, once it is there."""
        if self._format is None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                self._format = read_json(self.root / MARKER)["format"]
        return self._format == SHARDED_RUN_FORMAT

    def _place(self, folder: Path, name: str) -> Path:
        return folder / shard_of(name) / name if self.is_sharded else folder / name

    def story_folder(self, story_id: str) -> Path:
        """Folder of one story."""
        return self._place(self.stories_folder, story_id)

    def shot(self, story_id: str, shot_id: str) -> ShotFolder:
        """Attempts and records of one shot."""
        return ShotFolder(self.story_folder(story_id), shot_id)

    def story_video(self, story_id: str) -> Path:
        """Path of the video of a whole story."""
        return self.story_folder(story_id) / "story.mp4"

    def checkpoint(self, story_id: str, shot_id: str, fingerprint: str) -> Path:
        """Path of the denoising state of a running shot."""
        return self._place(self.root / "checkpoints", story_id) / shot_id / f"{fingerprint[:16]}.safetensors"

    def remove_checkpoints(self, story_id: str, shot_id: str, fingerprint: str) -> None:
        """Remove the checkpoints of a committed shot, half-written files too."""
        folder = self.checkpoint(story_id, shot_id, fingerprint).parent
        if folder.is_dir():
            for path in folder.glob(f"*{fingerprint[:16]}.*"):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: other fingerprints have checkpoints there
                folder.rmdir()

    def finish_commit(self, record: ShotRecord) -> None:
        """Do what follows the publishing of a record: update its views, remove its checkpoints and failure mark.

        Idempotent; any process may call it. Raises ``OSError``.
        """
        self.shot(record.story_id, record.shot_id).repair_views(record)
        self.remove_checkpoints(record.story_id, record.shot_id, record.fingerprint)
        self.remove_failure(record.story_id, record.shot_id, record.fingerprint)

    # -- the folder itself ---------------------------------------------------------------------------------------------

    def open(self, num_stories: int = 0) -> str:
        """Create the run folder, or check that it is one; return its run id. Several processes may do so at once.

        A new folder is made for a job of ``num_stories`` (see ``sharding``).
        Raises ``RunFolderError`` when it cannot be made, holds something else, or is of another format.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / MARKER).exists():
                self._refuse_foreign_folder()
                marker = {"format": format_for(num_stories), "run_id": secrets.token_hex(8), "created": _utc_now()}
                create_exclusively(self.root / MARKER, canonical_json(marker))
            for folder in (self.stories_folder, self.leases_folder, self.failures_folder, self.events_folder):
                folder.mkdir(exist_ok=True)
        except ValueError as error:  # a NUL byte, or half of a surrogate pair
            raise RunFolderError(f"output={shown(str(self.root))} cannot be a path: {error}") from None
        except OSError as error:
            where = "" if error.filename in (None, str(self.root)) else f"{error.filename}: "
            raise RunFolderError(
                f"output={self.root} cannot be used as a run folder: {where}{error.strerror or error}; "
                "it must be writable and on a file system with hard links"
            ) from error
        return self.run_id()

    def run_id(self) -> str:
        """Return the run's id from its marker. Raises ``RunFolderError`` when there is none or it cannot be used."""
        try:
            marker = read_json(self.root / MARKER)
            if marker["format"] not in RUN_FORMATS:
                raise RunFolderError(
                    f"{self.root} is a run folder of format {marker['format']!r}; this version works on "
                    + " and ".join(map(str, RUN_FORMATS))
                )
            return str(marker["run_id"])
        except FileNotFoundError:
            raise RunFolderError(f"{self.root} is not a run folder (it has no {MARKER})") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{self.root / MARKER} cannot be read as the marker of a run folder: {error}"
            ) from error

    def _refuse_foreign_folder(self) -> None:
        """Refuse a folder that holds files of somebody else. Empty folders are what a job leaves that lost its own."""
        named = [path for path in self.root.iterdir() if not path.name.startswith((TEMPORARY_PREFIX, ".hydra"))]
        foreign = sorted(path.name for path in named if path.name not in _HARMLESS and _holds_files(path))
        if foreign and not (self.root / MARKER).exists():  # another job may just have made it a run folder
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise RunFolderError(
                f"output={self.root} is not empty and not a run folder (no {MARKER}; it holds {shown}); "
                "give a new or empty folder, or the run folder of an earlier render"
            )

    def write_config(self, config_hash: str, text: str) -> None:
        """Write a resolved configuration under its hash unless it is there. Raises ``OSError``."""
        path = self.root / "config" / f"{config_hash}.yaml"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, text.encode())

    def write_storyboard(self, story: Story) -> None:
        """Write a story as it was read, with small copies of its images, if it is new or has changed.

        Raises ``OSError``.
        """
        write_storyboard(self.story_folder(story.story_id), story)

    # -- decisions that are made once per run --------------------------------------------------------------------------

    def drawn_seed(self, name: str) -> int:
        """Return the seed of ``name`` in this run, 0 to 2**31 - 1: drawn at the first call, then always the same."""
        path = self._seed_path(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            create_exclusively(path, canonical_json({"seed": secrets.randbelow(2**31)}))
        return self._read_seed(path)

    def known_seed(self, name: str) -> int | None:
        """Return the seed drawn for ``name`` in this run, or None. Draws none."""
        try:
            return self._read_seed(self._seed_path(name))
        except FileNotFoundError:
            return None

    @staticmethod
    def _read_seed(path: Path) -> int:
        value = _read_values(path, "it is drawn anew").get("seed")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise RunFolderError(f"{path} holds no seed; remove it, and it is drawn anew")
        return value

    def _seed_path(self, name: str) -> Path:
        return self._place(self.root / "seeds", f"{name}.json")

    def rerender(self, shots: Iterable[tuple[str, str]], request_id: str) -> None:
        """Increase the generation of each (story, shot) by one, once per ``request_id`` (a job with its restarts)."""
        folder = self.root / "rerender"
        folder.mkdir(exist_ok=True)
        for story_id, shot_id in shots:
            number = 1
            while True:
                path = folder / f"{story_id}.{shot_id}.{number}.json"
                made = create_exclusively(path, canonical_json({"request_id": request_id}))
                if made or _read_values(path, "the shot is rendered again").get("request_id") == request_id:
                    break
                number += 1

    def rerender_generations(self) -> dict[tuple[str, str], int]:
        """Return how often each (story, shot) was forced to be rendered again."""
        generations: dict[tuple[str, str], int] = {}
        for name in names_in(self.root / "rerender"):
            match = re.fullmatch(r"(.+)\.([^.]+)\.(\d+)\.json", name)
            if match:
                key = (match[1], match[2])
                generations[key] = max(generations.get(key, 0), int(match[3]))
        return generations

    def requests_before(self, job: str) -> int:
        """Return the number of the last request to the queue before ``job`` began (see ``RequestLog.number_before``).

        A folder that is no run folder yet has none. Raises ``RunFolderError`` when it cannot be used.
        """
        try:
            return RequestLog(self.root).number_before(job) if (self.root / MARKER).exists() else 0
        except (OSError, ValueError) as error:
            raise RunFolderError(f"output={shown(str(self.root))}: its requests cannot be read: {error}") from error

    # -- failures ------------------------------------------------------------------------------------------------------

    def write_failure(self, failure: FailureRecord) -> None:
        """Mark a shot as failed; replaces the mark of the same fingerprint. Raises ``OSError``."""
        path = self._failure_path(failure.story_id, failure.shot_id, failure.fingerprint)
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, canonical_json(asdict(failure)))

    def read_failure(self, story_id: str, shot_id: str, fingerprint: str) -> FailureRecord | None:
        """Return the failure mark of a shot, if there is one. A damaged mark counts as none and is removed.

        Raises ``OSError`` when it cannot be read.
        """
        path = self._failure_path(story_id, shot_id, fingerprint)
        try:
            failure = FailureRecord(**read_json(path))
            if all(type(getattr(failure, field.name)) is field.type for field in fields(FailureRecord)):
                return failure
        except FileNotFoundError:
            return None
        except (UnsafePath, ValueError, TypeError):
            pass
        with contextlib.suppress(IsADirectoryError):
            path.unlink(missing_ok=True)
        return None

    def remove_failure(self, story_id: str, shot_id: str, fingerprint: str) -> None:
        """Remove the failure mark of a shot, if there is one."""
        self._failure_path(story_id, shot_id, fingerprint).unlink(missing_ok=True)

    @staticmethod
    def failure_name(story_id: str, shot_id: str, fingerprint: str) -> str:
        """Name of a shot's failure mark, in one of ``failure_folders``."""
        return f"{story_id}.{shot_id}.{fingerprint[:16]}.json"

    def failure_folders(self) -> list[Path]:
        """Return the folders that hold failure marks, some of them perhaps empty."""
        folder = self.failures_folder
        return [folder / shard for shard in names_in(folder)] if self.is_sharded else [folder]

    def failure_names(self) -> set[str]:
        """Return the names of all failure marks."""
        return {name for folder in self.failure_folders() for name in names_in(folder)}

    def _failure_path(self, story_id: str, shot_id: str, fingerprint: str) -> Path:
        return self._place(self.failures_folder, self.failure_name(story_id, shot_id, fingerprint))

    # -- the end -------------------------------------------------------------------------------------------------------

    def write_outcome(self, state: str, **details: Any) -> None:
        """Write ``stop.json``: ``state`` is ``done``, ``stopped`` (resumable) or ``failed``."""
        write_bytes(self.root / "stop.json", canonical_json({"state": state, "written": time.time(), **details}))

    def remove_outcome(self) -> None:
        """Remove ``stop.json`` of an earlier job, so that it is not read as the end of this one.

        Raises ``RunFolderError`` when something else has that name or the folder cannot be written.
        """
        path = self.root / "stop.json"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be removed: {error.strerror or error}") from error


def _read_values(path: Path, then: str) -> dict[str, Any]:
    """The object in a small JSON file of a run folder.

    Raises ``FileNotFoundError``, and ``RunFolderError`` when it cannot be used; ``then`` says what removing it does.
    """
    try:
        values = read_json(path)
        if isinstance(values, dict):
            return values
        problem = f"it holds a {type(values).__name__}"
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        problem = str(error)
    raise RunFolderError(f"{path} cannot be used ({problem}); remove it, and {then}")


def _holds_files(path: Path, max_depth: int = 8) -> bool:
    """Whether ``path`` is anything but a folder of empty folders, ``max_depth`` levels at most."""
    if path.is_symlink() or not path.is_dir() or not max_depth:
        return True
    return any(_holds_files(inside, max_depth - 1) for inside in path.iterdir())


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
