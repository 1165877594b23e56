"""What a live page shows: the pages and parts of the report, and the clips and pictures of the run, nothing else."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from storymem_dist.errors import RunFolderError
from storymem_dist.observe.live import assets as live_assets
from storymem_dist.observe.live.access import Access
from storymem_dist.observe.live.sources import Sources
from storymem_dist.observe.report.assets import story_file
from storymem_dist.observe.report.html import filled
from storymem_dist.observe.report.page import page_parts
from tests.helpers.fake_run import FakeRun, whole_run
from tests.helpers.live_page import CONTROL, ONLY_READING, TOKEN, Clock, LivePage, live_page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return whole_run(tmp_path_factory.mktemp("live") / "run", num_stories=2, num_shots=2, num_replicas=1)


@pytest.fixture(scope="module")
def page(run: FakeRun) -> Iterator[LivePage]:
    with live_page(run.root) as page:
        yield page


def media_in(text: str, kind: str) -> list[str]:
    return re.findall(rf'="((?:\.\./)?{kind}/[^"]+)"', text)


def data_in(text: str) -> dict[str, object]:
    return json.loads(re.search(r"const storymemLive = (\{.*\});", text)[1])  # type: ignore[index]


@pytest.mark.parametrize("address", ["/", "/report.html"])
def test_the_index_is_the_report(page: LivePage, run: FakeRun, address: str) -> None:
    answer = page.get(address)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    (live,) = page.hub.sources.runs.values()
    parts = page_parts(live.view, live.assets_of(""), "")
    assert filled(parts, parts["stories"]) in answer.text and parts["head"] in answer.text
    assert len(media_in(answer.text, "media")) == 2 * 2 + 2
    assert data_in(answer.text)["digests"] == page.get("/parts").json()["digests"]


def test_a_story_has_a_page_of_its_own(page: LivePage) -> None:
    answer = page.get("/report/story_1.html")
    assert answer.status_code == 200
    clips = media_in(answer.text, "media")
    assert clips and all(clip.startswith("../media/stories/story_1/") for clip in clips)
    assert data_in(answer.text)["base"] == "../" and data_in(answer.text)["page"] == "story_1"
    parts = page.get("/parts", params={"page": "story_1", "name": "head"}).json()
    assert list(parts["parts"]) == ["head"] and "story_1" in parts["parts"]["head"]


@pytest.mark.parametrize(
    "address", ["/report/story_9.html", "/report/", "/report/story_0", "/parts?page=x", "/events?page=x", "/no"]
)
def test_what_is_not_there_is_404(page: LivePage, address: str) -> None:
    answer = page.get(address)
    assert answer.status_code == 404 and answer.json()["error"]


def test_asking_for_headers_alone_opens_no_stream(page: LivePage) -> None:
    answer = page.send(("HEAD", "/events?page="))[0]
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert page.hub.num_followers == 0


def test_the_scripts_of_a_page_are_allowed_by_their_content_and_no_others(page: LivePage) -> None:
    import base64
    import hashlib

    answer = page.get("/")
    policy = answer.headers["content-security-policy"]
    scripts = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    assert len(scripts) == 2
    allowed = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts}
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert set(directives["script-src"].split()) == allowed
    assert directives["default-src"] == directives["frame-ancestors"] == directives["base-uri"] == "'none'"
    assert not re.search(r"\son\w+=", answer.text), "no handlers in attributes"


def test_buttons_are_offered_only_with_control(run: FakeRun, page: LivePage) -> None:
    assert data_in(page.get("/").text)["control"] is True
    with live_page(run.root, access=ONLY_READING) as other:
        assert data_in(other.get("/").text)["control"] is False


# -- media -------------------------------------------------------------------------------------------------------------


def test_clips_come_whole_and_in_ranges(page: LivePage, run: FakeRun) -> None:
    (address, *_) = [one for one in media_in(page.get("/").text, "media") if "attempts" in one]
    data = (run.root / address.removeprefix("media/")).read_bytes()
    whole, part, end, beyond = page.send(
        ("GET", address),
        ("GET", address, {"headers": {"range": "bytes=10-19"}}),
        ("GET", address, {"headers": {"range": "bytes=-5"}}),
        ("GET", address, {"headers": {"range": f"bytes={len(data)}-"}}),
    )
    assert whole.content == data and whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes"
    assert part.status_code == 206 and part.content == data[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(data)}"
    assert end.content == data[-5:] and beyond.status_code == 416


def test_what_never_changes_is_kept_by_browsers_and_the_rest_is_checked(page: LivePage) -> None:
    addresses = media_in(page.get("/").text, "media")
    attempt = next(one for one in addresses if "attempts" in one)
    video = next(one for one in addresses if one.endswith("story.mp4"))
    first, second = page.send(("GET", attempt), ("GET", video))
    assert first.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert second.headers["cache-control"] == "private, no-cache"
    again, changed = page.send(
        ("GET", video, {"headers": {"if-none-match": second.headers["etag"]}}),
        ("GET", video, {"headers": {"if-none-match": '"other"'}}),
    )
    assert again.status_code == 304 and not again.content
    assert changed.status_code == 200
    assert page.get("/").headers["cache-control"] == "no-store"


def test_posters_and_keyframes_are_small_pictures(page: LivePage) -> None:
    text = page.get("/").text
    for kind in ("poster", "thumbnail"):
        address = media_in(text, kind)[0]
        answer = page.get(f"/{address}")
        assert answer.content[:3] == b"\xff\xd8\xff" and answer.headers["content-type"] == "image/jpeg"
        assert page.get(f"/{address}", headers={"if-none-match": answer.headers["etag"]}).status_code == 304


def test_nothing_else_of_the_run_folder_is_served(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)
    story = run.root / "stories" / "story_0"
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (story / "out.png").symlink_to(tmp_path / "secret.png")
    (story / "config.png").symlink_to(next((run.root / "config").iterdir()))
    (story / "events.mp4").symlink_to(next((run.root / "events").iterdir()))
    (story / "keyframes" / ".tmp-1-x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (story / "fake.mp4").write_bytes(b"<script>alert(1)</script>")
    (story / "fake.jpg").write_bytes(b"<svg onload='alert(1)'/>")
    (story / "folder.png").mkdir()
    (run.root / "wandb").mkdir()
    shutil.copy(story / "shot_01.mp4", run.root / "wandb" / "clip.mp4")
    (story / "own.mp4").symlink_to(story / "shot_01.mp4")
    (story / "deep.mp4").symlink_to(story / "shot_01.mp4")
    refused = [
        *("storymem_run.json", "config/c0ffee.yaml", "events", "stories", "stories/story_0/", "", "wandb/clip.mp4"),
        *(f"stories/story_0/{name}" for name in ("out.png", "config.png", "events.mp4", "fake.mp4", "fake.jpg")),
        *("stories/story_0/folder.png", "stories/story_0/shot_01.json", "stories/story_0/keyframes/.tmp-1-x.png"),
        *("../run/stories/story_0/shot_01.mp4", "/etc/passwd", str(story / "shot_01.mp4"), "stories/story_0/no.mp4"),
    ]
    with live_page(run.root) as page:
        for kind in ("media", "poster", "thumbnail"):
            for path in refused:
                answer = page.get(f"/{kind}/{path.replace('..', '%2e%2e')}")
                assert answer.status_code == 404, (kind, path)
        assert page.get("/media/stories/story_0/own.mp4").status_code == 200, "a link inside is as good as a file"


def test_a_link_that_is_put_there_after_the_check_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)
    story, outside = run.root / "stories" / "story_0", tmp_path / "outside"
    shutil.copytree(story, outside)
    found = live_assets.find_media(run.root, "stories/story_0/story.mp4")
    monkeypatch.setattr(live_assets, "find_media", lambda *given: found)
    live_assets.open_media(run.root, "stories/story_0/story.mp4")[0].close()
    (story / "story.mp4").unlink()
    (story / "story.mp4").symlink_to(outside / "story.mp4")
    with pytest.raises(OSError):
        live_assets.open_media(run.root, "stories/story_0/story.mp4")
    shutil.rmtree(story)
    story.symlink_to(outside)
    with pytest.raises(OSError):
        live_assets.open_media(run.root, "stories/story_0/story.mp4")


# -- several runs ------------------------------------------------------------------------------------------------------


def test_the_runs_of_a_sweep_are_on_one_page(tmp_path: Path) -> None:
    clock = Clock()
    for name in ("seed=1", "seed=2"):
        whole_run(tmp_path / "sweep" / name, num_stories=1, num_shots=1, num_replicas=1)
    (tmp_path / "sweep" / "seed=3" / "logs").mkdir(parents=True)
    with live_page(tmp_path / "sweep", clock=clock) as page:
        text = page.get("/").text
        assert re.findall(r'href="(runs/[^"]+)"', text) == ["runs/seed%3D1/", "runs/seed%3D2/"]
        assert data_in(text)["control"] is False and "1 of 1" in text
        inside = page.get("/runs/seed%3D2/").text
        assert data_in(inside)["control"] is True and "seed=2" in inside
        (clip, *_) = media_in(inside, "media")
        assert page.get(f"/runs/seed%3D2/{clip}").status_code == 200
        assert page.get("/runs/seed%3D3/").status_code == page.get(f"/{clip}").status_code == 404
        assert page.ask(address="/runs/seed%3D2/control", action="pause").status_code == 200
        assert page.ask(action="pause").status_code == 404, "which run?"
        assert [len(list((tmp_path / "sweep" / name).glob("requests/*/*"))) for name in ("seed=1", "seed=2")] == [0, 1]
        whole_run(tmp_path / "sweep" / "seed=3", num_stories=1, num_shots=1, num_replicas=1)
        assert "seed=3" not in page.get("/").text, "a sweep is looked at every ten seconds"
        clock.now += 10
        assert "runs/seed%3D3/" in page.get("/").text


def test_runs_of_the_same_name_are_two(tmp_path: Path) -> None:
    odd = os.fsdecode(b"c/run\xff")  # a name that is no text
    for name in ("a/run", "b/run", odd):
        whole_run(tmp_path / name, num_stories=1, num_shots=1, num_replicas=1)
    with live_page(*(tmp_path / name for name in ("a/run", "b/run", odd))) as page:
        addresses = re.findall(r'href="(runs/[^"]+)"', page.get("/").text)
        assert addresses == ["runs/run/", "runs/run-2/", "runs/run%EF%BF%BD/"]
        assert [page.get(f"/{one}").status_code for one in addresses] == [200] * 3


@pytest.mark.parametrize("made", [False, True])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="is not a run folder"):
        Sources([tmp_path / "x"])


def test_names_of_any_bytes_break_no_page(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)
    name = os.fsdecode(b'b\xff"<script>')
    (run.root / "stories" / name).mkdir()
    with live_page(run.root) as page:
        index, parts = page.get("/"), page.get("/parts")
        assert index.status_code == parts.status_code == 200
        assert "<script>" not in parts.text and index.text.count("<script>") == 2
        assert page.get(f"/report/{quote(story_file(name))}").status_code == 200
        headers = {"content-type": "application/json", "x-storymem-token": TOKEN}
        body = json.dumps({"action": "skip", "story_id": name}).encode()
        answer = page.send(("POST", "/control", {"content": body, "headers": headers}))[0]
        assert answer.status_code == 400 and answer.json()["error"]


def test_a_path_that_cannot_be_looked_at_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be read as a run folder: File name too long"):
        Sources([tmp_path / ("x" * 300)])


def test_a_run_folder_that_goes_away_is_said_and_the_page_stays(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)
    clock = Clock()
    with live_page(run.root, clock=clock, access=CONTROL) as page:
        assert page.get("/").status_code == 200
        shutil.rmtree(run.root)
        clock.now += 2
        assert 'data-state="finished"' in page.get("/").text
        assert page.get("/parts").json()["trouble"].startswith(f"{run.root} is not a run folder any more")
        answer = page.ask(action="pause")
        assert answer.status_code == 507 and "is not a run folder" in answer.json()["error"]
        FakeRun(run.root, num_stories=2, num_shots=1)  # another run at the same place
        clock.now += 2
        other = page.get("/parts").json()
        assert other["trouble"] == "" and "about:story_1" in other["parts"]
        assert "finished" not in other["parts"]["head"]


def test_the_token_of_a_page_stands_nowhere_in_it(page: LivePage) -> None:
    assert isinstance(CONTROL, Access) and CONTROL.token is not None
    for address in ("/", "/report/story_0.html", "/parts"):
        assert CONTROL.token not in page.get(address).text
