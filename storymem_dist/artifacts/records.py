"""The record of a committed shot: its inputs, what the memory decided, and the files of the result.

A record is one JSON file. Except for ``timing`` and ``host`` it depends on the shot's inputs and pixels alone: two
undisturbed runs write the same bytes. Knows the schema and how to check a record against its files, not where records
are.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.fingerprint import file_digest
from storymem_dist.files import canonical_json

RECORD_FORMAT = 1


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
    before. ``files`` maps names in the attempt's folder to size and content; ``clip`` and ``tail`` (the last frames, in
    order) are names among them.

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

    @property
    def attempt_id(self) -> str:
        """Name of the attempt's folder, which holds the files of this record."""
        return str(self.host["attempt_id"])

    def to_json(self) -> bytes:
        """Return the canonical JSON text."""
        return canonical_json({"format": RECORD_FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, value: Any) -> "ShotRecord":
        """Rebuild a record from parsed JSON. Raises ``DamagedRecord`` when something is missing or has another type."""
        if not isinstance(value, dict):
            raise DamagedRecord(f"it holds a {type(value).__name__}, not an object")
        if value.get("format") != RECORD_FORMAT:
            raise DamagedRecord(f"format={value.get('format')!r}; this version reads {RECORD_FORMAT}")
        missing = sorted({field.name for field in fields(cls)} - set(value))
        if missing:
            raise DamagedRecord(f"it lacks {', '.join(missing)}")
        parts = {field.name: value[field.name] for field in fields(cls)}
        try:
            parts["keyframes"] = tuple(StoredKeyframe(**keyframe) for keyframe in parts["keyframes"])
            parts["files"] = {str(name): StoredFile(**stored) for name, stored in parts["files"].items()}
            parts["tail"] = tuple(map(str, parts["tail"]))
            record = cls(**parts)
            named = {record.clip, *record.tail, *(keyframe.file for keyframe in record.keyframes)}
            if not named <= set(record.files):
                raise DamagedRecord(f"it names files without size: {', '.join(sorted(named - set(record.files)))}")
            if any("/" in name or name.startswith(".") for name in (*record.files, record.attempt_id)):
                raise DamagedRecord("it names files outside its folder")
        except (TypeError, AttributeError, KeyError) as error:
            raise DamagedRecord(f"a part has the wrong type: {error}") from error
        return record

    def check_files(self, folder: Path, *, contents: bool) -> None:
        """Raise ``DamagedRecord`` unless every file is in ``folder`` with its size (``contents``: and its hash)."""
        for name, stored in self.files.items():
            try:
                num_bytes = (folder / name).stat().st_size
                if num_bytes != stored.num_bytes:
                    raise DamagedRecord(f"{name} has {num_bytes} bytes instead of {stored.num_bytes}")
                if contents and file_digest(folder / name) != stored.sha256:
                    raise DamagedRecord(f"the contents of {name} have changed")
            except FileNotFoundError:
                raise DamagedRecord(f"{name} is missing") from None


def describe_file(path: Path) -> StoredFile:
    """Return size and hash of a finished file. Raises ``OSError``."""
    return StoredFile(num_bytes=path.stat().st_size, sha256=file_digest(path))
