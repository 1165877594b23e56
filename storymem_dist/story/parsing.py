"""Turns a storyboard file into plain data: dicts, lists, text, numbers, truth values.

Reads JSON, JSON5 and YAML in bounded time, whatever the file is (garbage, a device, ten gigabytes, a YAML bomb), and
reports what is wrong with it. Knows nothing about the required content of a storyboard.
"""

import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path

import json5
import yaml

from storymem_dist.errors import StoryboardError

STORYBOARD_SUFFIXES = (".json", ".json5", ".yaml", ".yml")

MAX_FILE_BYTES = 2**20
"""A storyboard is a few kilobytes; all thirty of ST-Bench together are 150 KB."""

MAX_JSON5_CHARACTERS = 32 * 2**10
"""The json5 package reads 10 to 35 kB per second. Comments and trailing commas, the usual JSON5, do not need it."""

MAX_DEPTH = 32
"""Nesting allowed in YAML, whose C composer would overflow the stack; the JSON parsers guard themselves."""

# libyaml is about thirty times faster than the Python loader; both are safe loaders.
_SafeYamlLoader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# An unterminated string or comment runs to the end of the text, so that no start is scanned twice.
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)' + r"|'[^'\\]*+(?:\\.[^'\\]*+)*+(?:'|\Z)"
_STRING_OR_COMMENT = re.compile(_STRING + r"|//[^\n\r]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_STRING_OR_TRAILING_COMMA = re.compile(_STRING + r"|,(?=\s*[\]}])", re.DOTALL)
_JSON5_POSITION = re.compile(r"<string>:(\d+) (.*?)(?: at column (\d+))?\Z", re.DOTALL)


class _Unreadable(Exception):
    """What is wrong with a document; the caller adds the file."""


def parse_document(path: Path) -> object:
    """Read ``path`` by its suffix and return its plain data.

    Raises ``StoryboardError`` naming the file when it is not a readable, regular UTF-8 file of at most
    ``MAX_FILE_BYTES`` in one of ``STORYBOARD_SUFFIXES``, or not valid in its format.
    """
    suffix = path.suffix.lower()
    if suffix not in STORYBOARD_SUFFIXES:
        raise StoryboardError(
            f"{path}: the suffix {path.suffix or '(none)'} is not a storyboard's;"
            f" allowed: {', '.join(STORYBOARD_SUFFIXES)}"
        )
    try:
        text = _decode(_read_bytes(path))
        if not text.strip():
            raise _Unreadable("the file is empty; a storyboard holds story_name, story_overview and scenes")
        return _parse_yaml(text) if suffix in (".yaml", ".yml") else _parse_json(text)
    except _Unreadable as problem:
        raise StoryboardError(f"{path}: {problem}") from None
    except RecursionError:
        raise StoryboardError(f"{path}: nested too deeply; a storyboard nests 4 levels") from None


def _read_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _Unreadable("this is a folder; give one storyboard file")
        if not stat.S_ISREG(mode):
            raise _Unreadable("this is not a regular file")
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise _Unreadable("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _Unreadable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise _Unreadable(f"larger than {MAX_FILE_BYTES // 2**20} MiB, the most a storyboard may have")
    return raw


def _decode(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Unreadable("this is UTF-16; save the file as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _Unreadable(
            f"not UTF-8: byte 0x{raw[error.start]:02x} in line {line} (offset {error.start}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _Unreadable(f"a NUL byte in line {line}; this is not a text file in UTF-8")
    return text


def _parse_json(text: str) -> object:
    """JSON, then JSON with comments and trailing commas blanked out, then full JSON5 if the text is short enough."""
    try:
        return _loads_json(text)
    except json.JSONDecodeError:
        pass
    try:
        return _loads_json(_blank_json5_extras(text))
    except json.JSONDecodeError as error:
        as_json = error
    json_problem = f"line {as_json.lineno}, column {as_json.colno}: {as_json.msg}"
    if len(text) > MAX_JSON5_CHARACTERS:
        raise _Unreadable(
            f"not valid JSON, {json_problem} (comments and trailing commas are allowed; the rest of JSON5, such as keys"
            f" without quotes, only in files of up to {MAX_JSON5_CHARACTERS // 2**10} KiB)"
        )
    try:
        return json5.loads(text, object_pairs_hook=_no_duplicate_keys)
    except ValueError as error:
        position = _JSON5_POSITION.match(str(error))
    if position is None or (int(position[1]), int(position[3] or 0)) <= (as_json.lineno, as_json.colno):
        raise _Unreadable(f"not valid JSON or JSON5, {json_problem}")
    line, problem, column = position.groups()
    raise _Unreadable(f"not valid JSON or JSON5, line {line}, column {column}: {problem}")


def _loads_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicate_keys)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python refuses integers of more than 4300 digits
        raise _Unreadable(f"a number is too long: {error}") from None


def _blank_json5_extras(text: str) -> str:
    """``text`` with comments and trailing commas replaced by spaces, so that positions in errors stay correct."""

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        return found if found[0] in "\"'" else re.sub(r"[^\n]", " ", found)

    return _STRING_OR_TRAILING_COMMA.sub(blank, _STRING_OR_COMMENT.sub(blank, text))


def _no_duplicate_keys(items: Iterable[tuple[str, object]]) -> dict[str, object]:
    pairs = list(items)
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Unreadable(f"the key {key[:80]!r} is written twice in one object")
            seen.add(key)
    return document


class _YamlLoader(_SafeYamlLoader):
    """The safe loader, which also rejects a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Build a dict; the base class would keep the last of two equal keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise _Unreadable(f"line {line}: the key {key.value[:80]!r} is written twice in one mapping")
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))


def _parse_yaml(text: str) -> object:
    try:
        _check_yaml_structure(text)
        return yaml.load(text, Loader=_YamlLoader)
    except (_Unreadable, RecursionError):
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _Unreadable(f"not valid YAML, {where}{' '.join(str(error.problem or error.context).split())}") from None
    except Exception as error:  # the YAML constructors raise many types for values such as "!!int x" or month 13
        raise _Unreadable(f"not valid YAML: {' '.join(str(error).split())[:200]}") from None


def _check_yaml_structure(text: str) -> None:
    """Reject aliases (a few lines of them expand to gigabytes) and deep nesting, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeYamlLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _Unreadable(f"{_line(event)}YAML aliases (*{event.anchor}) are not allowed; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Unreadable(f"{_line(event)}nested too deeply; a storyboard nests 4 levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}: " if event.start_mark else ""
