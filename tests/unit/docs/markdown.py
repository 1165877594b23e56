"""What the tests need of a Markdown page: fenced blocks, commands, inline code, links, headings, tables."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md"]
"""The pages that say how things are now. (A changelog also says how they were.)"""

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the line where the text begins."""

    language: str
    text: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command of a page, as the shell would split it."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def blocks_of(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in any of ``languages``."""
    text = page.read_text()
    found = [
        Block(language=match[2], text=match[3], line=text.count("\n", 0, match.start(3)) + 1)
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def commands_of(page: Path) -> list[Command]:
    """The commands of a page's shell blocks; continuation lines are joined, comments are left out."""
    return [
        Command(page=page.relative_to(ROOT).as_posix(), line=block.line + offset, words=words)
        for block in blocks_of(page, "bash", "sh", "shell", "console")
        for offset, words in commands_in(block.text)
    ]


def commands_in(script: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Each command of a script as words, with the number of its first line (from 0)."""
    begun, number = "", 0
    for offset, line in enumerate(script.splitlines()):
        number = number if begun else offset
        begun += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if words := tuple(shlex.split(begun, comments=True)):
            yield number, words
        begun = ""
    assert not begun, f"the last line of a block is continued: {begun}"


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def inline_code_of(page: Path) -> list[str]:
    """The text of every `inline code` of a page."""
    return _INLINE.findall(prose_of(page))


def links_of(page: Path) -> list[str]:
    """The targets of a page's links and images."""
    return _LINK.findall(prose_of(page))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = _HEADING.findall(prose_of(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_of(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table whose first column is headed ``heading``, without its head."""
    lines = page.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows
