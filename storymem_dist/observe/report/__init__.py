"""The HTML report: one page per run, or two runs side by side, from event files and records. Loads no torch."""

from pathlib import Path

from storymem_dist.files import write_bytes
from storymem_dist.observe.report.assets import Assets
from storymem_dist.observe.report.compare import comparison_page
from storymem_dist.observe.report.model import RunView, read_run
from storymem_dist.observe.report.page import run_page


def write_report(root: Path, page: Path, *, embed: bool = False, now: float | None = None) -> Path:
    """Write the report of the run at ``root`` to ``page`` (replaced in one step); returns ``page``.

    ``embed`` puts all media into the page itself. Raises ``RunFolderError`` when ``root`` is not a run folder and
    ``StoryMemError`` when there is too much to embed.
    """
    run = read_run(root, now=now)
    assets = Assets(root, page, embed=embed, media=_media(run))
    return _write(page, run_page(run, assets))


def write_comparison(left: Path, right: Path, page: Path, *, embed: bool = False) -> Path:
    """Write the comparison of two runs to ``page``; see ``write_report``."""
    runs = [read_run(root) for root in (left, right)]
    assets = [Assets(run.root, page, embed=embed, media=_clips(run)) for run in runs]
    return _write(page, comparison_page(runs[0], runs[1], assets[0], assets[1]))


def _clips(run: RunView) -> list[str]:
    return [shot.clip for shot in run.shots if shot.clip is not None]


def _media(run: RunView) -> list[str]:
    return _clips(run) + [story.video for story in run.stories if story.video is not None]


def _write(page: Path, text: str) -> Path:
    page.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(page, text.encode(errors="backslashreplace"), durable=False)
    return page
