"""Reads single values of a storyboard. What is wrong is raised as one sentence that says what is allowed."""

import unicodedata
from collections.abc import Sequence

from storymem_dist.errors import StoryboardError
from storymem_dist.story.problems import bad_character, describe
from storymem_dist.story.warnings import Warnings

MAX_PROMPT_CHARACTERS = 10_000
"""The text encoder reads 512 tokens, about 2,500 characters; far more than that is not a prompt."""

MAX_NAME_CHARACTERS = 200
MAX_SEED = 2**63 - 1
TRUTHS = {"true": True, "false": False, "yes": True, "no": False, "y": True, "n": False, "1": True, "0": False}

_MAX_EXACT_FLOAT = 2**53

LIST_OF_PATHS = "paths, relative to the storyboard"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic")


def names_picture(text: str) -> bool:
    """Whether ``text`` is the name of a picture's file rather than a description."""
    return len(text.split()) == 1 and text.strip().lower().endswith(_PICTURES)


def read_text(value: object, where: str, key: str, warnings: Warnings, *, may_be_empty: bool = False) -> str:
    """``value`` as text without surrounding white space; rejects control characters."""
    if not isinstance(value, str):
        raise StoryboardError(f"{where}: {key} is {describe(value)}; allowed: text{warnings.quotes}")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise StoryboardError(f"{where}: {key} has {len(value)} characters; allowed: at most {MAX_PROMPT_CHARACTERS}")
    if (character := bad_character(value)) is not None:
        raise StoryboardError(
            f"{where}: {key} holds the control character U+{ord(character):04X}; allowed: printable text"
        )
    if not may_be_empty and all(unicodedata.category(character)[0] in "ZC" for character in value):
        raise StoryboardError(f"{where}: {key} is empty; allowed: text with at least one visible character")
    return value.strip()


def read_line(value: object, where: str, key: str, warnings: Warnings, *, most: int = MAX_PROMPT_CHARACTERS) -> str:
    """``value`` as text of one line, of at most ``most`` characters: a name."""
    name = read_text(value, where, key, warnings)
    if (character := bad_character(name, also_lines=True)) is not None:
        raise StoryboardError(
            f"{where}: {key} holds the character U+{ord(character):04X}; allowed: one line of text without"
            " control characters and characters that change its direction"
        )
    if len(name) > most:
        raise StoryboardError(f"{where}: {key} has {len(name)} characters; allowed: at most {most}")
    return name


def read_name(value: object, where: str, key: str, warnings: Warnings) -> str:
    """``value`` as the name of a shot or an entity: texts that look the same are the same (Unicode's NFC)."""
    name = read_line(value, where, key, warnings, most=MAX_NAME_CHARACTERS)
    return unicodedata.normalize("NFC", name)


def read_truth(
    value: object,
    where: str,
    place: str,
    key: str,
    warnings: Warnings,
    *,
    meaning: str = "true (a cut) or false (continues the shot before it)",
) -> bool:
    """``value`` as True or False; other words for them are read with a warning."""
    if isinstance(value, bool):
        return value
    word = str(int(value)) if isinstance(value, (int, float)) and value in (0, 1) else value
    if not isinstance(word, str) or word.strip().lower() not in TRUTHS:
        raise StoryboardError(f"{where}: {key} is {describe(value)}; allowed: {meaning}")
    if word.strip().lower() not in ("true", "false"):
        warnings.add(f"{key} is not written as true or false; 1 and yes are read as true, 0 and no as false", place)
    return TRUTHS[word.strip().lower()]


def read_whole_number(value: object, where: str, key: str, minimum: int, maximum: int) -> int:
    """``value`` as a whole number in a range; 7.0 is one."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT_FLOAT:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise StoryboardError(
            f"{where}: {key} is {describe(value)}; allowed: a whole number from {minimum} to {maximum}"
        )
    return value


def read_number(value: object, where: str, key: str, minimum: float, maximum: float) -> float:
    """``value`` as a finite number in a range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise StoryboardError(f"{where}: {key} is {describe(value)}; allowed: a number from {minimum:g} to {maximum:g}")
    return float(value)


def read_list(value: object, where: str, key: str, of_what: str) -> list[object]:
    """``value`` as a list of at least one entry."""
    if not isinstance(value, list):
        raise StoryboardError(f"{where}: {key} is {describe(value)}; allowed: a list of {of_what}")
    if not value:
        raise StoryboardError(f"{where}: {key} is empty; allowed: a list of {of_what}, at least one")
    return value


def read_entries(
    value: object,
    where: str,
    place: str,
    key: str,
    of_what: str,
    warnings: Warnings,
    *,
    most: int,
    single: tuple[type, ...] = (str,),
) -> Sequence[object]:
    """``value`` as a list of at most ``most`` entries, which may be empty; one entry alone is read with a warning."""
    if isinstance(value, single):
        warnings.add(f"{key} is one value; read as a list of one", place)
        return [value]
    if not isinstance(value, list):
        raise StoryboardError(f"{where}: {key} is {describe(value)}; allowed: a list of {of_what}")
    if len(value) > most:
        raise StoryboardError(f"{where}: {key} has {len(value)} entries; allowed: at most {most}")
    return value
