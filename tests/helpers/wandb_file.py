"""Read the files of an offline W&B run: LevelDB log framing around protobuf records."""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from storymem_dist.events import MemoryDecided
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.run.state import RunState

BLOCK_SIZE = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """One segment of a run, as its ``.wandb`` file has it."""

    folder: Path
    run_id: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def series(self, key: str) -> list[Any]:
        """All values logged for ``key``, in order."""
        return [row[key] for row in self.history if key in row]

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the newest table logged for ``key``."""
        entry = self.series(key)[-1]
        value = json.loads((self.folder / "files" / entry["path"]).read_text(encoding="utf-8"))
        return value["columns"], value["data"]


def read_segments(wandb_folder: Path) -> list[WandbRun]:
    """All offline segments in a run folder's ``wandb`` folder, oldest first."""
    return [_read(folder) for folder in sorted(wandb_folder.glob("offline-run-*"))]


def memory_rows_of_events(run_folder: Path) -> list[list[Any]]:
    """What the ``memory_frames`` table must hold between its first column (the picture) and its last (the time)."""
    state, events = RunState(), read_journal(run_folder / "events")
    for stamped in events:
        state.apply(stamped)
    rows = []
    for event in (state.with_scores(stamped.event) for stamped in events if isinstance(stamped.event, MemoryDecided)):
        source = "reference" if event.source_shot_index < 0 else f"shot_{event.source_shot_index + 1:02d}"
        where = [event.story_id, event.shot_id, event.verdict, source, event.source_frame_index]
        scores = [event.similarity, event.bank_similarity, event.against, event.quality]
        rows.append([*where, event.slot, event.position, *scores, event.why])
    return sorted(rows, key=repr)


def _read(folder: Path) -> WandbRun:
    (path,) = folder.glob("*.wandb")
    run = WandbRun(folder=folder)
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project, run.group = record.run.run_id, record.run.project, record.run.run_group
            run.tags = list(record.run.tags)
            run.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "config":
            run.config.update({item.key: json.loads(item.value_json) for item in record.config.update})
        elif kind == "history":
            run.history.append(_row(record.history.item))
        elif kind == "metric":
            run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "summary":
            run.summary.update(_row(record.summary.update))
        elif kind == "exit":
            run.finished = True
    return run


def _row(items: Any) -> dict[str, Any]:
    """Values by key; media and tables are stored field by field and become dictionaries again."""
    row: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = row
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return row


def _records(data: bytes) -> Iterator[Any]:
    assert data[:4] == b":W&B", data[:7]
    position, message = 7, b""
    while position < len(data):
        left = BLOCK_SIZE - position % BLOCK_SIZE
        if left < 7:
            position += left
            continue
        checksum, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if size == 0 and kind == 0:
            return
        part = data[position + 7 : position + 7 + size]
        position += 7 + size
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF
        message = part if kind in (FULL, FIRST) else message + part
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
