import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import storymem_dist.events as ev
from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.cli.report import main
from storymem_dist.errors import RunFolderError, StoryMemError
from storymem_dist.observe.report import write_comparison, write_report
from storymem_dist.observe.report.lineage import edges
from storymem_dist.observe.report.model import read_run
from storymem_dist.observe.report.timeline import make_axis
from storymem_dist.story.schema import Scene, Shot, Story
from tests.helpers.fake_run import START_TIME, FakeRun, whole_run


class Page(HTMLParser):
    """The parts of a page that tests ask for; fails on tags that do not match."""

    VOID = ("meta", "link", "img", "input", "br", "circle", "rect", "line", "image")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += f" {data}"

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.tags if t == tag and css_class in [*a.get("class", "").split(), ""]]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return whole_run(tmp_path_factory.mktemp("runs") / "ünï code & co", num_stories=2, num_shots=3, max_keyframes=2)


def report(run: FakeRun, **options: object) -> Page:
    return Page(write_report(run.root, run.root / "report.html", **options).read_text(encoding="utf-8"))


def test_every_clip_and_story_is_linked_relatively_with_its_first_frame(complete: FakeRun) -> None:
    page = report(complete)
    videos = page.all("video")
    assert len(videos) == 2 + 6
    for video in videos:
        assert (complete.root / unquote(video["src"])).is_file() and not video["src"].startswith(("/", "http"))
    clips = [video for video in videos if "clip.mp4" in video["src"]]
    assert all(video["poster"].startswith("data:image/jpeg;base64,") for video in clips)
    assert {len(video["poster"]) > 1000 for video in clips} == {True}


def test_a_page_elsewhere_links_to_the_folder_from_where_it_is(complete: FakeRun, tmp_path: Path) -> None:
    path = write_report(complete.root, tmp_path / "pages" / "one.html")
    for video in Page(path.read_text(encoding="utf-8")).all("video"):
        assert (path.parent / unquote(video["src"])).is_file()


def test_lineage_edges_are_the_recalls_of_the_records(complete: FakeRun) -> None:
    page = report(complete)
    drawn = sorted((edge["data-from"], edge["data-to"]) for edge in page.all("g", "shown"))
    recorded = []
    for path in complete.root.glob("stories/*/shot_*.json"):
        record = ShotRecord.from_json(json.loads(path.read_text()))
        for decision in record.memory["recalled"]:
            if decision["verdict"] != "evicted":
                recorded.append((f"{decision['shot_index']}:{decision['slot']}", record.shot_id))
    assert drawn == sorted(recorded) and drawn
    labels = [edge["aria-label"] for edge in page.all("g", "edge")]
    assert all("shown to shot_" in label and "quality 4.500" in label for label in labels)
    gone = [(edge["data-from"], edge["data-to"]) for edge in page.all("g", "gone")]
    assert gone == [("0:1", "shot_03")] * 2, "of three keyframes the window holds the first and the newest"
    view = read_run(complete.root)
    assert sum(len(edges(story)) for story in view.stories) == len(drawn)


def test_prompts_numbers_and_settings_are_on_the_page(complete: FakeRun) -> None:
    text = report(complete).text
    for fact in ("“glass”", "seed 1", "MI2V", "1.50 s/it", "6 of 6", '"num_inference_steps": 4', "28.6 GB"):
        assert fact in text, fact
    assert complete.run_id in text


def test_reused_steps_are_on_the_cards_in_the_table_and_compared(tmp_path: Path) -> None:
    runs = [
        whole_run(tmp_path / name, num_stories=1, num_shots=1, num_replicas=1, reused_steps=reused)
        for name, reused in (("a", ()), ("b", (2, 3, 4)))
    ]
    without, reusing = (report(run).text for run in runs)
    assert "steps reused" in without and "of 4 steps reused" not in without
    assert "3 of 4 steps reused" in reusing and "75.0 %" in reusing
    both = Page(write_comparison(runs[0].root, runs[1].root, tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "share of steps reused (%) 0 75" in both.text


def test_measurements_of_replicas_are_in_the_throughput_table_and_summed(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=1)
    for number, seconds in ((0, 2.5), (1, 4.0)):
        with run.replica(number, num_replicas=2) as replica:
            for sample in (
                ev.ThroughputSampled(bytes_read=10_000_000),
                ev.ThroughputSampled(queue_depth=number),
                ev.ThroughputSampled(queue_depth=3),
                ev.ThroughputSampled(collective_seconds=seconds, gpu_memory_gib=20.0 + number),
                ev.ThroughputSampled(collective_seconds=seconds, bytes_read=500_000),
            ):
                replica.observers.notify(sample)
            run.finish(replica)
    text = report(run).text
    assert re.search(r"replica 0 .*? 5\.0 s +10\.5 MB +20\.0 GiB +1\.5 ", text)
    assert re.search(r"replica 1 .*? 8\.0 s +10\.5 MB +21\.0 GiB +2\.0 ", text)
    assert re.search(r" all .*? 13\.0 s +21\.0 MB +21\.0 GiB +1\.8 ", text)


def test_shots_on_the_timeline_are_named_whole_or_not_at_all(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=4, num_replicas=1)
    page = report(run)
    assert page.all("span", "shot"), "the picture has a block for each attempt"
    written = (run.root / "report.html").read_text(encoding="utf-8")
    labels = re.findall(r'<span class="shot finished"[^>]*>([^<]*)</span>', written)
    assert len(labels) == 4 and {"story_0/shot_01", "shot_01"} & set(labels)
    assert set(labels) <= {f"{before}{n:02d}" for before in ("story_0/shot_", "shot_", "") for n in range(1, 5)} | {""}


def test_what_a_storyboard_says_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)> \"quoted\" 'too' & </script><script>alert(2)</script>"
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    shot = Shot(index=0, index_in_scene=0, scene_num=1, prompt=evil, cut=True)
    scenes = (Scene(scene_num=1, shots=(shot,)),)
    run.stories = [Story(story_id="story_0", name=evil, overview=evil, scenes=scenes)]
    run.folder.write_storyboard(run.stories[0])
    with run.replica(0) as replica:
        run.shot(replica, 0, 0, fail=evil)
        replica.observers.notify(ev.StoryFinished(story_id="story_0", outcome="failed", message=evil))
        replica.observers.notify(ev.WarningIssued(message=evil))
        replica.observers.notify(ev.StopRequested(reason=evil))
    path = write_report(run.root, run.root / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.all("img") == [] and len(page.all("script")) == 1
    assert page.text.count("alert(2)") >= 5, "it is shown as text"
    assert html.escape(evil) in path.read_text(encoding="utf-8")


def test_the_page_names_no_address_outside_itself(complete: FakeRun) -> None:
    text = write_report(complete.root, complete.root / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=\"(?:https?:)?//", text) == []
    assert "url(" not in text and "@import" not in text and "fetch(" not in text


def test_an_unfinished_run_shows_what_runs_and_what_waits(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=3)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0)
        run.shot(replica, 0, 1, stop_after_step=3)
        now = replica.clock.now
    page = report(run, now=now + 10)
    assert "running" in page.text and "step 3 of 4" in page.text and "1 of 3" in page.text
    (bar,) = page.all("progress")
    assert (bar["value"], bar["max"]) == ("3", "4")
    later = read_run(run.root, now=now + 3600)
    assert later.status == "incomplete"
    assert [shot.status for shot in later.stories[0].shots] == ["finished", "running", "waiting"]


def test_failures_and_restarts_of_a_broken_run_are_shown(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=2)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0, stop_after_step=1)
    with run.replica(0, at=START_TIME + 9000) as replica:
        run.shot(replica, 0, 0, resume_at=1)
        run.shot(replica, 1, 0, fail="NaN in latents")
        run.finish(replica, outcome="failed")
    page = report(run)
    assert "incomplete" in page.text and "NaN in latents" in page.text
    assert "2 replica starts, 1 shot resumed from a checkpoint, 1 attempt interrupted." in page.text
    assert [block["data-tip"].split(":")[1].split(",")[0].strip() for block in page.all("span", "shot")] == [
        "interrupted",
        "finished",
        "failed",
    ]
    axis = make_axis(read_run(run.root).state)
    assert len(axis.stretches) == 2 and axis.seconds < 60, "the hours between stop and restart are cut out"
    assert len(page.all("span", "break")) == 1


def test_records_count_when_events_are_lost(complete: FakeRun, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(complete.root, copy)
    shutil.rmtree(copy / "events")
    view = read_run(copy)
    assert view.status == "finished"
    assert [len(story.shots) for story in view.stories] == [3, 3]
    assert all(shot.recalled or shot.shot_index == 0 for shot in view.shots)
    write_report(copy, copy / "report.html")


def test_damaged_records_and_missing_clips_leave_gaps_not_crashes(complete: FakeRun, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(complete.root, copy)
    (copy / "stories" / "story_0" / "shot_02.json").write_text("{broken")
    for clip in copy.glob("stories/story_1/shot_01/attempts/*/*"):
        clip.unlink()
    (copy / "events" / "start01-r0.jsonl").write_bytes(b"\xff\xfe not an event\n")
    page = Page(write_report(copy, copy / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("li", "card")) == 6


def test_an_empty_run_folder_gives_a_page(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=0)
    assert "No story has begun yet." in report(run).text


def test_embedding_puts_the_clips_into_the_page_and_refuses_too_much(
    complete: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(complete.root, tmp_path / "one.html", embed=True)
    videos = Page(path.read_text(encoding="utf-8")).all("video")
    assert all(video["src"].startswith("data:video/mp4;base64,") for video in videos)
    monkeypatch.setattr("storymem_dist.observe.report.assets.MAX_EMBEDDED_MIB", 0.001)
    with pytest.raises(StoryMemError, match=r"--embed: the clips of .* a page may hold 0\.001"):
        write_report(complete.root, tmp_path / "two.html", embed=True)


def test_two_runs_are_compared_shot_by_shot(complete: FakeRun, tmp_path: Path) -> None:
    other = FakeRun(tmp_path / "other", num_stories=1, num_shots=3, max_keyframes=1)
    other.folder.write_config("decade", '{"sampler": {"num_inference_steps": 6}, "model": {"dtype": "float32"}}')
    with other.replica(0) as replica:
        for shot in range(2):
            other.shot(replica, 0, shot)
    page = Page(write_comparison(complete.root, other.root, tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "sampler.num_inference_steps" in page.text and "model.dtype" not in page.text
    assert "shown 1 keyframes in both, 1 only in A, 0 only in B" in page.text
    assert len(page.all("button", "together")) == 2, "only shots that both have can be played together"
    identities = [card["id"] for card in page.all("li", "card") if "id" in card]
    assert len(identities) == len(set(identities))


def test_the_command_writes_the_page_and_names_it(
    complete: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(complete.root)]) == 0
    assert capsys.readouterr().out.strip() == str(complete.root / "report.html")
    monkeypatch.chdir(tmp_path)
    assert main([str(complete.root), str(complete.root)]) == 0
    assert (tmp_path / "comparison.html").is_file()
    capsys.readouterr()
    assert main([str(tmp_path)]) == RunFolderError.exit_code
    assert "is not a run folder" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main([str(complete.root), "-o", str(blocked / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["storymem_dist.cli.report", "storymem_dist.observe.wandb.media"])
def test_what_reads_a_run_folder_starts_without_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
