"""Parses JSON and JSON5 in time that grows with the length of the text, and explains what is wrong with it."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import json5

from storymem_dist.story.problems import OddValue, Unreadable, short

MAX_JSON5_CHARACTERS = 32 * 2**10
"""The json5 package reads 10 to 35 kB per second. Comments and trailing commas, the usual JSON5, do not need it."""

MAX_JSON5_DEPTH = 64
"""Nesting up to which the json5 package is used; it parses by recursion, and tries some choices again at each level."""

MAX_DIGITS = 40
"""Numbers of more characters are not converted: no storyboard has one, and some conversions take quadratic time."""

# An unterminated string or comment runs to the end of the text, so that no start is scanned twice.
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)' + r"|'[^'\\]*+(?:\\.[^'\\]*+)*+(?:'|\\?\Z)"
_STRING_OR_COMMENT = re.compile(_STRING + r"|//[^\n\r]*+|/\*.*?(?:\*/|\Z)", re.DOTALL)
_STRING_OR_TRAILING_COMMA = re.compile(_STRING + r"|,(?=\s*+[\]}])", re.DOTALL)
_STRING_OR_BRACKET = re.compile(_STRING + r"|[\[\]{}]", re.DOTALL)
_JSON5_POSITION = re.compile(r"<string>:(\d+) (.*?)(?: at column (\d+))?\Z", re.DOTALL)
_SPACES = re.compile(r"\s*+")
_PYTHON_WORD = re.compile(r"(True|False|None)\b")
_CURLY_QUOTES = "“”„‟‘’‚‛«»＂"

_CURES = {
    "Expecting ',' delimiter": 'a comma is missing, or a " inside a text needs a \\ before it',
    "Expecting ':' delimiter": "a key is followed by a colon and its value",
    "Expecting value": "write a value here, or remove the comma or colon before it",
    "Invalid \\escape": "write \\\\ for a backslash",
    "Invalid \\uXXXX escape": "write \\\\ for a backslash",
}


def parse_json(text: str) -> object:
    """Return the plain data of JSON, of JSON with comments and trailing commas, or of JSON5 if the text is short.

    Raises ``Unreadable`` with the line and a cure, and ``RecursionError`` when it is nested too deeply.
    """
    try:
        return load(text)
    except json.JSONDecodeError:
        pass
    plain = _blank_json5_extras(text)
    try:
        return load(plain)
    except json.JSONDecodeError as error:
        as_json = error
    if (problem := _known_problem(plain, as_json)) is not None:
        raise Unreadable(f"not valid JSON, {problem}")
    json_problem = f"line {as_json.lineno}, column {as_json.colno}: {_with_cure(as_json.msg)}"
    if len(text) > MAX_JSON5_CHARACTERS:
        raise Unreadable(
            f"not valid JSON, {json_problem} (comments and trailing commas are allowed; the rest of JSON5, such as keys"
            f" without quotes, only in files of up to {MAX_JSON5_CHARACTERS // 2**10} KiB)"
        )
    if _depth(plain) > MAX_JSON5_DEPTH:
        raise RecursionError
    try:
        return json5.loads(text, object_pairs_hook=_no_duplicate_keys, parse_int=_integer, parse_float=_decimal)
    except ValueError as error:
        position = _JSON5_POSITION.match(str(error))
    if position is None or (int(position[1]), int(position[3] or 0)) <= (as_json.lineno, as_json.colno):
        raise Unreadable(f"not valid JSON or JSON5, {json_problem}")
    line, found, column = position.groups()
    if found == "Unexpected end of input":
        raise Unreadable(f"not valid JSON or JSON5, {_cut_short(int(line))}")
    if (further := _known_problem_at(plain, _offset(plain, int(line), int(column or 1)))) is not None:
        raise Unreadable(f"not valid JSON or JSON5, {further}")
    raise Unreadable(f"not valid JSON or JSON5, line {line}, column {column}: {found}; correct what stands there")


def parse_values(text: str) -> list[tuple[int, object]] | None:
    """Return lines and values of several JSON texts one after the other; None when ``text`` is anything else."""
    values: list[tuple[int, object]] = []
    decoder, position, line, counted = json.JSONDecoder(**_HOOKS), 0, 1, 0
    while True:
        position += _spaces(text, position)
        if position >= len(text):
            return values or None
        if text[position] not in "{[":
            return None
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, Unreadable):
            return None
        values.append((line, value))


def parse_lines(text: str) -> Iterator[tuple[int, object]]:
    """Yield for each line that is not blank its number and its value: plain data, or ``Unreadable`` for a bad one."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, load(_blank_json5_extras(line))
            except json.JSONDecodeError as error:
                problem = _known_problem(line, error) or f"line 1, column {error.colno}: {_with_cure(error.msg)}"
                yield number, Unreadable(problem.replace("line 1", f"line {number}", 1))
            except Unreadable as problem:
                yield number, Unreadable(f"line {number}: {problem}")
            except RecursionError:
                yield number, Unreadable(f"line {number}: nested too deeply; a storyboard nests 4 levels")


def load(text: str) -> object:
    """Return the plain data of strict JSON. Raises ``JSONDecodeError``, ``Unreadable`` for a key written twice."""
    return json.loads(text, **_HOOKS)


def _integer(digits: str, base: int = 10) -> object:
    return int(digits, base) if len(digits) <= MAX_DIGITS else OddValue(f"a number of {len(digits)} digits")


def _decimal(digits: str) -> object:
    return float(digits) if len(digits) <= 10 * MAX_DIGITS else OddValue(f"a number of {len(digits)} digits")


def _no_duplicate_keys(items: Iterable[tuple[str, object]]) -> dict[str, object]:
    pairs = list(items)
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Unreadable(f"the key {short(key)!r} is written twice in one object; keep one of them")
            seen.add(key)
    return document


_HOOKS: dict[str, Any] = {"object_pairs_hook": _no_duplicate_keys, "parse_int": _integer, "parse_float": _decimal}


def _blank_json5_extras(text: str) -> str:
    """``text`` with comments and trailing commas replaced by spaces, so that positions in errors stay correct."""

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        return found if found[0] in "\"'" else re.sub(r"[^\n]", " ", found)

    return _STRING_OR_TRAILING_COMMA.sub(blank, _STRING_OR_COMMENT.sub(blank, text))


def _depth(text: str) -> int:
    """How deeply brackets are nested outside of texts."""
    depth = deepest = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in ("]", "}"):
            depth -= 1
    return deepest


def _known_problem(text: str, error: json.JSONDecodeError) -> str | None:
    """The usual mistakes of people and language models at the place of ``error``, in words; None for any other."""
    if error.msg.startswith("Invalid control character"):
        what, cure = ("a line break", "\\n") if text[error.pos : error.pos + 1] in "\r\n" else ("a tab", "\\t")
        return f"line {error.lineno}: {what} inside a text; write {cure} or a space, or end the text before it"
    if error.msg == "Extra data":
        return (
            f"line {error.lineno}: {short(text[error.pos :].strip())!r} follows after the storyboard's end; remove it,"
            " or write several storyboards as a list or one a line"
        )
    return _known_problem_at(text, error.pos)


def _known_problem_at(text: str, position: int) -> str | None:
    position += _spaces(text, position)
    line = text.count("\n", 0, position) + 1
    here = text[position : position + 8]
    if not here:
        return _cut_short(line)
    if (plain := unicodedata.normalize("NFKC", here[0])) != here[0] and plain in ",:{}[]":
        return f"line {line}: the full-width character {here[0]}; write {plain}"
    if here[0] in _CURLY_QUOTES:
        return f'line {line}: the curly quote {here[0]}; write straight quotes " around keys and texts'
    if here.startswith(("...", "…")):
        return f"line {line}: an ellipsis ({here[: 3 if here[0] == '.' else 1]}); write out what it stands for"
    if word := _PYTHON_WORD.match(here):
        json_word = "null" if word[1] == "None" else word[1].lower()
        return f"line {line}: {word[1]} is Python's; write {json_word}"
    if not text[:position].strip() and here[0] not in "{[\"'0123456789-NI":
        start = short(text[position:].partition("\n")[0])
        cure = "remove all that is before the first {" if "{" in text[position:] else "write JSON, or name YAML .yaml"
        return f"line {line}: the file begins with {start!r}; {cure}"
    return None


def _cut_short(line: int) -> str:
    return f"line {line}: the text ends in the middle of the storyboard; it was cut short, write it out to its end"


def _with_cure(message: str) -> str:
    cure = _CURES.get(message)
    return f"{message}; {cure}" if cure else message


def _spaces(text: str, position: int) -> int:
    """How many white space characters follow at ``position``."""
    match = _SPACES.match(text, position)
    return match.end() - position if match else 0


def _offset(text: str, line: int, column: int) -> int:
    """The position of a line and column, or that of the word around it."""
    start = 0
    for _ in range(line - 1):
        start = text.find("\n", start) + 1
    position = start + column - 1
    while text[position - 1 : position].isalpha():
        position -= 1
    return position
