"""A run folder that somebody else made: reports read nothing outside it, wait for nothing and never end in an error."""

import base64
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from storymem_dist.artifacts import records
from storymem_dist.artifacts.video import VideoSettings, write_clip, write_png
from storymem_dist.files import canonical_json
from storymem_dist.observe.report import write_comparison, write_report
from storymem_dist.observe.report.model import read_run
from tests.helpers.fake_run import whole_run
from tests.unit.observe.test_report import Page

SECRET = "a secret of the person who opens the page"
_watched: list[tuple[Path, list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        for folder, opened in _watched:
            if Path(os.path.realpath(os.fsdecode(arguments[0]))).is_relative_to(folder):
                opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_hook)


@contextmanager
def nothing_opened_in(folder: Path) -> Iterator[None]:
    opened: list[str] = []
    _watched.append((folder.resolve(), opened))
    try:
        yield
    finally:
        _watched.pop()
    assert opened == []


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("given") / "run", num_stories=2, num_shots=2, num_replicas=1).root


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def outside(original: Path, tmp_path: Path) -> Path:
    """What the viewer could read: a run, a clip, a picture and a text, all with a secret in them."""
    folder = tmp_path / "outside"
    shutil.copytree(original, folder / "run")
    pixels = torch.full((3, 3, 32, 48), 77, dtype=torch.uint8)
    write_clip(folder / "clip.mp4", pixels, 16, VideoSettings(preset="ultrafast"))
    write_png(folder / "picture.png", pixels[0])
    for path in (*folder.glob("*.*"), *(folder / "run").rglob("*.mp4"), *(folder / "run").rglob("*.png")):
        with path.open("ab") as file:
            file.write(SECRET.encode() * 20)
    return folder


def change_record(path: Path, **changes: object) -> None:
    """Change a record, with a checksum that fits: its maker knows this program."""
    value = json.loads(path.read_text()) | changes
    host = {key: part for key, part in value["host"].items() if key != "checksum"}
    value["host"] = {**host, "checksum": records._checksum({**value, "host": host})}
    path.unlink()
    path.write_bytes(canonical_json(value))


def record_paths(run: Path) -> list[Path]:
    return sorted(run.glob("stories/*/shot_*.json"))


PLACES: dict[str, Callable[[Path], Path]] = {
    "clip": lambda run: next(run.glob("stories/story_0/shot_01/attempts/*/clip.mp4")),
    "keyframe": lambda run: next(run.glob("stories/story_0/shot_01/attempts/*/keyframe_0.png")),
    "story video": lambda run: run / "stories/story_0/story.mp4",
    "record": lambda run: run / "stories/story_0/shot_01.json",
    "storyboard": lambda run: run / "stories/story_0/storyboard.json",
    "reference": lambda run: run / "stories/story_0/references/reference_0.jpg",
    "story": lambda run: run / "stories/story_0",
    "shot": lambda run: run / "stories/story_0/shot_01",
    "stories": lambda run: run / "stories",
    "config": lambda run: run / "config/c0ffee.yaml",
    "configs": lambda run: run / "config",
    "events": lambda run: run / "events",
    "requests": lambda run: run / "requests",
    "request": lambda run: run / "requests/000/000001.json",
    "events of a writer": lambda run: next((run / "events").glob("*.jsonl")),
}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_link_that_leads_out_is_not_followed(run: Path, outside: Path, place: str, embed: bool) -> None:
    path = PLACES[place](run)
    same = outside / "run" / path.relative_to(run)
    target = same if same.exists() else outside / "picture.png"
    remove(path)
    path.symlink_to(target)
    with nothing_opened_in(outside):
        page = write_report(run, run / "report.html", embed=embed)
    if target.is_file():
        assert base64.b64encode(target.read_bytes()).decode() not in page.read_text()
    Page(page.read_text())


@pytest.mark.parametrize("make", ["pipe", "socket", "folder", "device", "loop", "dangling", "self"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_left_out_at_once(run: Path, place: str, make: str, tmp_path: Path) -> None:
    path = PLACES[place](run)
    remove(path)
    if make == "pipe":
        os.mkfifo(path)
    elif make == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif make == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": "nowhere", "self": run}[make])
    began = time.monotonic()
    Page(write_report(run, run / "report.html", embed=True).read_text())
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "name", ["../../../../../outside/clip.mp4", "{outside}/clip.mp4", "/dev/zero", "record.json", "\x00", "n" * 5000]
)
def test_a_record_that_names_another_file_as_its_clip_shows_no_clip(run: Path, outside: Path, name: str) -> None:
    path = record_paths(run)[0]
    value = json.loads(path.read_text())
    clip = name.format(outside=outside)
    change_record(path, clip=clip, files=value["files"] | {clip: value["files"]["clip.mp4"]})
    with nothing_opened_in(outside):
        text = write_report(run, run / "report.html", embed=True).read_text()
    assert len(Page(text).all("video")) == 2 + 3


def test_reference_images_are_never_read_from_where_a_storyboard_says(run: Path, outside: Path) -> None:
    board = run / "stories/story_0/storyboard.json"
    value = json.loads(board.read_text())
    value["reference_images"] = [str(outside / "picture.png"), "../../../outside/picture.png"]
    board.write_text(json.dumps(value))
    with nothing_opened_in(outside):
        write_report(run, run / "report.html", embed=True)


def test_a_playlist_named_as_a_clip_opens_no_other_file(run: Path, outside: Path) -> None:
    clip = PLACES["clip"](run)
    for content in (
        f"#EXTM3U\n#EXTINF:1,\nfile://{outside}/clip.mp4\n",
        f"ffconcat version 1.0\nfile {outside}/clip.mp4\n",
    ):
        clip.write_text(content)
        page = Page(write_report(run, run / "report.html").read_text())
        assert "its clip is missing or cannot be used" in page.text


def test_a_run_folder_that_is_a_link_itself_is_reported_as_usual(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    page = Page(write_report(tmp_path / "link", tmp_path / "link" / "report.html", embed=True).read_text())
    assert len(page.all("video")) == 2 + 4
    assert all(video["src"].startswith("data:video/mp4") for video in page.all("video"))


def test_huge_files_are_left_out_and_named(run: Path) -> None:
    with (run / "stories/story_0/shot_01.json").open("r+b") as file:
        file.truncate(10 * 2**30)
    with (run / "events/huge.jsonl").open("wb") as file:
        file.truncate(200 * 2**20)
    began = time.monotonic()
    page = Page(write_report(run, run / "report.html").read_text())
    assert "stories/story_0/shot_01.json" in page.text and "larger than" in page.text
    assert re.search(r"events: \d+ lines are no events", page.text)
    assert time.monotonic() - began < 20
    assert read_run(run).state.num_events > 20, "the other event files are read"


EVIL = "<x-evil zz='1' \"q\" onload=alert(1)></script></style>"
VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        2**63,
        10**30,
        1e308,
        -1e308,
        1e-320,
        "",
        EVIL,
        "../../x",
        "/etc/passwd",
        "\u202e\x1b[2J\r\n",
        "\x00",
    ),
    *([], {}, [[]], [None], {"a": 1}, {EVIL: EVIL}, "x" * 100_000, "tip", "stories"),
    json.loads("[" * 60 + "]" * 60),
]


def mutate(value: Any, random: Random) -> Any:
    """``value`` with one part, chosen at random, replaced by something unexpected, dropped or repeated."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(sorted(value))
        if random.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: mutate(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        index = random.randrange(len(value))
        if random.random() < 0.15:
            return [*value, value[index]]
        return [*value[:index], mutate(value[index], random), *value[index + 1 :]]
    return random.choice(VALUES)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_json_of_a_run_says_the_page_is_whole_and_holds_no_markup_of_it(
    run: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(seed)
    for path in record_paths(run):
        value = json.loads(path.read_text())
        for _ in range(random.randrange(3)):
            value = mutate(value, random)
        if isinstance(value, dict) and isinstance(value.get("host"), dict):
            path.write_bytes(canonical_json(value))
            change_record(path)
    for path in run.glob("stories/*/storyboard.json"):
        path.write_bytes(canonical_json(mutate(json.loads(path.read_text()), random)))
    for path in (run / "events").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for index in random.sample(range(len(lines)), min(len(lines), 12)):
            lines[index] = mutate(lines[index], random)
        random.shuffle(lines) if seed % 3 == 0 else None
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in run.glob("config/*.yaml"):
        path.write_text(json.dumps(mutate(json.loads(path.read_text()), random)))
    if seed % 2:
        monkeypatch.setattr("storymem_dist.observe.report.page.MAX_SHOTS", 0)
    pages = [write_report(run, run / "report.html"), write_comparison(run, run, run / "both.html")]
    for path in (*pages, *run.glob("report/*")):
        page = Page(path.read_text())
        assert all(
            tag != "x-evil" and "onload" not in attributes and "zz" not in attributes for tag, attributes in page.tags
        )
        assert len(page.all("script")) == len(page.all("style")) == 1
        fixed = {"stories", "memory", "timeline", "throughput", "failures", "settings", "tip", "theme"}
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert all(ids.count(name) <= 1 for name in fixed)


@pytest.mark.parametrize("story_id", ["tip", "stories", "memory", "theme", "filter", "stories-title"])
def test_a_story_may_be_called_like_a_part_of_the_page(run: Path, story_id: str) -> None:
    (run / "stories/story_0").rename(run / "stories" / story_id)
    for path in (run / "stories" / story_id).glob("shot_*.json"):
        change_record(path, story_id=story_id)
    for path in (run / "events").glob("*.jsonl"):
        path.write_text(path.read_text().replace("story_0", story_id))
    page = Page(write_report(run, run / "report.html").read_text())
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and f"story:{story_id}" in ids
    targets = {a["href"].removeprefix("#") for a in page.all("a") if "href" in a}
    assert targets <= set(ids), "every link has its target"
    assert f"shot:{story_id}:shot_01" in targets
