"""The report as people meet it: opened from a file in headless Chromium, at two widths, light and dark.

Needs Chromium, Node.js and the packages of ``tests/browser`` (``npm ci --prefix tests/browser``); skipped without.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.requests import Request, RequestLog
from storymem_dist.observe.report import write_comparison, write_report
from tests.helpers.fake_run import FakeRun, whole_run
from tests.helpers.large_run import large_run

BROWSER = Path(__file__).parents[1] / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or shutil.which("node") is None or not (BROWSER / "node_modules").is_dir(),
    reason="needs chromium, node and: npm ci --prefix tests/browser",
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The pages that were looked at, by name, the whole run that ``complete`` is about, and the size of ``index``."""

    run: FakeRun
    pages: dict[str, dict[str, Any]]
    index_bytes: int


def look(*pages: Path) -> list[dict[str, Any]]:
    """What one browser sees of each page."""
    command = ["node", str(BROWSER / "look.mjs"), *map(str, pages), "--chromium", str(CHROMIUM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    seen: list[dict[str, Any]] = json.loads(done.stdout)
    return seen


def check_every_view(seen: dict[str, Any]) -> None:
    assert {(view["size"], view["colorScheme"]) for view in seen["views"]} == {
        (size, scheme) for size in ("desktop", "phone") for scheme in ("light", "dark")
    }
    assert sum("violations" in view for view in seen["views"]) == 2
    for view in seen["views"]:
        assert view["errors"] == [], view
        assert view["requests"] == [], view
        assert view["overflow"] <= 0, view
        serious = [found for found in view.get("violations", ()) if found["impact"] in ("serious", "critical")]
        assert serious == [], view


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("browser")
    run = FakeRun(folder / "run", num_stories=3, num_shots=4, max_keyframes=3)
    for number in range(2):
        with run.replica(number, num_replicas=2) as replica:
            run.load_weights(replica)
            for story in range(number, 3, 2):
                for shot in range(4):
                    run.shot(replica, story, shot)
                run.finish_story(replica, story)
            run.finish(replica)
    broken = FakeRun(folder / "broken", num_stories=7, num_shots=2)
    with broken.replica(0) as replica:
        broken.shot(replica, 0, 0)
        broken.shot(replica, 1, 0, fail="CUDA out of memory")
        broken.shot(replica, 0, 1, stop_after_step=2)
    RequestLog(broken.root).publish(Request(action="skip", story_id="story_3", who="lea@login1"))
    single = whole_run(folder / "single", num_stories=1, num_shots=2, num_replicas=1)
    gone = whole_run(folder / "gone", num_stories=1, num_shots=2, num_replicas=1)
    large = large_run(folder / "large", num_stories=62, num_shots=1, longest=50, num_replicas=3)
    pages = {
        "complete": write_report(run.root, run.root / "report.html"),
        "broken": write_report(broken.root, broken.root / "report.html", now=replica.clock.now + 5),
        "comparison": write_comparison(single.root, broken.root, folder / "both.html"),
        "embedded": write_report(gone.root, folder / "alone" / "report.html", embed=True),
        "index": write_report(large.root, large.root / "report.html"),
        "story": large.root / "report" / "story_0.html",
    }
    shutil.rmtree(gone.root)
    seen = dict(zip(pages, look(*pages.values()), strict=True))
    return Seen(run=run, pages=seen, index_bytes=pages["index"].stat().st_size)


def test_every_video_plays(seen: Seen) -> None:
    videos = seen.pages["complete"]["videos"]
    assert len(videos) == 12 + 3
    assert all(video.get("played") for video in videos), videos
    assert {(video["width"], video["height"]) for video in videos} == {(160, 96)}
    assert sorted({round(video["seconds"] * 16) for video in videos}) == [17, 4 * 17]


def test_lineage_edges_in_the_browser_match_the_records(seen: Seen) -> None:
    run, pictures = seen.run, seen.pages["complete"]["edges"]
    assert len(pictures) == 3
    for story, picture in zip(run.stories, pictures, strict=True):
        shown, gone = [], []
        for path in sorted((run.root / "stories" / story.story_id).glob("shot_*.json")):
            record = ShotRecord.from_json(json.loads(path.read_text()))
            for decision in record.memory["recalled"]:
                edge = [f"{decision['shot_index']}:{decision['slot']}", record.shot_id]
                (gone if decision["verdict"] == "evicted" else shown).append(edge)
        assert story.name in picture["picture"]
        assert sorted(picture["shown"]) == sorted(shown) and shown
        assert sorted(picture["gone"]) == sorted(gone) and gone


def test_pointer_and_keyboard_reach_what_they_should(seen: Seen) -> None:
    page = seen.pages["complete"]
    assert "shown to shot_0" in page["tip"] and "quality 4.500" in page["tip"]
    assert page["firstStop"] == "Skip to the stories"
    assert page["lit"] == 4, "three shown keyframes and one outside the window of the last shot"
    assert page["sought"] == pytest.approx(8 / 16), "the link to a frame moved the clip there"
    assert page["theme"] == "dark"


@pytest.mark.parametrize("page", ["complete", "broken", "comparison", "embedded", "index", "story"])
def test_every_page_has_no_errors_no_requests_and_is_accessible(seen: Seen, page: str) -> None:
    check_every_view(seen.pages[page])


def test_an_embedded_report_plays_alone(seen: Seen) -> None:
    videos = seen.pages["embedded"]["videos"]
    assert len(videos) == 3 and all(video.get("played") for video in videos)


def test_the_list_of_a_large_run_is_searched_and_leads_to_the_stories_and_back(seen: Seen) -> None:
    found = seen.pages["index"]["list"]
    assert found["rows"] == found["back"] == 62 and found["finished"] == 62
    assert found["counts"] == {"": 62, "running": 0, "waiting": 0, "finished": 62, "failed": 0, "skipped": 0}
    assert found["found"] == 11 and found["output"] == "11 of 62", "story_1 and story_10 to story_19"
    assert found["opened"].startswith(found["first"]) and found["first"]
    assert seen.index_bytes < 200_000, "it holds no story; benchmarks/report_page.py measures how soon it is open"


def test_the_page_of_a_long_story_plays_and_draws_what_was_recalled(seen: Seen) -> None:
    story = seen.pages["story"]
    assert len(story["videos"]) == 50 + 1 and all(video.get("played") for video in story["videos"])
    (picture,) = story["edges"]
    assert len(picture["shown"]) > 100 and story["lit"] == 4 and story["sought"] is not None
