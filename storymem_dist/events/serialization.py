"""Converts events to and from the lines of ``events/<writer>.jsonl`` in a run folder. Opens no files.

**The schema** (one object per line, UTF-8, schema version 1) is flat:

    {"schema": 1, "event": "StepFinished", "wall_time": 1764000000.123, "writer": "...", "replica": 0, "sequence": 17,
     "story_id": "ocean", "shot_id": "shot_01", "step": 3, "num_steps": 40, ...}

``event`` is the class name and every key after ``sequence`` is a field of that class, explained in its
docstring. ``wall_time`` is seconds since the Unix epoch, ``sequence`` counts from 0 without gaps within a writer.
A non-finite number is written as null (JSON has no NaN) and null in a plain ``float`` field reads as NaN.
Paths are relative to the run folder, with forward slashes.
"""

import dataclasses
import functools
import json
import math
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from storymem_dist.events.job_kinds import Event
from storymem_dist.events.kinds import EVENT_TYPES

SCHEMA_VERSION = 1

LAST_TIME = 253_402_300_800.0
"""Wall times lie before this one, the end of the year 9999: later ones have no date."""

_MAX_INT = 2**63 - 1
_STAMP: Mapping[str, type] = {"wall_time": float, "writer": str, "replica": int, "sequence": int}


@dataclass(frozen=True, kw_only=True, slots=True)
class StampedEvent:
    """An event and its origin: ``wall_time`` in seconds since the epoch, ``sequence`` gapless within ``writer``."""

    event: Event
    wall_time: float
    writer: str
    replica: int
    sequence: int


def event_to_dict(event: Event) -> dict[str, Any]:
    """Return ``{"event": class name, **fields}`` of JSON types only; non-finite numbers become None."""
    values: dict[str, Any] = {"event": type(event).__name__}
    for name in type(event).__dataclass_fields__:
        values[name] = json_ready(getattr(event, name))
    return values


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """Rebuild the event that ``event_to_dict`` wrote.

    Keys that the class does not have are ignored (a newer writer, or the stamp). Raises ``ValueError`` when the event's
    name is unknown, a required field is missing, or a value has the wrong type.
    """
    name = values.get("event")
    cls = EVENT_TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"event={name!r} is not an event; known are: {', '.join(EVENT_TYPES)}")
    fields = {}
    for field_name, hint in _hints(cls).items():
        if field_name in values:
            fields[field_name] = _typed(f"{name}.{field_name}", values[field_name], hint)
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"{name} is incomplete: {error}") from None


def stamped_to_json(stamped: StampedEvent) -> str:
    """Return ``stamped`` as one line of ``events/<writer>.jsonl``, without the newline."""
    values = {
        "schema": SCHEMA_VERSION,
        "event": "",
        "wall_time": round(stamped.wall_time, 6),
        "writer": stamped.writer,
        "replica": stamped.replica,
        "sequence": stamped.sequence,
        **event_to_dict(stamped.event),
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def stamped_from_json(line: str | bytes) -> StampedEvent:
    """Parse one line. Raises ``ValueError`` when it is incomplete, not of this schema, or not an event."""
    try:
        values = json.loads(line)
    except RecursionError:
        raise ValueError("a line of an event file is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"a line of an event file must be an object, not {type(values).__name__}")
    if values.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"schema={values.get('schema')!r} is not known; this version reads {SCHEMA_VERSION}")
    event = event_from_dict(values)
    try:
        stamp = {name: _typed(name, values[name], hint) for name, hint in _STAMP.items()}
    except KeyError as error:
        raise ValueError(f"the stamp of an event is incomplete: {error}") from None
    if not 0.0 <= stamp["wall_time"] < LAST_TIME or min(stamp["replica"], stamp["sequence"]) < 0:
        raise ValueError("the stamp of an event is out of range")
    return StampedEvent(event=event, **stamp)


def json_ready(value: Any) -> Any:
    """Return ``value`` as JSON types: mappings and iterables converted, non-finite numbers None, others text.

    Text is always valid UTF-8.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, Mapping):
        return {_encodable(str(key)): json_ready(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [json_ready(item) for item in value]
    return _encodable(str(value))


def _encodable(text: str) -> str:
    """``text`` with each character that UTF-8 cannot hold (from a file name of other bytes) as its escape."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


_HINTS: dict[type[Event], dict[str, Any]] = {}


def _hints(cls: type[Event]) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = {f.name: hint for f, hint in zip(dataclasses.fields(cls), _resolved(cls), strict=True)}
    return _HINTS[cls]


def _resolved(cls: type[Event]) -> list[Any]:
    hints = typing.get_type_hints(cls)
    return [hints[f.name] for f in dataclasses.fields(cls)]


def _typed(where: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against the field's annotation and convert lists to tuples and ints to floats."""
    origin, arguments = _parts(hint)
    if origin is typing.Union:
        return None if value is None else _typed(where, value, arguments[0])
    if hint is float:
        if value is None:
            return math.nan
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT:
            return value
    elif hint is str:
        if isinstance(value, str):
            return _encodable(value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_typed(where, item, arguments[0]) for item in value)
    elif isinstance(value, Mapping):
        return {_encodable(str(key)): _typed(where, item, arguments[1]) for key, item in value.items()}
    raise ValueError(f"{where}={reprlib.repr(value)} has the wrong type or is out of range; it must be {hint}")


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Origin and arguments of an annotation; of ``X | None``: Union and X alone."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return typing.Union, tuple(option for option in arguments if option is not types.NoneType)
    return origin, arguments
