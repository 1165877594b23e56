"""Turns a storyboard file into plain data: dicts, lists, text, numbers, truth values.

Reads JSON, JSON5, JSON Lines and YAML, also inside one Markdown fence, in bounded time, whatever the file is (garbage,
a device, ten gigabytes, a YAML bomb), and reports what is wrong with it. Knows nothing about the required content of a
storyboard.
"""

import json
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.json_text import load, parse_json, parse_lines, parse_values
from storymem_dist.story.problems import Unreadable
from storymem_dist.story.yaml_text import parse_yaml

YAML_SUFFIXES = (".yaml", ".yml")
LINES_SUFFIXES = (".jsonl", ".ndjson")
PROMPTS_SUFFIX = ".txt"
STORYBOARD_SUFFIXES = (".json", ".json5", *LINES_SUFFIXES, *YAML_SUFFIXES)

MAX_FILE_BYTES = 2**20
"""A storyboard is a few kilobytes; all thirty of ST-Bench together are 150 KB."""

MAX_LIST_BYTES = 16 * 2**20
"""A file of many storyboards or prompts, one a line."""

MAX_LINES = 10_000
"""Lines of a file in JSON Lines, blank ones included. A line that is no JSON takes some time to be refused."""

_FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*([\w+.-]*)([^`~{\[]*)\Z")


@dataclass(slots=True)
class Parsed:
    """The documents of a file as plain data; ``Unreadable`` for a bad line among several.

    ``notes`` say what was read although it is not the file's format. ``is_yaml``: a cure may be to use quotes.
    ``lines`` are those at which the documents of JSON Lines begin.
    """

    documents: list[object]
    lines: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_yaml: bool = False


def parse_document(path: Path) -> Parsed:
    """Read ``path`` by its suffix and return its plain data.

    Raises ``StoryboardError`` naming the file when it is not a readable, regular UTF-8 file of at most
    ``MAX_FILE_BYTES`` in one of ``STORYBOARD_SUFFIXES``, or not valid in its format.
    """
    suffix = path.suffix.lower()
    if suffix not in STORYBOARD_SUFFIXES:
        raise StoryboardError(
            f"{path}: the suffix {path.suffix or '(none)'} is not a storyboard's;"
            f" allowed: {', '.join(STORYBOARD_SUFFIXES)}, or {PROMPTS_SUFFIX} with a prompt a line"
        )
    try:
        text = read_document_text(path, MAX_LIST_BYTES if suffix in LINES_SUFFIXES else MAX_FILE_BYTES)
        if not text.strip():
            raise Unreadable("the file is empty; a storyboard holds story_name, story_overview and scenes")
        return _parse(text, suffix)
    except Unreadable as problem:
        raise StoryboardError(f"{path}: {problem}") from None
    except RecursionError:
        raise StoryboardError(f"{path}: nested too deeply; a storyboard nests 4 levels") from None


def read_document_text(path: Path, most_bytes: int) -> str:
    """The text of a regular UTF-8 file, without a byte order mark. Raises ``Unreadable``."""
    return _decode(_read_bytes(path, most_bytes))


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise Unreadable("this is a folder; give one storyboard file")
        if not stat.S_ISREG(mode):
            raise Unreadable("this is not a regular file")
        with path.open("rb") as file:
            raw = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise Unreadable("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Unreadable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > most_bytes:
        what = "a storyboard" if most_bytes == MAX_FILE_BYTES else "such a file"
        raise Unreadable(f"larger than {most_bytes // 2**20} MiB, the most {what} may have")
    return raw


def _decode(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable("line 1: this is UTF-16 or UTF-32; save the file as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Unreadable(
            f"not UTF-8: byte 0x{raw[error.start]:02x} in line {line} (offset {error.start}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise Unreadable(f"a NUL byte in line {line}; this is not a text file in UTF-8, save it as UTF-8")
    return text


def _parse(text: str, suffix: str) -> Parsed:
    by_suffix = dict.fromkeys(YAML_SUFFIXES, _parse_yaml) | dict.fromkeys(LINES_SUFFIXES, _parse_lines)
    parse = by_suffix.get(suffix, _parse_json)
    try:
        return parse(text)
    except Unreadable:
        if (fenced := _inside_fence(text)) is None:
            raise
    inside, language = fenced
    languages = {"yaml": _parse_yaml, "yml": _parse_yaml, "jsonl": _parse_lines}
    parse = languages.get(language, _parse_json if language.startswith("json") else parse)
    parsed = parse(inside)
    parsed.notes.append("read what is inside the Markdown fence (```); the rest of the file is ignored")
    return parsed


def _parse_json(text: str) -> Parsed:
    try:
        return Parsed([parse_json(text)])
    except Unreadable:
        if (several := _several(text, may_begin_badly=False)) is None:
            raise
    several.notes.append(f"the file holds {len(several.documents)} storyboards, as JSON Lines does; one story each")
    return several


def _parse_lines(text: str) -> Parsed:
    try:
        return Parsed([load(text)], [1])
    except Unreadable:  # a key that is written twice, perhaps in one line of many
        if (several := _several(text, may_begin_badly=True)) is None:
            raise
        return several
    except json.JSONDecodeError as error:
        several = _several(text, may_begin_badly=True)
        if several is None:
            _, first = next(parse_lines(text))
            problem = first if isinstance(first, Unreadable) else f"line {error.lineno}: {error.msg}"
            raise Unreadable(
                f"not valid JSON Lines, {problem}; write each storyboard, or each path in quotes, on one line"
            ) from error
        return several


def _several(text: str, *, may_begin_badly: bool) -> Parsed | None:
    """The JSON texts of ``text``, one after the other or one a line, None if it is something else.

    A bad line stops no other. Only a file whose name says so ``may_begin_badly``.
    """
    if (values := parse_values(text)) is not None:
        return Parsed([value for _, value in values], [line for line, _ in values])
    if text.count("\n") > MAX_LINES:
        return None
    numbered = list(parse_lines(text))
    lines = [value for _, value in numbered]
    if may_begin_badly:
        num_read = sum(not isinstance(value, Unreadable) for value in lines)
        looks_right = 2 * num_read >= len(lines) and any(isinstance(value, (dict, str)) for value in lines)
    else:
        looks_right = isinstance(lines[0], dict) and all(line.lstrip()[:1] in ("", "{") for line in text.split("\n"))
    return Parsed(lines, [line for line, _ in numbered]) if looks_right and len(lines) > 1 else None


def _parse_yaml(text: str) -> Parsed:
    try:
        found = parse_yaml(text)
    except Unreadable:
        try:
            return Parsed([load(text)])  # YAML does not read all of JSON: half a surrogate pair, a tab before a value
        except (json.JSONDecodeError, Unreadable, RecursionError):
            pass
        raise
    documents = [document for document in found.documents if document is not None] or [None]
    return Parsed(documents, notes=found.notes, is_yaml=True)


def _inside_fence(text: str) -> tuple[str, str] | None:
    """What is inside the only Markdown fence of ``text``, and its language; None if there is no fence or nothing in it.

    Lines outside become blank, so that line numbers stay correct. A fence that is not closed ends with the text.
    Raises ``Unreadable`` when there are several.
    """
    lines = text.split("\n")
    openings: list[int] = []
    inside: list[str] = [""] * len(lines)
    language = mark = ""
    for index, line in enumerate(lines):
        match = _FENCE.match(line)
        if not mark and match:
            openings.append(index + 1)
            mark, language = match[1], language or match[2].lower()
        elif mark and match and not match[2] and not match[3].strip() and match[1].startswith(mark):
            mark = ""
        elif mark:
            inside[index] = line
    if len(openings) > 1:
        listed = ", ".join(map(str, openings[:5])) + (", ..." if len(openings) > 5 else "")
        raise Unreadable(f"{len(openings)} Markdown fences (lines {listed}); leave one in each file")
    text = "\n".join(inside)
    return (text, language) if text.strip() else None
