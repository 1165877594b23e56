"""What is wrong with a storyboard, in words for its author: one line, printable, short. Knows nothing about files."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

_MAX_TEXT = 60
_LINE_AT_END = re.compile(r", line \d+\Z")
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change in which direction the text around them is shown."""


class Unreadable(Exception):
    """What is wrong with a document, and the cure; the caller adds the file."""


@dataclass(frozen=True, slots=True)
class OddValue:
    """A value of a file that no storyboard uses: a date, a number of many digits. ``what`` describes it."""

    what: str


class Lined(dict[str, object]):
    """An object of a file, with the line of each of its keys where the parser knows it."""

    __slots__ = ("lines",)

    def __init__(self, items: Mapping[str, object] | None = None, lines: Mapping[str, int] | None = None) -> None:
        super().__init__(items or {})
        self.lines = dict(lines or {})


def at_line(where: str, value: object, key: str | None = None) -> str:
    """``where`` with the line of ``key`` of an object (else of its first key), if it is known, as its only line."""
    lines = value.lines if isinstance(value, Lined) else {}
    line = lines.get(key) if key is not None else next(iter(lines.values()), None)
    return where if line is None else f"{_LINE_AT_END.sub('', where)}, line {line}"


def describe(value: object) -> str:
    """Return a short description of ``value``, a piece of plain data."""
    match value:
        case None:
            return "empty (null)"
        case bool():
            return str(value).lower()
        case int():
            return f"the number {value}" if value.bit_length() <= 64 else "a number of more than 64 bits"
        case float():
            return f"the number {value}"
        case str():
            return f"the text {short(value)!r}"
        case Mapping():
            return "an object with " + (", ".join(repr(short(key)) for key in list(value)[:3]) or "no keys")
        case list():
            return f"a list of {len(value)}"
        case OddValue():
            return value.what
        case _:
            return f"a {type(value).__name__}"


def short(value: object) -> str:
    """Return ``value`` (else its description) as text of at most 60 characters."""
    text = value if isinstance(value, str) else describe(value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def plain_key(key: str) -> str:
    """Return ``key`` without case, spaces and signs: ``videoPrompts`` and ``Video prompts`` are equal. "" if long."""
    return "".join(filter(str.isalnum, key)).lower() if len(key) <= _MAX_TEXT else ""


def named(keys: list[str], most: int = 8) -> str:
    """Return ``keys`` in quotes, at most ``most`` of them, and how many are left."""
    listed = ", ".join(repr(short(key)) for key in keys[:most])
    return f"{listed} and {len(keys) - most} more" if len(keys) > most else listed


def one_line(message: str) -> str:
    """Return ``message`` with line breaks and other unprintable characters as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in message
    )


def bad_character(text: str, *, also_lines: bool = False) -> str | None:
    """Return the first control character of ``text`` that is no white space, or half of a surrogate pair.

    With ``also_lines`` also tabs, line breaks and characters that change the direction of text.
    """
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Cs") and (also_lines or character not in "\t\n\r"):
            return character
        if also_lines and (category in ("Zl", "Zp") or character in _DIRECTIONS):
            return character
    return None
