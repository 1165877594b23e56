"""How long does writing the report of a large run take, and how soon is it open in a browser?

    python -m benchmarks.report_page
    python -m benchmarks.report_page --stories 12 --shots 9 --longest 9   # quick

Makes a run folder by copying the records and events of a small one: 140 stories, one of 50 shots and the others of 18,
on 8 replicas. "read" is reading the run folder, "new" writes all pages for the first time, "same" writes the report of
the unchanged run again, "one clip" after one clip has changed. "page" is the same run as one page.

Seconds are those of the clock; "cpu" counts the processor's, of all threads. With Chromium, Node.js and the packages of
tests/browser, "opened" is the time from navigation to the second frame after the page is loaded (the slowest of desktop
and phone, light and dark), and "frame" the slowest frame while the list of stories scrolls by.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import make_parser, print_table, write_json
from storymem_dist.observe.report import write_report
from storymem_dist.observe.report.assets import Assets
from storymem_dist.observe.report.model import read_run
from storymem_dist.observe.report.page import run_page
from tests.helpers.large_run import large_run

BROWSER = Path(__file__).parents[1] / "tests" / "browser"


def main() -> None:
    """Measure, print and write."""
    parser = make_parser("report_page", __doc__)
    parser.add_argument("--stories", type=int, default=140)
    parser.add_argument("--shots", type=int, default=18, help="shots of each story but the first")
    parser.add_argument("--longest", type=int, default=50, help="shots of the first story")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "run"
        large_run(root, num_stories=arguments.stories, num_shots=arguments.shots, longest=arguments.longest)
        rows = [timed("read", lambda: read_run(root))]
        rows += [timed(what, lambda: write_report(root, root / "report.html")) for what in ("new", "same")]
        clip = next(root.glob("stories/story_1/shot_01/attempts/*/clip.mp4"))
        clip.write_bytes(_unlinked(clip))
        rows.append(timed("one clip", lambda: write_report(root, root / "report.html")))
        run = read_run(root)
        whole = Path(name) / "whole.html"
        assets = Assets.of_page(root, whole)
        rows.append(timed("page", lambda: whole.write_text(run_page(run, assets, whole=True))))
        pages = {"index": root / "report.html", "longest story": root / "report" / "story_0.html", "one page": whole}
        sizes = [{"what": what, "kB": path.stat().st_size / 1000} for what, path in pages.items()]
        total = sum(path.stat().st_size for path in (root / "report").iterdir())
        sizes.append({"what": "all stories", "kB": total / 1000})
        opened = look(list(pages.values())[:2])
    for row, seen in zip(sizes, opened, strict=False):
        row["opened s"] = max(view["seconds"] for view in seen["views"])
        row["frame ms"] = seen["list"]["scrolling"] if seen["list"] else ""
    print_table(rows)
    print_table(sizes)
    write_json(arguments.json, "report_page", {"times": rows, "pages": sizes}, torch.device("cpu"))


def _unlinked(path: Path) -> bytes:
    """The contents of a file, which is removed: its hard links stay as they are."""
    data = path.read_bytes()
    path.unlink()
    return data


def timed(what: str, call: Callable[[], object]) -> dict[str, Any]:
    """Return a row with the time of a call."""
    began, used = time.perf_counter(), time.process_time()
    call()
    return {"what": what, "s": time.perf_counter() - began, "cpu s": time.process_time() - used}


def look(pages: list[Path]) -> list[dict[str, Any]]:
    """Return what a browser sees of the pages; nothing where there is none."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or shutil.which("node") is None or not (BROWSER / "node_modules").is_dir():
        return []
    command = ["node", str(BROWSER / "look.mjs"), *map(str, pages), "--chromium", chromium]
    seen: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return seen


if __name__ == "__main__":
    main()
