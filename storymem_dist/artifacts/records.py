"""The record of a committed shot: its inputs, what the memory decided, and the files of the result.

A record is one JSON file. Except for ``timing`` and ``host`` it depends on the shot's inputs and pixels alone: two
undisturbed runs write the same bytes. A checksum in ``host`` covers the whole record, so a changed bit is found;
records of earlier versions have none. Knows the schema and how to check a record against its files, not where records
are.
"""

import hashlib
import re
import reprlib
import stat
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from storymem_dist.files import canonical_json, file_digest, quick_digest

RECORD_FORMAT = 1

RUN_FORMAT = 1
"""Format of a run folder, written in its marker."""

_CHECKSUM = "checksum"
_MAX_NUMBER = 2**63 - 1
_NAME = re.compile(r"[^/\x00.][^/\x00]*")
"""Names of files, shots and stories: no path, not hidden."""


class DamagedRecord(Exception):
    """A record cannot be used: it is not JSON or not complete, or its files are missing or changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file of a shot: its size, and the SHA-256 of its content in hex digits."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKeyframe:
    """A keyframe that the shot added to the memory bank: its number (``slot``), its frame in the clip, its PNG file."""

    slot: int
    frame_index: int
    file: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotRecord:
    """One committed shot.

    ``kind`` is the base model (``t2v`` or ``m2v``), ``mode`` how it was conditioned (``t2v``, ``m2v``, ``mi2v``,
    ``mm2v``). ``num_frames`` counts the saved clip (without given frames). ``memory`` holds what the memory decided, as
    JSON (``recalled``: which keyframes the shot saw and why; ``decisions``: which frames were kept, duplicate or
    dropped, with scores). ``inputs`` are all inputs of ``fingerprint``, ``predecessor`` is the fingerprint of the shot
    before, the joint one of all that it needs, or None where it needs nothing. ``files`` maps names in the attempt's
    folder to size and content; ``clip`` and ``tail`` (the last frames, in order) are names among them. ``clip_sample``
    is the ``quick_digest`` of the clip; None in records of earlier versions. ``own``: what the storyboard sets for this
    shot alone, as JSON; not written where it sets nothing.

    ``timing``: seconds per stage and when it was committed. ``host``: attempt, machine, versions. Both may differ
    between equal runs.
    """

    story_id: str
    shot_id: str
    shot_index: int
    scene_num: int
    index_in_scene: int
    prompt: str
    cut: bool
    kind: str
    mode: str
    seed: int
    num_frames: int
    height: int
    width: int
    fps: int
    clip: str
    keyframes: tuple[StoredKeyframe, ...]
    tail: tuple[str, ...]
    memory: Mapping[str, Any]
    inputs: Mapping[str, Any]
    fingerprint: str
    predecessor: str | None
    config_hash: str
    files: Mapping[str, StoredFile]
    timing: Mapping[str, Any]
    host: Mapping[str, Any]
    clip_sample: str | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attempt_id(self) -> str:
        """Name of the attempt's folder, which holds the files of this record."""
        return str(self.host["attempt_id"])

    def to_json(self) -> bytes:
        """Return the canonical JSON text."""
        value = {"format": RECORD_FORMAT, **asdict(self)}
        if not self.own:
            del value["own"]
        return canonical_json({**value, "host": {**self.host, _CHECKSUM: _checksum(value)}})

    @classmethod
    def from_json(cls, value: Any) -> "ShotRecord":
        """Rebuild a record from parsed JSON of any origin.

        Raises ``DamagedRecord`` when something is missing, has another type or changed since it was written.
        """
        if not isinstance(value, dict):
            raise DamagedRecord(f"it holds a {type(value).__name__}, not an object")
        if value.get("format") != RECORD_FORMAT:
            raise DamagedRecord(f"format={reprlib.repr(value.get('format'))}; this version reads {RECORD_FORMAT}")
        missing = sorted(_required() - set(value))
        if missing:
            raise DamagedRecord(f"it lacks {', '.join(missing)}")
        parts = {part.name: value[part.name] for part in fields(cls) if part.name in value}
        try:
            parts["keyframes"] = tuple(StoredKeyframe(**keyframe) for keyframe in parts["keyframes"])
            parts["files"] = {str(name): StoredFile(**stored) for name, stored in parts["files"].items()}
            parts["tail"] = tuple(parts["tail"])
            record = cls(**parts)
            for part in (record, *record.keyframes, *record.files.values()):
                _check_types(part)
            if not all(isinstance(name, str) for name in record.tail):
                raise TypeError("tail")
            named = {record.clip, *record.tail, *(keyframe.file for keyframe in record.keyframes)}
            if not named <= set(record.files):
                raise DamagedRecord(f"it names files without size: {', '.join(sorted(named - set(record.files)))}")
            names = (*record.files, record.attempt_id, record.story_id, record.shot_id)
            if not all(_NAME.fullmatch(name) for name in names):
                raise DamagedRecord("it names files outside its folder")
        except (TypeError, AttributeError, KeyError) as error:
            raise DamagedRecord(f"a part has the wrong type: {str(error)[:200]}") from error
        return replace(record, host=_checked_host(value))

    def check_files(self, folder: Path, *, contents: bool) -> None:
        """Raise ``DamagedRecord`` unless every file is in ``folder`` with its size (``contents``: and its hash).

        Without ``contents`` a sample of the clip is compared, which finds most damage in milliseconds. (Images are
        compared when they are read.)
        """
        for name, stored in self.files.items():
            path = folder / name
            try:
                found = path.lstat()
                if not stat.S_ISREG(found.st_mode):
                    raise DamagedRecord(f"{name} is a link or not a regular file")
                if found.st_size != stored.num_bytes:
                    raise DamagedRecord(f"{name} has {found.st_size} bytes instead of {stored.num_bytes}")
                if contents and file_digest(path) != stored.sha256:
                    raise DamagedRecord(f"the contents of {name} have changed")
                if name == self.clip and self.clip_sample not in (None, quick_digest(path)):
                    raise DamagedRecord(f"the contents of {name} have changed")
            except (FileNotFoundError, NotADirectoryError):
                raise DamagedRecord(f"{name} is missing") from None


def _required() -> set[str]:
    """The fields that every version writes."""
    return {part.name for part in fields(ShotRecord) if part.default is MISSING and part.default_factory is MISSING}


def _checksum(value: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its checksum, in hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _checked_host(value: Mapping[str, Any]) -> dict[str, Any]:
    """``host`` of a record without its checksum, which must match. Only records of an earlier version have none."""
    host = {key: part for key, part in value["host"].items() if key != _CHECKSUM}
    if _CHECKSUM not in value["host"]:
        known = {"format", *_required()}
        if unknown := sorted(set(value) - known):
            raise DamagedRecord(f"it lacks its checksum and has {', '.join(unknown)[:200]}")
    elif value["host"][_CHECKSUM] != _checksum({**value, "host": host}):
        raise DamagedRecord("its checksum does not match: it has changed since it was written")
    return host


def _check_types(part: Any) -> None:
    """Raise ``TypeError`` unless the fields of ``part`` have the types of their annotations (containers: outside)."""
    of: Any = type(part)
    for name, kinds in _kinds(of).items():
        value = getattr(part, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{name} is a {type(value).__name__}")
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise TypeError(f"{name} is out of range")


@cache
def _kinds(of: type) -> dict[str, tuple[type, ...]]:
    """What the fields of a class may hold: a report reads thousands of records, and the look at hints is slow."""
    kinds = {}
    for name, hint in typing.get_type_hints(of).items():
        allowed = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
        kinds[name] = tuple(typing.get_origin(kind) or kind for kind in allowed)
    return kinds


def describe_file(path: Path) -> StoredFile:
    """Return size and hash of a finished file. Raises ``OSError``."""
    return StoredFile(num_bytes=path.stat().st_size, sha256=file_digest(path))
