"""Finds storyboards (a file, a folder, a glob, a list of these) and loads each on its own.

A file in JSON Lines may list storyboards by path, and a ``.txt`` file holds a prompt a line (``story.listing``). One
bad file never stops the others: it is rejected with its message. Knows nothing about rendering or run folders, except
that a ``story_id`` is used as a folder name.
"""

import glob
import hashlib
import os
import re
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.checking import build_story
from storymem_dist.story.listing import Row, read_prompts, read_row
from storymem_dist.story.parsing import LINES_SUFFIXES, PROMPTS_SUFFIX, STORYBOARD_SUFFIXES, Parsed, parse_document
from storymem_dist.story.problems import Unreadable, one_line
from storymem_dist.story.schema import Story
from storymem_dist.story.shapes import MAX_STORIES_PER_FILE, Found, find_stories
from storymem_dist.story.warnings import Warnings

MAX_STORY_ID_BYTES = 96
"""Leaves room in a file name's 255 bytes for prefixes and suffixes."""

_MAX_NAMED = 5
_TYPED = "the storyboard text"
_FENCED = re.compile(r"\s*```\w*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_PATTERNS = ", ".join(f"*{suffix}" for suffix in STORYBOARD_SUFFIXES)


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedStoryboard:
    """A storyboard that cannot be rendered. ``source`` is its path, or the part of the request that matched nothing."""

    source: Path | str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryBatch:
    """The result of a request for storyboards. ``stories`` have distinct ``story_id``; the order is reproducible.

    ``warnings`` are those of no single story.
    """

    stories: tuple[Story, ...]
    rejected: tuple[RejectedStoryboard, ...]
    warnings: tuple[str, ...] = ()

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The warnings of the batch and of its stories, a sentence each."""
        return (*self.warnings, *(warning for story in self.stories for warning in story.warnings))


def load_storyboard(path: str | os.PathLike[str]) -> Story:
    """Load one storyboard file (JSON, JSON5, JSON Lines or YAML) that holds one story. Raises ``StoryboardError``."""
    file = Path(path)
    try:
        stories = _stories_in(file)
        if len(stories) > 1:
            raise StoryboardError(f"{file}: {len(stories)} stories; load_storyboards reads them all")
        return stories[0].load()
    except StoryboardError as error:
        raise StoryboardError(one_line(str(error))) from None


def load_storyboard_text(text: str, *, folder: Path, name: str = "story") -> Story:
    """Read a storyboard that somebody typed or pasted: JSON (also in a Markdown fence), YAML, or a single prompt.

    Relative paths are searched in ``folder``. ``name`` is its name if it has none of its own, and gives the story's id.
    The story has no source. Raises ``StoryboardError``, which calls it the storyboard text.
    """
    text = text.removeprefix("\ufeff")
    if fenced := _FENCED.fullmatch(text):
        text = f"\n{fenced[1]}"  # with its first line, so that messages count as the writer does
    with tempfile.TemporaryDirectory(prefix="storymem-") as scratch:
        file = Path(scratch) / f"{story_id_from(name)}{_suffix_of(text)}"
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            stories = _stories_in(file)
            if len(stories) > 1:
                form = " (each line of plain text is one; write scenes with video_prompts for one story)"
                hint = form if file.suffix == PROMPTS_SUFFIX else ""
                raise StoryboardError(f"{file}: {len(stories)} stories; give one{hint}")
            story = replace(stories[0], file=folder / file.name).load()
        except StoryboardError as error:
            raise StoryboardError(one_line(str(error).replace(str(file), _TYPED))) from None
    warnings = tuple(warning.replace(str(file), _TYPED) for warning in story.warnings)
    return replace(story, source=None, story_id=story_id_from(name), warnings=warnings)


def _suffix_of(text: str) -> str:
    """The suffix of the form in which ``text`` is written."""
    if text.lstrip().startswith(("{", "[", "//", "/*")):
        return ".json"
    return ".yaml" if re.search(r"^\s*(scenes|shots|story_name)\s*:", text, re.MULTILINE) else PROMPTS_SUFFIX


def load_storyboards(spec: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> StoryBatch:
    """Load every storyboard that ``spec`` names: a file, a folder (not its subfolders), a glob, or a list of these.

    Files of a folder or glob are sorted by name, entries of a list keep their order, and a file named twice is loaded
    once. A file of several stories gives them the ids ``file-1``, ``file-2`` and so on; a list gives those of its rows,
    and a ``.txt`` file (only where it is named itself) those of its prompts' first words. Stories with the same
    ``story_id`` are all rejected. Raises ``StoryboardError`` when nothing is found.
    """
    rejected: list[RejectedStoryboard] = []
    files: dict[Path, Path] = {}
    for entry in spec if isinstance(spec, Iterable) and not isinstance(spec, str) else [spec]:
        try:
            for file in _find(entry):
                files.setdefault(file.resolve(), file)
        except StoryboardError as error:
            rejected.append(RejectedStoryboard(source=_as_source(entry), message=one_line(str(error))))
    if not files:
        raise StoryboardError(
            "; ".join(problem.message for problem in rejected)
            or f"stories is an empty list; allowed: files, folders or globs of {_PATTERNS}"
        )

    unloaded: list[_Unloaded] = []
    for file in files.values():
        try:
            unloaded += _stories_in(file)
        except StoryboardError as error:
            unloaded.append(_Unloaded(file, story_id_from(file.stem), str(file), Unreadable(str(error))))
    namesakes: defaultdict[str, list[_Unloaded]] = defaultdict(list)
    for one in unloaded:
        namesakes[folded_id(one.story_id)].append(one)
    stories: list[Story] = []
    for one in unloaded:
        try:
            others = [other.listed or other.where for other in namesakes[folded_id(one.story_id)] if other is not one]
            if others:
                more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
                raise StoryboardError(
                    f"{one.listed or one.where}: the story id {one.story_id!r} is also that of"
                    f" {', '.join(others[:_MAX_NAMED])}{more}; allowed: file names that differ before the suffix"
                    + (", or an id in each row of a list" if one.listed else "")
                )
            stories.append(one.load())
        except StoryboardError as error:
            rejected.append(RejectedStoryboard(source=one.file, message=one_line(str(error))))
    return StoryBatch(stories=tuple(stories), rejected=tuple(rejected))


@dataclass(frozen=True, slots=True)
class _Unloaded:
    """One story of a file before it is checked. ``document`` is ``Unreadable`` (a whole message) if it has none.

    ``listed`` is the row of a list that named it, ``seed`` the seed that the row gives it.
    """

    file: Path
    story_id: str
    where: str
    document: object
    name: str = ""
    warnings: Warnings = field(default_factory=Warnings)
    priority: int = 0
    seed: int | None = None
    listed: str = ""

    def load(self) -> Story:
        """Check the document and return its story. Raises ``StoryboardError``."""
        if isinstance(self.document, Unreadable):
            raise StoryboardError(str(self.document))
        story = build_story(
            self.document,
            story_id=self.story_id,
            name=self.name,
            source=self.file,
            where=self.where,
            warnings=self.warnings,
        )
        return replace(story, priority=self.priority, seed=story.seed if self.seed is None else self.seed)


def _stories_in(file: Path, *, is_listed: bool = False) -> list[_Unloaded]:
    """The stories of a file, at least one. Raises ``StoryboardError`` when the file cannot be read.

    A file that ``is_listed`` in a list is no list itself.
    """
    if file.suffix.lower() == PROMPTS_SUFFIX:
        if is_listed:
            raise StoryboardError(f"{file}: a list of prompts cannot be a row of a list; give it next to the list")
        return [
            _Unloaded(file, one.story_id, f"{file}, line {one.line}", one.document(), one.name)
            for one in read_prompts(file)
        ]
    parsed = parse_document(file)
    is_lines = file.suffix.lower() in LINES_SUFFIXES and len(parsed.lines) == len(parsed.documents)
    stories: list[_Unloaded] = []
    try:
        found = [
            (line, row, one)
            for line, row in _rows(file, parsed, is_lines=is_lines)
            for one in ([Found(row.document)] if row.path is not None else find_stories(row.document))
        ]
        if len(found) > MAX_STORIES_PER_FILE:
            raise Unreadable(f"{len(found)} storyboards in one file; allowed: at most {MAX_STORIES_PER_FILE}")
    except Unreadable as error:
        raise StoryboardError(f"{file}: {error}") from None
    for number, (line, row, one) in enumerate(found, start=1):
        listed = f"{file}, line {line}" if is_lines else ""
        if row.path is not None:
            if is_listed:
                raise StoryboardError(f"{file}: a list cannot be a row of a list; write its rows there")
            stories += _listed_stories(file, row, listed)
            continue
        stem, name, where = file.stem, file.stem, str(file)
        if len(found) > 1:
            stem, name, where = f"{stem}-{number}", f"{name} {number}", f"{where}, story {number}"
        document = one.document
        if isinstance(document, Unreadable):
            document = Unreadable(f"{where}: {document}")
        warnings = Warnings(quotes="; put the text in quotes" if parsed.is_yaml else "")
        for note in [*(parsed.notes if number == 1 else []), *one.notes]:
            warnings.add(note)
        warnings.add_unused(one.unused)
        story_id = story_id_from(stem if row.story_id is None else row.story_id)
        stories.append(_Unloaded(file, story_id, where, document, name, warnings, row.priority, row.seed))
    return stories


def _rows(file: Path, parsed: Parsed, *, is_lines: bool) -> Iterator[tuple[int, Row]]:
    """The documents of a file with their lines: as rows of a list if they are lines, else each as a storyboard."""
    for index, document in enumerate(parsed.documents):
        line = parsed.lines[index] if is_lines else 0
        if not is_lines or isinstance(document, Unreadable):
            yield line, Row(document=document)
            continue
        try:
            yield line, read_row(document, f"line {line}")
        except StoryboardError as error:
            yield line, Row(document=Unreadable(str(error)))


def _listed_stories(file: Path, row: Row, listed: str) -> list[_Unloaded]:
    """The stories of the files that a row of a list names, with what the row sets over them."""
    assert row.path is not None, "the caller asks"
    path = Path(row.path)
    unloaded: list[_Unloaded] = []
    try:
        files = list(_find(path if row.path.startswith("~") else file.parent / path))
    except StoryboardError as error:
        files = []
        unloaded.append(_Unloaded(file, story_id_from(path.stem), listed, Unreadable(f"{listed}: {error}")))
    for found in files:
        try:
            unloaded += _stories_in(found, is_listed=True)
        except StoryboardError as error:
            unloaded.append(_Unloaded(found, story_id_from(found.stem), listed, Unreadable(f"{listed}: {error}")))
    for number, one in enumerate(unloaded, start=1):
        for note in row.notes:
            one.warnings.add(note)
        if row.story_id is not None:
            story_id = story_id_from(row.story_id if len(unloaded) == 1 else f"{row.story_id}-{number}")
        else:
            story_id = one.story_id
        unloaded[number - 1] = replace(
            one, story_id=story_id, priority=row.priority or one.priority, seed=row.seed, listed=listed
        )
    return unloaded


def folded_id(story_id: str) -> str:
    """``story_id`` as file systems compare names that do not distinguish case: stories of one run differ in it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", story_id).casefold())


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
