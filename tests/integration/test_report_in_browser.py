"""The report as people meet it: opened from a file in headless Chromium, at two widths, light and dark.

Needs Chromium, Node.js and the packages of ``tests/browser`` (``npm ci --prefix tests/browser``); skipped without.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.observe.report import write_comparison, write_report
from tests.helpers.fake_run import FakeRun, whole_run

BROWSER = Path(__file__).parents[1] / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or shutil.which("node") is None or not (BROWSER / "node_modules").is_dir(),
    reason="needs chromium, node and: npm ci --prefix tests/browser",
)


def look(page: Path) -> dict[str, Any]:
    command = ["node", str(BROWSER / "look.mjs"), str(page), "--chromium", str(CHROMIUM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
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
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeRun, dict[str, Any]]:
    run = FakeRun(tmp_path_factory.mktemp("browser") / "run", num_stories=3, num_shots=4, max_keyframes=3)
    for number in range(2):
        with run.replica(number, num_replicas=2) as replica:
            run.load_weights(replica)
            for story in range(number, 3, 2):
                for shot in range(4):
                    run.shot(replica, story, shot)
                run.finish_story(replica, story)
            run.finish(replica)
    return run, look(write_report(run.root, run.root / "report.html"))


def test_a_report_of_three_stories_has_no_errors_no_requests_and_is_accessible(
    complete: tuple[FakeRun, dict[str, Any]],
) -> None:
    check_every_view(complete[1])


def test_every_video_plays(complete: tuple[FakeRun, dict[str, Any]]) -> None:
    videos = complete[1]["videos"]
    assert len(videos) == 12 + 3
    assert all(video.get("played") for video in videos), videos
    assert {(video["width"], video["height"]) for video in videos} == {(160, 96)}
    assert sorted({round(video["seconds"] * 16) for video in videos}) == [17, 4 * 17]


def test_lineage_edges_in_the_browser_match_the_records(complete: tuple[FakeRun, dict[str, Any]]) -> None:
    run, seen = complete
    pictures = seen["edges"]
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


def test_pointer_and_keyboard_reach_what_they_should(complete: tuple[FakeRun, dict[str, Any]]) -> None:
    seen = complete[1]
    assert "shown to shot_0" in seen["tip"] and "quality 4.500" in seen["tip"]
    assert seen["firstStop"] == "Skip to the stories"
    assert seen["lit"] == 4, "three shown keyframes and one outside the window of the last shot"
    assert seen["sought"] == pytest.approx(8 / 16), "the link to a frame moved the clip there"
    assert seen["theme"] == "dark"


def test_a_broken_run_and_a_comparison_are_as_clean(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "broken", num_stories=7, num_shots=2)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0)
        run.shot(replica, 1, 0, fail="CUDA out of memory")
        run.shot(replica, 0, 1, stop_after_step=2)
    other = whole_run(tmp_path / "whole", num_stories=1, num_shots=2, num_replicas=1)
    now = replica.clock.now + 5
    check_every_view(look(write_report(run.root, run.root / "report.html", now=now)))
    check_every_view(look(write_comparison(other.root, run.root, tmp_path / "both.html")))


def test_an_embedded_report_plays_alone(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=2, num_replicas=1)
    page = write_report(run.root, tmp_path / "alone" / "report.html", embed=True)
    shutil.rmtree(run.root)
    seen = look(page)
    check_every_view(seen)
    assert len(seen["videos"]) == 3 and all(video.get("played") for video in seen["videos"])
