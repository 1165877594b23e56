"""Writes the report of a run as files: a page, and in large runs a folder next to it with a page for each story.

A story's page that would say the same is left as it is: its last line names what it was made of. Only pages with such
a line are ever removed, when their story is gone or the report is one page again.
"""

import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.files import names_in, open_regular, temporaries_in, write_bytes
from storymem_dist.observe.report.assets import Assets, base_of, story_file
from storymem_dist.observe.report.page import Places, is_large, page_parts, run_page
from storymem_dist.observe.report.views import RunView, StoryView

_MARK = re.compile(rb"<!-- storymem-report: a story's page made of ([0-9a-f]{64}) -->\n\Z")
_MARK_BYTES = 120
_WRITING_SECONDS = 3600.0


def write_run(run: RunView, page: Path, *, embed: bool = False, read_at: float | None = None) -> None:
    """Write the report of ``run`` to ``page``, each file in one step.

    ``read_at``: when reading the run began, in seconds since the epoch, now if None. Pages that another process wrote
    since then stay, also of stories that ``run`` does not have.

    ``embed`` puts everything, clips too, into the one page. Raises ``OSError``, and ``StoryMemError`` when there is too
    much to embed or the folder of the stories' pages is not a folder.
    """
    assets = Assets.of_page(run.root, page, embed=embed)
    if embed:
        assets.check_size(media(run))
    page.parent.mkdir(parents=True, exist_ok=True)
    folder = stories_folder(page)
    whole = embed or not is_large(run)
    written: set[str] = set()
    if not whole:
        written = _write_stories(run, page, folder)
    if whole:
        _prepare(assets, run.stories)
    places = Places(index=page.name, folder=folder.name)
    write_page(page, run_page(run, assets, places=places, whole=whole))
    _remove_others(folder, written, time.time() if read_at is None else read_at)


def check_place(page: Path) -> None:
    """Refuse a page that would replace a device or a pipe, or a folder, before anything is written.

    Raises ``ConfigError``.
    """
    try:
        is_file = stat.S_ISREG(page.stat().st_mode) and page.parent.resolve() != Path("/dev")  # or its stdout
    except OSError:  # it is not there yet; what else is wrong shows when it is written
        return
    if not is_file:
        kind = f"a folder; give a file, for example {page / 'report.html'}" if page.is_dir() else "not a regular file"
        raise ConfigError(f"the page cannot be written: {page} is {kind}")


def write_page(page: Path, text: str) -> None:
    """Write one page in one step. Raises ``OSError``."""
    page.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(page, text.encode(errors="backslashreplace"), durable=False)


def media(run: RunView, *, videos: bool = True) -> Iterator[str]:
    """Yield the paths of the clips of a run and, with ``videos``, of its whole stories."""
    for story in run.stories:
        yield from (shot.clip for shot in story.shots if shot.clip is not None)
        if videos and story.video is not None:
            yield story.video


def stories_folder(page: Path) -> Path:
    """Return the folder of the stories' pages: ``report`` next to ``report.html``, else ``NAME_report``."""
    return page.with_name("report" if page.name == "report.html" else f"{page.stem}_report")


def _write_stories(run: RunView, page: Path, folder: Path) -> set[str]:
    """Write the pages of the stories that changed; return the names of all."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise StoryMemError(f"{folder} is not a folder: remove it, or write the report elsewhere with --output")
    places = Places(index=page.name, folder=folder.name)
    base = base_of(run.root, folder / "page.html")
    assets = Assets(run.root, base)
    written: set[str] = set()
    for story in run.stories:
        name = story_file(story.story_id)
        written.add(name)
        frame = run_page(run, assets, story.story_id, places=places, parts={})
        made_of = _made_of(run, story, base, frame)
        if _mark_of(folder / name) != made_of:
            assets = Assets(run.root, base)  # keeps no pictures of the stories before
            _prepare(assets, [story])
            text = run_page(run, assets, story.story_id, places=places)
            write_page(folder / name, f"{text}<!-- storymem-report: a story's page made of {made_of} -->\n")
    return written


def _prepare(assets: Assets, stories: Sequence[StoryView]) -> None:
    clips = [shot.clip for story in stories for shot in story.shots if shot.clip is not None]
    images = [keyframe.image for story in stories for keyframe in story.keyframes if keyframe.image is not None]
    assets.prepare(clips, images)


class _Stamps(Assets):
    """Instead of media and pictures, what shows whether they changed: much quicker than making them."""

    def media(self, path: str) -> str | None:
        return self._stamp(path)

    def poster(self, clip: str) -> str | None:
        return self._stamp(clip)

    def keyframe(self, image: str | None) -> str | None:
        return self._stamp(image) if image else None

    def _stamp(self, path: str) -> str:
        try:
            found = (self._root / path).lstat()
        except (OSError, ValueError):
            return f"{path} -"
        return f"{path} {found.st_size} {found.st_mtime_ns}"


def _made_of(run: RunView, story: StoryView, base: str, frame: str) -> str:
    """Digest of what a story's page says, but for the time at which it is written."""
    parts = dict(page_parts(run, _Stamps(run.root, base), story.story_id))
    parts.pop("foot")
    text = repr((frame, base, sorted(parts.items())))
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def _mark_of(path: Path) -> str | None:
    """What the story's page ``path`` was made of; None for a file that is no such page, or is not there."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MARK_BYTES))
            found = _MARK.search(file.read(_MARK_BYTES))
    except OSError:
        return None
    return found[1].decode() if found is not None else None


def _remove_others(folder: Path, written: set[str], read_at: float) -> None:
    """Remove pages of stories that are gone, and the folder when nothing is left in it."""
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return
        for name in names_in(folder):
            path = folder / name
            if name not in written and path.lstat().st_mtime < read_at and _mark_of(path) is not None:
                path.unlink()
        for path in temporaries_in(folder, "*.html"):  # of a process that was killed while it wrote
            if time.time() - path.lstat().st_mtime > _WRITING_SECONDS:
                path.unlink()
        if not written:
            folder.rmdir()
