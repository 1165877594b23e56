"""The HTML report: a run as pages, or two runs side by side, from event files and records. Loads no torch.

In reading order: ``views`` has the values, ``stories`` and ``model`` read them, ``page`` says what stands where, and
``writing`` makes files of it. ``observe.live`` serves the same pages.
"""

import time
from pathlib import Path

from storymem_dist.observe.report.assets import Assets
from storymem_dist.observe.report.compare import comparison_page
from storymem_dist.observe.report.model import read_run
from storymem_dist.observe.report.page import is_large
from storymem_dist.observe.report.writing import check_place, media, write_page, write_run


def write_report(root: Path, page: Path, *, embed: bool = False, now: float | None = None) -> Path:
    """Write the report of the run at ``root`` to ``page`` (replaced in one step); returns ``page``.

    A large run also gets a page for each story, in the folder ``report`` next to it. ``embed`` puts everything, media
    too, into the one page. Raises ``RunFolderError`` when ``root`` is not a run folder, ``ConfigError`` when ``page``
    is a folder or a device, and ``StoryMemError`` when there is too much to embed.
    """
    check_place(page)
    began = time.time()
    write_run(read_run(root, now=now), page, embed=embed, read_at=began)
    return page


def write_comparison(left: Path, right: Path, page: Path, *, embed: bool = False) -> Path:
    """Write the comparison of two runs to ``page``, always one page; see ``write_report``.

    Large runs are compared without the first pictures of their clips.
    """
    check_place(page)
    runs = [read_run(root) for root in (left, right)]
    posters = embed or not any(map(is_large, runs))
    assets = [Assets.of_page(run.root, page, embed=embed, posters=posters) for run in runs]
    if embed:
        for run, one in zip(runs, assets, strict=True):
            one.check_size(media(run, videos=False))
    write_page(page, comparison_page(runs[0], runs[1], assets[0], assets[1]))
    return page
