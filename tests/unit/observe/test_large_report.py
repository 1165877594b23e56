"""The report of a large run: an index, and a page for each story in a folder next to it."""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest

import storymem_dist.events as ev
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.observe.report import write_comparison, write_report
from storymem_dist.observe.report.assets import Assets, story_file
from storymem_dist.observe.report.lineage import edges, lineage
from storymem_dist.observe.report.model import read_run
from storymem_dist.observe.report.page import INDEX, page_parts, run_page
from storymem_dist.observe.report.timeline import MAX_PIECES, timeline
from storymem_dist.observe.run.state import RunState
from tests.helpers.fake_run import START_TIME, whole_run
from tests.helpers.large_run import large_run
from tests.unit.observe.test_report import Page


@pytest.fixture(autouse=True)
def every_run_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storymem_dist.observe.report.page.MAX_SHOTS", 4)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_run(
        tmp_path_factory.mktemp("large") / "run", num_stories=4, num_shots=2, longest=20, num_replicas=2
    ).root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def written(root: Path) -> dict[str, str]:
    """Write the report; return its pages by their address relative to the run folder."""
    write_report(root, root / "report.html")
    paths = [root / "report.html", *sorted((root / "report").glob("*"))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def stamps(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (root / "report").iterdir()}


def test_the_index_has_a_line_for_each_story_and_links_to_its_page(root: Path) -> None:
    pages = {name: Page(text) for name, text in written(root).items()}
    assert list(pages) == ["report.html", *(f"report/story_{n}.html" for n in range(4))]
    index = pages["report.html"]
    rows = index.all("div", "line")
    assert [row["data-state"] for row in rows] == ["finished"] * 4
    links = [unquote(link["href"]) for link in index.all("a") if link["href"].startswith("report/")]
    assert links == list(pages)[1:]
    assert index.all("video") == index.all("svg") == [] and "lanterns, ropes" not in index.text
    assert "20 of 20 shots" in index.text and "26 of 26" in index.text
    for name, page in list(pages.items())[1:]:
        assert len(page.all("li", "card")) == (20 if "story_0" in name else 2)
        folder = (root / name).parent
        for video in page.all("video"):
            assert (folder / unquote(video["src"])).resolve().is_relative_to(root / "stories")
            assert (folder / unquote(video["src"])).is_file()
        ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        for link in page.all("a"):
            place, _, target = link["href"].partition("#")
            assert target in ids if not place else (folder / unquote(place)).is_file()


def test_prompts_that_are_long_show_their_beginning_until_they_are_opened(root: Path) -> None:
    page = Page(written(root)["report/story_1.html"])
    folded = page.all("details", "folded")
    assert len(folded) == 2 and all("open" not in part for part in folded)
    assert page.text.count("Less") == 2


def test_only_pages_that_would_say_something_else_are_written_again(root: Path) -> None:
    written(root)
    before = stamps(root)
    os.utime(root / "stories" / "story_1" / "shot_01.json")
    written(root)
    assert stamps(root) == before
    (clip,) = (root / "stories/story_2/shot_01/attempts").glob("*/clip.mp4")
    clip.unlink()
    pages = written(root)
    changed = {name for name, inode in stamps(root).items() if inode != before[name]}
    assert changed == {"story_2.html"}
    assert "its clip is missing" in pages["report/story_2.html"]


def test_pages_of_stories_that_are_gone_are_removed_and_nothing_else(root: Path) -> None:
    written(root)
    (root / "report" / "notes.html").write_text("<p>mine</p>")
    shutil.rmtree(root / "stories" / "story_3")
    for path in (root / "events").iterdir():
        path.write_text("".join(line for line in path.open() if "story_3" not in line))
    soon = time.time() + 100
    os.utime(root / "report" / "story_3.html", (soon, soon))
    assert "report/story_3.html" in written(root), "another process may have written it after this one read the run"
    os.utime(root / "report" / "story_3.html", (1.0, 1.0))
    assert list(written(root)) == ["report.html", "report/notes.html", *(f"report/story_{n}.html" for n in range(3))]
    for path in (root / "report").glob("story_*"):
        os.utime(path, (1.0, 1.0))
    write_report(root, root / "report.html", embed=True)
    assert [path.name for path in (root / "report").iterdir()] == ["notes.html"]
    (root / "report" / "notes.html").unlink()
    write_report(root, root / "report.html", embed=True)
    assert not (root / "report").exists()


def test_embedding_makes_one_page_with_everything(root: Path, tmp_path: Path) -> None:
    page = Page(write_report(root, tmp_path / "one.html", embed=True).read_text())
    assert [path.name for path in tmp_path.iterdir() if path != root] == ["one.html"]
    assert len(page.all("li", "card")) == 26 and len(page.all("div", "lineage")) == 4


def test_a_report_of_another_name_has_a_folder_of_another_name(root: Path, tmp_path: Path) -> None:
    path = write_report(root, tmp_path / "pages" / "night.html")
    links = [link["href"] for link in Page(path.read_text()).all("a") if "night_report/" in link["href"]]
    assert len(links) == 4
    for link in links:
        page = Page((path.parent / link).read_text())
        assert "../night.html" in [a["href"] for a in page.all("a")]


@pytest.mark.parametrize("make", ["link", "file"])
def test_a_folder_that_is_none_is_not_written_through(root: Path, tmp_path: Path, make: str) -> None:
    (tmp_path / "outside").mkdir()
    if make == "link":
        (root / "report").symlink_to(tmp_path / "outside")
    else:
        (root / "report").write_text("")
    with pytest.raises(StoryMemError, match=r"report is not a folder: remove it, or write .* --output"):
        write_report(root, root / "report.html")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_page_that_would_replace_no_file_is_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = set(tmp_path.rglob("*"))
    for write in (write_report, partial(write_comparison, root)):
        with pytest.raises(ConfigError, match=r"is a folder; give a file, for example .*/report\.html"):
            write(root, tmp_path)
        for special in (tmp_path / "pipe", Path("/dev/null")):
            with pytest.raises(ConfigError, match="is not a regular file"):
                write(root, special)
    assert set(tmp_path.rglob("*")) == before


def test_a_page_that_is_a_link_is_replaced_and_what_it_names_stays(root: Path, tmp_path: Path) -> None:
    pages = written(root)
    mine = tmp_path / "mine.html"
    mine.write_text(pages["report/story_1.html"])
    for name in ("story_1.html", "gone.html"):
        (root / "report" / name).unlink(missing_ok=True)
        (root / "report" / name).symlink_to(mine)
    assert "<h1" in written(root)["report/story_1.html"]
    assert mine.read_text() == pages["report/story_1.html"]
    assert mine.is_file() and not (root / "report" / "story_1.html").is_symlink()
    assert (root / "report" / "gone.html").is_symlink(), "a link is not ours"


def test_stories_that_only_events_name_get_pages_inside_the_folder(root: Path) -> None:
    story_ids = ["../../outside", "/etc/x", "a/b", "..", "", "\x00", "n" * 5000, "ünï<b>", "tip", "\u202e"]
    around = set(root.parent.rglob("*"))
    with (root / "events" / "other.jsonl").open("w") as file:
        for number, story_id in enumerate(story_ids):
            event = ev.StoryStarted(story_id=story_id, name="<b>bold</b>", num_shots=1)
            stamp = ev.StampedEvent(event=event, wall_time=START_TIME, writer="other", replica=9, sequence=number)
            file.write(ev.stamped_to_json(stamp) + "\n")
    pages = written(root)
    assert len(pages) == 1 + 4 + len(story_ids)
    links = [unquote(link["href"]) for link in Page(pages["report.html"]).all("a")]
    for story_id in story_ids:
        assert len(story_file(story_id).encode()) < 130
        assert f"report/{story_file(story_id)}" in links
    assert all("<b>" not in text for text in pages.values())
    new = set(root.parent.rglob("*")) - around
    assert {path.parent for path in new} <= {root, root / "report", root / "events"}


def test_a_long_story_is_drawn_within_a_screen_and_shows_every_recall(root: Path) -> None:
    story = read_run(root).stories[0]
    page = Page(f"<main>{lineage(story, Assets(root, ''))}</main>")
    (picture,) = page.all("div", "lineage")
    assert "small" in picture["class"]
    assert int(picture["style"].removeprefix("width:").removesuffix("px")) < 104 + 22 * 20 + 20
    drawn = [(edge["data-from"], edge["data-to"]) for edge in page.all("g", "shown")]
    assert sorted(drawn) == sorted((f"{key[0]}:{key[1]}", shot) for key, shot in edges(story))
    assert "shot_05 to shot_20" in page.text, "the table names neighbours as a range"
    out = sum(decision.verdict == "evicted" for shot in story.shots for decision in shot.decisions)
    dots = sum(path["d"].count("h0") for path in page.all("path", "gone"))
    assert dots == out > 50


def test_the_timeline_of_a_long_run_is_bounded_and_counts_all_shots() -> None:
    state = RunState()
    number, now = 0, START_TIME

    def apply(event: ev.Event, replica: int) -> None:
        nonlocal number
        number += 1
        state.apply(ev.StampedEvent(event=event, wall_time=now, writer=f"w{replica}", replica=replica, sequence=number))

    for replica in range(3):
        now = START_TIME
        apply(ev.JobStarted(num_replicas=3, num_shots=3000, num_stories=1), replica)
        for shot in range(1000):
            names = {"story_id": "s", "shot_id": f"shot_{1000 * replica + shot + 1:02d}"}
            apply(ev.ShotStarted(**names, attempt_id="a"), replica)
            apply(ev.StageStarted(stage="denoise", **names), replica)
            now += 9.0
            apply(ev.StageFinished(stage="denoise", elapsed_seconds=9.0, **names), replica)
            now += 1.0
            last = shot == 999
            end = ev.ShotFailed(**names, reason="<x>") if last else ev.ShotFinished(**names, attempt_id="a")
            apply(end, replica)
    text = timeline(state)
    page = Page(f"<main>{text}</main>")
    blocks = page.all("span", "shot")
    assert len(blocks) + len(page.all("span", "k-denoise")) <= 2 * MAX_PIECES and len(text) < 200_000
    assert sum(int(block["data-tip"].split()[0]) for block in blocks) == 3000
    assert len(page.all("span", "failed")) == 3, "a failure among many shots is seen"
    stages = [tip for span in page.all("span", "k-denoise") if (tip := span.get("data-tip"))]
    assert len(stages) >= 3 and all(tip.startswith("denoise ") for tip in stages)


def test_parts_are_disjoint_and_make_the_page(root: Path) -> None:
    run, assets = read_run(root), Assets(root, "../")
    for page in (INDEX, "story_1"):
        parts = page_parts(run, assets, page)
        whole = run_page(run, assets, page)
        assert all(f'data-part="{name}"' in whole for name in parts)
        for name, text in parts.items():
            holes = {
                attributes["data-part"]
                for _, attributes in Page(f"<main>{text}</main>").tags
                if "data-part" in attributes
            }
            assert holes <= parts.keys() - {name}
    card = page_parts(run, assets, "story_1")["shot:story_1:shot_01"]
    assert card in run_page(run, assets, "story_1") and "lanterns" in card
    with pytest.raises(KeyError):
        page_parts(run, assets, "story_9")


def test_two_large_runs_are_compared_on_one_page_without_pictures(root: Path) -> None:
    page = Page(write_comparison(root, root, root / "both.html").read_text())
    videos = page.all("video")
    assert len(videos) == 2 * 26 and all("poster" not in video for video in videos)
    assert not (root / "both_report").exists()


def test_a_small_run_stays_one_page(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=2, num_replicas=1)
    page = Page(write_report(run.root, run.root / "report.html").read_text())
    assert len(page.all("li", "card")) == 2 and not (run.root / "report").exists()
