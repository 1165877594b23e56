"""Reads what a line of a list says: a row of ``LIST.jsonl``, or a prompt of ``PROMPTS.txt``. Opens no storyboard."""

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.parsing import MAX_LIST_BYTES, STORYBOARD_SUFFIXES, read_document_text
from storymem_dist.story.problems import Unreadable, describe, plain_key, short
from storymem_dist.story.shapes import holds_story
from storymem_dist.story.values import MAX_NAME_CHARACTERS, MAX_SEED, read_line, read_text, read_whole_number
from storymem_dist.story.warnings import Warnings

MAX_PRIORITY = 10**6
MAX_PROMPTS = 10_000

_OPTIONS = ("id", "priority", "seed")
_KEYS = ("path", *_OPTIONS)
_IGNORED = ("comment", "notes")
_WORDS = re.compile(r"\w+")
_MOST_BYTES = 48  # of the words of an id
_STORYBOARD = re.compile(r"\{\s*[\"'}\n]|\[\s*[\"'{]|```|~~~|(?:story_name|scenes)\s*:")
_WORDS_FOR_PATH = ("path", "file", "filename", "filepath", "storyboard", "story")
_WORDS_FOR_PROMPT = ("prompt", "videoprompt", "text", "caption")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of a list: the ``path`` of a storyboard, or a ``document`` that holds one; and what it sets over it.

    ``notes`` say what of the row is not used.
    """

    path: str | None = None
    document: object = None
    story_id: str | None = None
    priority: int = 0
    seed: int | None = None
    notes: tuple[str, ...] = ()


def read_row(value: object, where: str) -> Row:
    """Read a row of a list. What is neither a path nor an object is taken for a storyboard, which is then refused.

    Raises ``StoryboardError`` for an ``id``, ``priority`` or ``seed`` that cannot be used.
    """
    if isinstance(value, str):
        return Row(path=read_text(value, where, "the path", Warnings()))
    if not isinstance(value, Mapping):
        return Row(document=value)
    names_path = "path" in value and not holds_story(value)
    if not names_path and not holds_story(value):
        _refuse_other_words(value, where)
    is_storyboard = any(plain_key(str(key)) == "scenes" for key in value)
    taken = ("id", "priority") if is_storyboard else _OPTIONS  # a storyboard has a seed of its own
    given = {key: value[key] for key in taken if value.get(key) is not None}
    story_id = given.get("id")
    if isinstance(story_id, int) and not isinstance(story_id, bool):
        story_id = describe(story_id).removeprefix("the number ")
    priority, seed = given.get("priority", 0), given.get("seed")
    return Row(
        path=read_text(value["path"], where, "path", Warnings()) if names_path else None,
        document=None if names_path else {key: entry for key, entry in value.items() if key not in taken},
        story_id=None if story_id is None else read_line(story_id, where, "id", Warnings(), most=MAX_NAME_CHARACTERS),
        priority=read_whole_number(priority, where, "priority", -MAX_PRIORITY, MAX_PRIORITY),
        seed=None if seed is None else read_whole_number(seed, where, "seed", 0, MAX_SEED),
        notes=tuple(_unused(value, where)) if names_path else (),
    )


def _refuse_other_words(value: Mapping[object, object], where: str) -> None:
    """Raise ``StoryboardError`` for a row that has a path or a prompt under a key that means nothing in a list."""
    for key, entry in value.items():
        plain = plain_key(str(key))
        if isinstance(entry, str) and plain in _WORDS_FOR_PATH:
            raise StoryboardError(
                f"{where}: {short(str(key))!r} is no key of a row; write the storyboard's file as path"
            )
        if isinstance(entry, str) and plain in _WORDS_FOR_PROMPT:
            raise StoryboardError(
                f"{where}: the row has {short(str(key))!r} and no scenes; write scenes with shots, or prompts alone in"
                " a .txt file"
            )


def _unused(value: Mapping[object, object], where: str) -> Iterator[str]:
    for key in map(str, value):
        if key not in (*_KEYS, *_IGNORED):
            near = difflib.get_close_matches(key, _KEYS, n=1)
            yield f"{where}: the key {short(key)!r} is not used" + (f" (did you mean {near[0]!r}?)" if near else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A line of a list of prompts, and the story that it is. ``story_id`` does not depend on other lines' places."""

    line: int
    text: str
    story_id: str
    name: str

    def document(self) -> dict[str, object]:
        """The storyboard of one shot."""
        return {
            "story_name": self.name,
            "scenes": [{"scene_num": 1, "video_prompts": [self.text], "cut": [True]}],
        }


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a text file, one a line; empty lines and those that begin with ``#`` are skipped.

    Raises ``StoryboardError`` when there is none, or the file is something else.
    """
    try:
        text = read_document_text(path, MAX_LIST_BYTES)
    except Unreadable as problem:
        raise StoryboardError(f"{path}: {problem}") from None
    if _STORYBOARD.match(text.lstrip()):
        raise StoryboardError(
            f"{path}: this looks like a storyboard, and each line of a .txt file is read as a prompt; name it .json,"
            " .jsonl or .yaml"
        )
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    numbered = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not numbered:
        raise StoryboardError(
            f"{path}: there is no prompt in it; write one a line (lines that begin with # are skipped)"
        )
    for number, line in numbered:
        if Path(line).suffix.lower() in STORYBOARD_SUFFIXES and len(line.split()) == 1:
            raise StoryboardError(
                f"{path}: line {number}: {short(line)!r} is a storyboard's file, and each line of a .txt file is read"
                " as a prompt; write a list of files as .jsonl, each in quotes"
            )
    if len(numbered) > MAX_PROMPTS:
        raise StoryboardError(f"{path}: {len(numbered)} prompts in one file; allowed: at most {MAX_PROMPTS}")
    return list(_with_ids(numbered))


def _with_ids(numbered: list[tuple[int, str]]) -> Iterator[Prompt]:
    """Ids of the first words and a number that the whole text decides; equal lines are counted."""
    counts: Counter[str] = Counter()
    for number, text in numbered:
        words = _first_words(text)
        digest = int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), 16)
        stem = f"{'_'.join(words) or 'prompt'}-{digest % 10**6:06d}"
        counts[stem] += 1
        story_id = stem if counts[stem] == 1 else f"{stem}-{counts[stem]}"
        yield Prompt(line=number, text=text, story_id=story_id, name=" ".join(words) or story_id)


def _first_words(text: str) -> list[str]:
    words: list[str] = []
    left = _MOST_BYTES
    for match in _WORDS.finditer(unicodedata.normalize("NFC", text).lower()):
        left -= len(match[0].encode()) + 1
        if left < 0:
            return words or [match[0].encode()[:_MOST_BYTES].decode(errors="ignore")]
        words.append(match[0])
    return words
