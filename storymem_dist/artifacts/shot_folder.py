"""One shot on disk: attempts, published records, and the views that people open.

    <shot>/attempts/<attempt>/{clip.mp4, keyframe_<slot>.png, tail_<n>.png, record.json}
    <shot>/records/<first 16 digits of the fingerprint>.json      exclusive hard link of one attempt's record.json
    <shot>.mp4  <shot>.json  keyframes/<shot>_<slot>.png          hard links to the current files, repaired on demand

An attempt writes its files first and its record last; publishing is one ``link`` that fails when the name is taken. So
each fingerprint is committed exactly once, even if processes die or resume late. Knows nothing of leases or rendering.
"""

import contextlib
import hashlib
import io
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord, StoredFile, describe_file
from storymem_dist.artifacts.video import VideoSettings, read_png, write_clip, write_png
from storymem_dist.errors import RunFolderError
from storymem_dist.files import (
    MAX_JSON_BYTES,
    UnsafePath,
    fsync_folder,
    link_or_replace,
    names_in,
    parse_json,
    publish_exclusively,
    read_json,
    read_limited,
    write_bytes,
)

_RECORD_NAME = re.compile(r"[0-9a-f]{16}\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFiles:
    """The pixels that an attempt saves.

    ``clip``: uint8 ``[F, 3, H, W]``; ``keyframes``: (slot, frame index, uint8 ``[3, H, W]``); ``tail``: uint8
    ``[n, 3, H, W]``, the clip's last frames in order.
    """

    clip: Tensor
    keyframes: Sequence[tuple[int, int, Tensor]]
    tail: Tensor
    fps: int


class ShotFolder:
    """Attempts, records and views of one shot of one story."""

    def __init__(self, story_folder: Path, shot_id: str) -> None:
        self.shot_id = shot_id
        self._story_folder = story_folder
        self.folder = story_folder / shot_id
        self._attempts = self.folder / "attempts"
        self._records = self.folder / "records"

    def attempt_folder(self, attempt_id: str) -> Path:
        """Folder of one attempt's files."""
        return self._attempts / attempt_id

    def files_of(self, record: ShotRecord) -> Path:
        """Folder that holds the files of ``record``."""
        return self.attempt_folder(record.attempt_id)

    # -- writing -------------------------------------------------------------------------------------------------------

    def save_attempt(
        self, attempt_id: str, files: ClipFiles, settings: VideoSettings, check: Callable[[], None] = lambda: None
    ) -> Mapping[str, StoredFile]:
        """Write the files of an attempt into its own folder; return their sizes and hashes. Raises ``OSError``.

        They are durable once the attempt's record is written, which flushes the folder. ``check`` is called before
        every frame and image; an exception from it ends the writing.
        """
        folder = self.attempt_folder(attempt_id)
        folder.mkdir(parents=True)
        write_clip(folder / "clip.mp4", files.clip, files.fps, settings, check)
        for slot, _, image in files.keyframes:
            check()
            write_png(folder / keyframe_name(slot), image)
        for number, image in enumerate(files.tail):
            check()
            write_png(folder / tail_name(number), image)
        return {name: describe_file(folder / name) for name in names_in(folder)}

    def publish(self, record: ShotRecord, *, may_publish: Callable[[], bool]) -> bool:
        """Write the attempt's record and publish it under its fingerprint; return whether that succeeded.

        ``may_publish`` is called just before. If it returns False, or another attempt was published first, this
        attempt's folder is removed. Raises ``OSError``.
        """
        own = self.files_of(record) / "record.json"
        write_bytes(own, record.to_json())
        self._records.mkdir(exist_ok=True)
        fsync_folder(self.folder)
        if may_publish() and publish_exclusively(own, self._record_path(record.fingerprint)):
            return True
        self.discard_attempt(record.attempt_id)
        return False

    def discard_attempt(self, attempt_id: str) -> None:
        """Remove an attempt unless a record names it.

        Removes its ``record.json`` first, so that its owner, if still alive, can no longer publish it. If it was
        published before that, puts ``record.json`` back and removes nothing else. Raises ``OSError`` where a record
        cannot be read, which may be the one that names it.
        """
        folder = self.attempt_folder(attempt_id)
        own = folder / "record.json"
        with contextlib.suppress(FileNotFoundError):
            own.unlink()
        for name in self.record_names():
            if _attempt_of(self._records / name) == attempt_id:
                publish_exclusively(self._records / name, own)
                return
        shutil.rmtree(folder, ignore_errors=True)

    def discard_orphans(self, fingerprint: str) -> list[str]:
        """Remove all attempts at ``fingerprint`` that no record names; return their ids.

        Only for the holder of the shot's lease, or after its commit: then no other attempt can be published.
        """
        attempts = [name for name in names_in(self._attempts) if name.startswith(f"{fingerprint[:16]}-")]
        current = _attempt_of(self._record_path(fingerprint))
        orphans = [name for name in attempts if name != current]
        for attempt_id in orphans:
            self.discard_attempt(attempt_id)
        return orphans

    # -- reading -------------------------------------------------------------------------------------------------------

    def record_names(self) -> list[str]:
        """Return the file names of all published records."""
        return [name for name in names_in(self._records) if _RECORD_NAME.fullmatch(name)]

    def is_committed(self, fingerprint: str) -> bool:
        """Whether a record is published for ``fingerprint``. Looks at the name only."""
        return self._record_path(fingerprint).exists()

    def read_record(
        self, fingerprint: str, *, check_contents: bool = False, set_aside: bool = True
    ) -> ShotRecord | None:
        """Return the published record of ``fingerprint`` after checking its files, or None.

        Raises ``DamagedRecord`` after it has set aside an unusable record; the shot then counts as not rendered. With
        ``set_aside=False`` nothing is written: the damaged record stays where it is.
        """
        path = self._record_path(fingerprint)
        data = None
        try:
            data = read_limited(path, MAX_JSON_BYTES)
            record = _parse(data)
            if record.fingerprint != fingerprint:
                raise DamagedRecord(f"it is of fingerprint {record.fingerprint!r}")
            record.check_files(self.files_of(record), contents=check_contents)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (DamagedRecord, UnsafePath) as damage:
            if not set_aside:
                raise DamagedRecord(f"the record {path} cannot be used: {damage}") from damage
            self._set_aside(path, data)
            raise DamagedRecord(f"the record {path} was set aside: {damage}") from damage
        return record

    def require_record(self, fingerprint: str, *, check_contents: bool = False) -> ShotRecord:
        """Return the record of a committed shot. Raises ``DamagedRecord`` when it is unusable or gone."""
        record = self.read_record(fingerprint, check_contents=check_contents)
        if record is None:
            raise DamagedRecord(f"the record {self._record_path(fingerprint)} has disappeared")
        return record

    def read_images(
        self, record: ShotRecord, *, keyframes: bool = True, tail: bool = True
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the keyframes' images, uint8 ``[3, H, W]``, and the tail, uint8 ``[n, 3, H, W]``, of a record.

        Reads only what is wanted. If an image cannot be decoded, sets the record aside and raises ``DamagedRecord``.
        """
        try:
            images = [self._read_image(record, kept.file) for kept in record.keyframes if keyframes]
            end = [self._read_image(record, name) for name in record.tail if tail]
        except (RunFolderError, DamagedRecord) as error:
            path = self._record_path(record.fingerprint)
            with contextlib.suppress(OSError):
                self._set_aside(path, read_limited(path, MAX_JSON_BYTES))
            raise DamagedRecord(f"the record {path} was set aside: {error}") from error
        return images, torch.stack(end) if end else None

    def _read_image(self, record: ShotRecord, name: str) -> Tensor:
        """One image of a record; its bytes are compared with the hash. Raises ``DamagedRecord``, ``RunFolderError``."""
        path, stored = self.files_of(record) / name, record.files[name]
        try:
            data = read_limited(path, stored.num_bytes)
        except (FileNotFoundError, NotADirectoryError, UnsafePath) as error:
            raise DamagedRecord(f"{name} cannot be used: {error.strerror or error}") from None
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            raise DamagedRecord(f"the contents of {name} have changed")
        return read_png(io.BytesIO(data), name=path)

    def newest_other_record(self, fingerprint: str) -> ShotRecord | None:
        """Return the latest record of another fingerprint, or None: its inputs show what changed."""
        others = []
        for name in self.record_names():
            if name != self._record_path(fingerprint).name:
                with contextlib.suppress(OSError, ValueError, DamagedRecord):
                    others.append(ShotRecord.from_json(read_json(self._records / name)))
        return max(others, key=_committed_at, default=None)

    # -- views ---------------------------------------------------------------------------------------------------------

    def repair_views(self, record: ShotRecord) -> None:
        """Link the files that people open to those of ``record``, where they are not yet. Raises ``OSError``."""
        files = self.files_of(record)
        link_or_replace(files / record.clip, self._story_folder / f"{self.shot_id}.mp4")
        link_or_replace(self._record_path(record.fingerprint), self._story_folder / f"{self.shot_id}.json")
        views = self._story_folder / "keyframes"
        views.mkdir(exist_ok=True)
        wanted = {f"{self.shot_id}_{keyframe.slot}.png": keyframe.file for keyframe in record.keyframes}
        for name, file in wanted.items():
            link_or_replace(files / file, views / name)
        for name in names_in(views):
            if name not in wanted and re.fullmatch(rf"{re.escape(self.shot_id)}_\d+\.png", name):
                (views / name).unlink(missing_ok=True)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _record_path(self, fingerprint: str) -> Path:
        return self._records / f"{fingerprint[:16]}.json"

    def _set_aside(self, path: Path, data: bytes | None) -> None:
        """Rename the bad record that holds ``data``, unless another process has replaced it in the meantime.

        Compares contents, not inode numbers, which a file system may reuse at once. None: it cannot be read.
        """
        aside = path.with_name(f"{path.stem}.damaged-{secrets.token_hex(4)}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        if data is not None and read_limited(aside, MAX_JSON_BYTES) != data:
            publish_exclusively(aside, path)
            aside.unlink()


def _attempt_of(record: Path) -> str | None:
    """The attempt that a record names; None where it is missing or damaged. Raises ``OSError`` otherwise."""
    try:
        return ShotRecord.from_json(read_json(record)).attempt_id
    except (FileNotFoundError, NotADirectoryError, UnsafePath, ValueError, DamagedRecord):
        return None


def _committed_at(record: ShotRecord) -> float:
    value = record.timing.get("committed_at")
    return float(value) if isinstance(value, int | float) else 0.0


def new_attempt_id(fingerprint: str, owner: str) -> str:
    """Return a fresh attempt id; it begins with the fingerprint's first 16 digits."""
    return f"{fingerprint[:16]}-{owner}-{secrets.token_hex(3)}"


def keyframe_name(slot: int) -> str:
    """File name of a keyframe in an attempt's folder."""
    return f"keyframe_{slot}.png"


def tail_name(number: int) -> str:
    """File name of one of the clip's last frames in an attempt's folder."""
    return f"tail_{number}.png"


def _parse(data: bytes) -> ShotRecord:
    try:
        return ShotRecord.from_json(parse_json(data))
    except ValueError as error:
        raise DamagedRecord(f"it is not JSON: {error}") from error
