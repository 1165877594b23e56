"""Reading a run folder again and again: only what is new is read, and it says the same as reading all of it."""

from dataclasses import replace
from pathlib import Path

import pytest

import storymem_dist.events as ev
from storymem_dist.artifacts.requests import Request, RequestLog
from storymem_dist.observe.report import write_report
from storymem_dist.observe.report.model import RunReader, read_run
from storymem_dist.observe.report.views import RunView
from storymem_dist.observe.run.files import RunFiles, StoryFiles
from tests.helpers.fake_run import START_TIME, FakeRun
from tests.unit.observe.test_report import Page


def same(one: RunView, other: RunView) -> bool:
    """Whether two views say the same; their states are folded from the same events."""
    return replace(one, state=other.state, written_at=0.0) == replace(other, written_at=0.0)


def test_every_step_of_a_run_is_read_as_if_all_of_it_were_read(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=2)
    reader, now = RunReader(run.root), START_TIME + 60

    def check() -> RunView:
        view = reader.refresh(now)
        assert same(view, read_run(run.root, now=now))
        return view

    assert check().status == "incomplete"
    with run.replica(0) as replica:
        check()
        run.shot(replica, 0, 0)
        view = check()
        assert [shot.status for shot in view.stories[0].shots] == ["finished", "waiting"]
        run.shot(replica, 1, 0, fail="NaN")
        run.shot(replica, 0, 1, stop_after_step=2)
        assert check().stories[0].shots[1].step == 2
    with run.replica(0, at=START_TIME + 50) as replica:  # the start of another process ends the attempt of the first
        assert [shot.status for shot in check().stories[0].shots] == ["finished", "waiting"]
        run.shot(replica, 0, 1)
        run.finish_story(replica, 0)
        run.folder.write_config("newer", '{"model": {"dtype": "bfloat16"}}')
        RequestLog(run.root).publish(Request(action="skip", story_id="story_1"))
        run.finish(replica)
    view = check()
    assert view.stories[0].video and view.config_hash == "newer" and len(view.requests) == 1
    before = view.stories
    assert all(one is other for one, other in zip(reader.refresh(now).stories, before, strict=True))


def test_only_stories_that_changed_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "run", num_stories=3, num_shots=2)
    for number in range(3):
        (run.root / "stories" / f"story_{number}" / "storyboard.json").touch()
    monkeypatch.setattr("storymem_dist.observe.report.model._STILL_NS", 0)
    reader = RunReader(run.root)
    reader.refresh(START_TIME)
    read: list[str] = []
    whole = RunFiles.story

    def story(files: RunFiles, name: str) -> StoryFiles:
        read.append(name)
        return whole(files, name)

    monkeypatch.setattr(RunFiles, "story", story)
    reader.refresh(START_TIME)
    assert read == []
    with run.replica(0) as replica:
        run.shot(replica, 1, 0)
    view = reader.refresh(START_TIME + 20)
    assert read == ["story_1"] and view.stories[1].num_finished == 1


def test_requests_are_shown_with_their_effect_and_where_they_put_a_story(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=3, num_shots=1)
    log = RequestLog(run.root)
    with run.replica(0) as replica:
        for action, story_id in (("skip", "story_0"), ("first", "story_2"), ("pause", "")):
            who = "<b>lea</b>@login1"
            request = log.publish(
                Request(action=action, story_id=story_id, who=who, when=START_TIME - 2, via="live page")
            )
            if action != "pause":
                event = ev.RequestApplied(
                    number=request.number, action=action, story_id=story_id, who=who, asked_at=START_TIME - 2,
                    message=f"{story_id} <i>moved</i>",
                )  # fmt: skip
                replica.observers.notify(event)
        view = read_run(run.root, now=START_TIME)
    assert [one.what for one in view.requests] == ["skip story_0", "first story_2", "pause"]
    assert [one.effect for one in view.requests[:2]] == [
        f"{story_id} <i>moved</i> (after 2.0 s)" for story_id in ("story_0", "story_2")
    ]
    assert view.requests[2].effect == "" and view.paused is view.requests[2]
    first, second, third = view.stories
    assert first.status == "skipped" and first.queue.place is None and third.queue.is_first
    assert (third.queue.place, second.queue.place) == (1, 2)
    text = write_report(run.root, run.root / "report.html", now=START_TIME).read_text()
    page = Page(text)
    assert "<b>" not in text and "<i>" not in text
    assert "Paused by <b>lea</b>@login1" in page.text and "moved to the front" in page.text
    assert "skipped by <b>lea</b>" in page.text and "no shot begins until" in page.text


def test_a_damaged_request_is_named(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    (run.root / "requests" / "000").mkdir(parents=True)
    (run.root / "requests" / "000" / "000001.json").write_text('{"action": "explode"}')
    view = read_run(run.root)
    assert any("000001.json is no request" in note for note in view.left_out)
    assert [one.what for one in view.requests] == ["damaged"]


def test_a_shot_that_is_to_be_rendered_again_waits_and_shows_its_clip_until_then(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=2)
    reader = RunReader(run.root)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0)
        bank = run.banks["story_0"]
        run.shot(replica, 0, 1)
        asked = replica.clock.now + 1
        event = ev.RequestApplied(
            number=1, action="rerender", story_id="story_0", shots=("shot_02",), asked_at=asked
        )  # fmt: skip
        replica.observers.notify(event)
        shots = reader.refresh(asked).stories[0].shots
        assert [shot.status for shot in shots] == ["finished", "waiting"] and shots[1].clip
        replica.clock.pass_(5)
        run.banks["story_0"] = bank
        run.shot(replica, 0, 1)
        assert [shot.status for shot in reader.refresh(asked).stories[0].shots] == ["finished", "finished"]
