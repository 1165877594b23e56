"""Finds storyboards (a file, a folder, a glob, a list of these) and loads each on its own.

One bad file never stops the others: it is rejected with its message. Knows nothing about rendering or run folders,
except that a ``story_id`` is used as a folder name.
"""

import glob
import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.checking import build_story
from storymem_dist.story.parsing import STORYBOARD_SUFFIXES, parse_document
from storymem_dist.story.schema import Story

MAX_STORY_ID_BYTES = 96
"""Leaves room in a file name's 255 bytes for prefixes and suffixes."""

_PATTERNS = ", ".join(f"*{suffix}" for suffix in STORYBOARD_SUFFIXES)


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedStoryboard:
    """A storyboard that cannot be rendered. ``source`` is its path, or the part of the request that matched nothing."""

    source: Path | str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryBatch:
    """The result of a request for storyboards. ``stories`` have distinct ``story_id``; the order is reproducible."""

    stories: tuple[Story, ...]
    rejected: tuple[RejectedStoryboard, ...]


def load_storyboard(path: str | os.PathLike[str]) -> Story:
    """Load one storyboard file (JSON, JSON5 or YAML). Raises ``StoryboardError``."""
    file = Path(path)
    try:
        return build_story(parse_document(file), story_id=story_id_from(file.stem), source=file)
    except StoryboardError as error:
        raise StoryboardError(_one_line(str(error))) from None


def load_storyboards(spec: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> StoryBatch:
    """Load every storyboard that ``spec`` names: a file, a folder (not its subfolders), a glob, or a list of these.

    Files of a folder or glob are sorted by name, entries of a list keep their order, and a file named twice is loaded
    once. Two files with the same ``story_id`` are both rejected. Raises ``StoryboardError`` when nothing is found.
    """
    rejected: list[RejectedStoryboard] = []
    files: dict[Path, Path] = {}
    for entry in spec if isinstance(spec, Iterable) and not isinstance(spec, str) else [spec]:
        try:
            for file in _find(entry):
                files.setdefault(file.resolve(), file)
        except StoryboardError as error:
            rejected.append(RejectedStoryboard(source=_as_source(entry), message=_one_line(str(error))))
    if not files:
        raise StoryboardError(
            "; ".join(problem.message for problem in rejected)
            or f"stories is an empty list; allowed: files, folders or globs of {_PATTERNS}"
        )

    namesakes: defaultdict[str, list[Path]] = defaultdict(list)
    for file in files.values():
        namesakes[story_id_from(file.stem).casefold()].append(file)
    stories: list[Story] = []
    for file in files.values():
        story_id = story_id_from(file.stem)
        try:
            others = [str(other) for other in namesakes[story_id.casefold()] if other != file]
            if others:
                raise StoryboardError(
                    f"{file}: the story id {story_id!r} is also that of {', '.join(others)};"
                    " allowed: file names that differ before the suffix"
                )
            stories.append(load_storyboard(file))
        except StoryboardError as error:
            rejected.append(RejectedStoryboard(source=file, message=_one_line(str(error))))
    return StoryBatch(stories=tuple(stories), rejected=tuple(rejected))


def story_id_from(stem: str) -> str:
    """A folder name made from a file's stem: letters (of any script), digits, ``.``, ``-`` and ``_``.

    Every other character becomes ``_``; a name too long for file systems is cut and ends in a hash of the full stem.
    """
    normal = unicodedata.normalize("NFC", stem.encode("utf-8", "replace").decode())
    safe = "".join(character if character.isalnum() or character in "-_." else "_" for character in normal).strip(".")
    if not safe:
        return "story"
    if len(safe.encode()) <= MAX_STORY_ID_BYTES:
        return safe
    digest = hashlib.sha256(stem.encode("utf-8", "replace")).hexdigest()[:8]
    return safe.encode()[: MAX_STORY_ID_BYTES - 9].decode(errors="ignore") + "-" + digest


def _find(entry: str | os.PathLike[str]) -> Iterator[Path]:
    """The storyboard files that one entry of the request names; raises ``StoryboardError`` when there are none."""
    if not isinstance(entry, (str, os.PathLike)):
        raise StoryboardError(f"stories holds {entry!r:.80}; allowed: files, folders or globs of {_PATTERNS}")
    text = os.fspath(entry)
    if not text.strip() or "\0" in text:
        raise StoryboardError(f"stories={text!r:.80} is not a path; allowed: files, folders or globs of {_PATTERNS}")
    path = Path(text)
    try:
        path = path.expanduser()
        if path.is_dir():
            found = _storyboards_among(path.iterdir())
            if not found:
                raise StoryboardError(
                    f"{path}: no storyboard in this folder; looked for {_PATTERNS}"
                    f" (subfolders are not searched: use {path / '**'}/*.json)"
                )
            yield from found
        elif path.exists() or not glob.has_magic(text):
            if not path.exists():
                raise StoryboardError(f"{path}: no such file, folder or glob; allowed: one that holds {_PATTERNS}")
            yield path
        else:
            matches = [Path(match) for match in glob.iglob(str(path), recursive=True)]  # noqa: PTH207 (absolute)
            found = _storyboards_among(matches)
            if not found:
                raise StoryboardError(
                    f"{path}: {len(matches) or 'nothing'} matched, no storyboard found; allowed: {_PATTERNS}"
                )
            yield from found
    except (OSError, RuntimeError) as error:  # RuntimeError: "~name" of an unknown user
        raise StoryboardError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _storyboards_among(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in STORYBOARD_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _as_source(entry: object) -> Path | str:
    return entry if isinstance(entry, Path) else str(entry)


def _one_line(message: str) -> str:
    """``message`` with line breaks and other unprintable characters as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in message
    )
