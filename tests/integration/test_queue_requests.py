"""Requests to the queue of a run folder, while a batch is rendered and between two jobs, on the fake renderer."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.requests import QueueState, Request, RequestLog
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.dispatch.plan import plan_part
from storymem_dist.dispatch.protocol import RenderedShot, ShotHistory, ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.summary import BatchSummary
from storymem_dist.errors import RunFolderError, StoryboardError
from storymem_dist.events import (
    Event,
    RequestApplied,
    ShotFailed,
    ShotStarted,
    StopRequested,
    StoryStarted,
    WarningIssued,
)
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import Story
from tests.helpers.batches import render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files, make_part, make_story


class Asking:
    """A ``before_step`` that publishes requests before the given step of a shot, once."""

    def __init__(self, root: Path, at: str, *requests: Request) -> None:
        self._log, self._at, self._requests = RequestLog(root), at, list(requests)

    def __call__(self, job: ShotJob, step: int) -> None:
        if f"{job.story_id}:{job.shot_id}:{step}" == self._at:
            while self._requests:
                self._log.publish(self._requests.pop(0))


def ask(root: Path, *requests: Request) -> None:
    for request in requests:
        RequestLog(root).publish(request)


def rerender(story_id: str, *shots: str, only: bool = False) -> Request:
    return Request(action="rerender", story_id=story_id, shots=shots, only=only)


def add(story: Story) -> Request:
    return Request(action="add", story_id=story.story_id, story=story)


def planned(root: Path, stories: list[Story]) -> dict[str, str]:
    """The fingerprint that the newest plan has for each shot."""
    part = make_part(root, stories)
    return {
        f"{story.story_id}:{shot.shot_id}": shot.fingerprint
        for story, shots in plan_part(0, part)
        if not isinstance(shots, StoryboardError)
        for shot in shots
    }


def shown(root: Path) -> dict[str, ShotRecord]:
    """The records that people see."""
    return {
        f"{path.parent.name}:{path.stem}": ShotRecord.from_json(json.loads(path.read_text()))
        for path in root.glob("stories/*/shot_*.json")
    }


def check_finished(root: Path, stories: list[Story]) -> None:
    wanted = planned(root, stories)
    assert {name: record.fingerprint for name, record in shown(root).items() if name in wanted} == wanted
    for story in stories:
        made_of = json.loads((root / "stories" / story.story_id / "story.json").read_text())["fingerprints"]
        assert made_of == [wanted[f"{story.story_id}:{shot.shot_id}"] for shot in story.shots]
    assert not list((root / "checkpoints").rglob("*.safetensors"))
    assert not list((root / "leases").glob("*"))


OCEAN, CITY = make_story("ocean", 3), make_story("city", 2)


def test_a_story_is_added_while_another_is_rendered(tmp_path: Path) -> None:
    root, events, late = tmp_path / "run", Events(), make_story("late", 2)
    renderer = FakeRenderer(before_step=Asking(root, "city:shot_02:1", add(late)))
    summary = render(root, [OCEAN, CITY], renderer=renderer, events=events)
    assert (summary.state, summary.num_stories, summary.num_rendered) == ("done", 3, 7)
    check_finished(root, [OCEAN, CITY, late])
    (applied,) = events.of(RequestApplied)
    assert applied.action == "add" and applied.story_id == "late" and "2 of its shots" in applied.message
    assert [event.story_id for event in events.of(StoryStarted)].count("late") == 1

    again = render(root, [OCEAN, CITY], renderer=FakeRenderer(), events=events)
    assert (again.num_rendered, again.num_stories, again.num_skipped) == (0, 3, 7)
    assert [event.at_start for event in events.of(RequestApplied)] == [False, True]  # part of the plan, and no news


def test_added_bytes_are_those_of_the_story_given_at_the_start(tmp_path: Path) -> None:
    late = make_story("late", 2, seed=5)
    RunFolder(tmp_path / "a").open()
    ask(tmp_path / "a", add(late))
    render(tmp_path / "a", [CITY])
    render(tmp_path / "b", [CITY, late])
    a, b = finished_files(tmp_path / "a"), finished_files(tmp_path / "b")
    assert a.keys() == b.keys()
    differing = {name for name in a if a[name] != b[name]}
    assert differing <= {"stories/late/storyboard.json"}, differing


def test_a_story_that_does_not_fit_the_job_is_left_to_another(tmp_path: Path) -> None:
    def refuse(story: Story) -> Story:
        raise StoryboardError("it needs the m2v experts, which this job has not opened")

    root, events, late = tmp_path / "run", Events(), make_story("late", 1)
    part = replace(make_part(root, [CITY], observers=events), admit=refuse)
    renderer = FakeRenderer(before_step=Asking(root, "city:shot_01:1", add(late)))
    summary = render_batch(parts=[part], renderer=renderer, settings=DispatchSettings(poll_seconds=0.01))
    assert (summary.state, summary.num_stories, summary.reason) == ("done", 1, "1 left to another job")
    assert "not added by this job: it needs the m2v experts" in events.of(RequestApplied)[0].message
    assert render(root, [CITY]).num_rendered == 1


def test_first_skip_and_unskip(tmp_path: Path) -> None:
    stories = [make_story(name, 2) for name in "abcd"]
    root = tmp_path / "run"
    asking = Asking(
        root,
        "a:shot_01:1",
        Request(action="skip", story_id="b"),
        Request(action="first", story_id="d"),
        Request(action="first", story_id="c"),
    )
    renderer = FakeRenderer(before_step=asking)
    summary = render(root, stories, renderer=renderer, overlap_saving=False)
    assert summary.state == "done" and summary.reason == "1 skipped on request"
    assert (summary.num_stories, summary.num_stories_done, summary.exit_code) == (4, 3, 0)
    assert [name.partition(":")[0] for name in renderer.rendered] == ["a", "c", "d", "a", "c", "d"] or [
        name.partition(":")[0] for name in renderer.rendered
    ] == ["a", "c", "c", "d", "d", "a"]
    ask(root, Request(action="unskip", story_id="b"))
    assert render(root, stories).num_rendered == 2
    check_finished(root, stories)


def test_skipping_stops_the_running_shot_and_keeps_its_steps(tmp_path: Path) -> None:
    root, events = tmp_path / "run", Events()
    asking = Asking(root, "city:shot_01:2", Request(action="skip", story_id="city"))
    summary = render(root, [CITY, OCEAN], renderer=FakeRenderer(before_step=asking, step_seconds=0.02), events=events)
    assert (summary.state, summary.num_stories_done) == ("done", 1)
    assert not events.of(ShotFailed)
    ask(root, Request(action="first", story_id="city"))
    renderer = FakeRenderer()
    render(root, [CITY, OCEAN], renderer=renderer)
    assert renderer.resumed == [("city:shot_01", 3)]
    check_finished(root, [CITY, OCEAN])


def test_pause_holds_until_resume(tmp_path: Path) -> None:
    root, began = tmp_path / "run", [0.0]

    def resume() -> None:
        ask(root, Request(action="first", story_id="ocean"))
        began.append(time.monotonic())
        ask(root, Request(action="resume"))

    class Waiting(Events):
        def notify(self, event: Event) -> None:
            super().notify(event)
            if isinstance(event, RequestApplied) and event.action == "pause":
                threading.Timer(0.3, resume).start()
            if isinstance(event, ShotStarted):
                began.append(time.monotonic())

    events = Waiting()
    renderer = FakeRenderer(before_step=Asking(root, "city:shot_01:0", Request(action="pause")))
    assert render(root, [OCEAN, CITY], renderer=renderer, events=events, overlap_saving=False).state == "done"
    applied = [(event.number, event.action) for event in events.of(RequestApplied)]
    assert applied == [(1, "pause"), (2, "first"), (3, "resume")]
    assert renderer.rendered[:3] == ["city:shot_01", "ocean:shot_01", "ocean:shot_02"]
    assert began == sorted(began) and began[2] > began[1] + 0.25


def test_a_job_that_begins_in_a_pause_says_so(tmp_path: Path) -> None:
    root, events = tmp_path / "run", Events()
    RunFolder(root).open()
    ask(root, Request(action="pause", who="lea@here"))
    threading.Timer(0.2, ask, (root, Request(action="stop"))).start()
    assert render(root, [CITY], events=events).state == "stopped"
    (warning,) = events.of(WarningIssued)
    assert "paused by lea@here" in warning.message and "storymem-queue resume" in warning.message


def test_strict_resume_allows_what_somebody_asked_for_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "run"
    render(root, [OCEAN])
    ask(root, replace(rerender("ocean", "shot_02"), seed=77), rerender("ocean", "shot_03"))
    edited = make_story("ocean", 3, changed={2: "another end"})
    with pytest.raises(RunFolderError, match=r"strict.*: ocean:shot_03: prompt changed from [^;]*$"):
        render(root, [edited], resume="strict")
    assert render(root, [OCEAN], resume="strict").num_rendered == 2
    with pytest.raises(RunFolderError, match=r"shot_01: seed changed"):
        render(root, [replace(OCEAN, seed=5)], resume="strict")
    assert render(root, [OCEAN], resume="strict", rerender=("ocean:1",)).num_rendered == 3


def test_stop_ends_after_the_running_shot_and_now_after_the_running_step(tmp_path: Path) -> None:
    for now in (False, True):
        root, events = tmp_path / f"run_{now}", Events()
        renderer = FakeRenderer(
            before_step=Asking(root, "ocean:shot_01:0", Request(action="stop", now=now, who="lea@here")),
            step_seconds=0.02,
        )
        summary = render(root, [OCEAN], renderer=renderer, events=events)
        assert (summary.state, summary.num_rendered) == ("stopped", 0 if now else 1)
        assert {event.reason for event in events.of(StopRequested)} == {"stop requested by lea@here"}
        again = FakeRenderer()
        assert render(root, [OCEAN], renderer=again).state == "done"  # it was for the job before
        assert again.resumed == ([("ocean:shot_01", 1)] if now else [])
        check_finished(root, [OCEAN])


@pytest.mark.parametrize("when", ["resting", "running", "while it is rendered"])
def test_a_shot_is_rendered_again_with_those_that_need_it(tmp_path: Path, when: str) -> None:
    root, request = tmp_path / "run", rerender("ocean", "shot_02")
    if when == "resting":
        render(root, [OCEAN, CITY])
        ask(root, request)
        renderer = FakeRenderer()
    else:
        at = "city:shot_02:0" if when == "running" else "ocean:shot_02:1"
        renderer = FakeRenderer(before_step=Asking(root, at, request), step_seconds=0.02)
    summary = render(root, [OCEAN, CITY], renderer=renderer)
    assert summary.state == "done"
    check_finished(root, [OCEAN, CITY])
    assert shown(root)["ocean:shot_01"].inputs.get("forced_rerenders") is None
    assert shown(root)["ocean:shot_02"].inputs["forced_rerenders"] == 1
    if when == "resting":
        assert renderer.rendered == ["ocean:shot_02", "ocean:shot_03"]


def test_a_late_commit_of_the_shot_before_does_not_hide_the_newest(tmp_path: Path) -> None:
    """Another job renders a shot again in the last step of this one, which saves it before it looks for requests."""
    root, story = tmp_path / "run", make_story("ocean", 1)

    def before_step(job: ShotJob, step: int) -> None:
        if step == 3:
            ask(root, rerender("ocean", "shot_01"))
            assert render(root, [story], lease_seconds=60.0).num_rendered == 1

    renderer = FakeRenderer(before_step=before_step)
    summary = render(root, [story], renderer=renderer, lease_seconds=60.0, overlap_saving=False)
    assert (summary.state, summary.num_rendered) == ("done", 1)
    check_finished(root, [story])
    record = shown(root)["ocean:shot_01"]
    made = RunFolder(root).shot("ocean", "shot_01").files_of(record) / record.clip
    assert (root / "stories/ocean/shot_01.mp4").read_bytes() == made.read_bytes()


def test_rerender_of_a_whole_story_and_of_a_failed_shot(tmp_path: Path) -> None:
    root, failing = tmp_path / "run", [True]

    def fail(job: ShotJob, step: int) -> None:
        if failing and job.story_id == "ocean" and job.shot_id == "shot_02":
            raise StoryboardError("unlucky")

    assert render(root, [OCEAN, CITY], renderer=FakeRenderer(before_step=fail)).state == "failed"
    failing.clear()
    assert render(root, [OCEAN, CITY]).state == "failed"  # final, until somebody asks
    ask(root, rerender("ocean"))
    renderer = FakeRenderer()
    assert render(root, [OCEAN, CITY], renderer=renderer).state == "done"
    assert renderer.rendered == ["ocean:shot_01", "ocean:shot_02", "ocean:shot_03"]
    check_finished(root, [OCEAN, CITY])


class SamePixels(FakeRenderer):
    """Renders the same pixels again for a shot that is rendered again, as the real one does."""

    def render(self, job: ShotJob, history: ShotHistory, **others: object) -> RenderedShot:  # type: ignore[override]
        alike = replace(job, fingerprint=f"{job.story_id}:{job.shot_id}")
        return super().render(alike, history, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("make_renderer", [FakeRenderer, SamePixels])
def test_only_keeps_the_others_and_says_what_shows_the_earlier_one(
    tmp_path: Path, make_renderer: Callable[[], FakeRenderer]
) -> None:
    root, events = tmp_path / "run", Events()
    render(root, [OCEAN], renderer=make_renderer())
    before = {name: record.attempt_id for name, record in shown(root).items()}
    ask(root, rerender("ocean", "shot_01", only=True))
    renderer = make_renderer()
    assert render(root, [OCEAN], renderer=renderer, events=events).state == "done"
    assert renderer.rendered == ["ocean:shot_01"]
    after = {name: record.attempt_id for name, record in shown(root).items()}
    assert {name for name in after if after[name] != before[name]} == {"ocean:shot_01"}
    check_finished(root, [OCEAN])
    said = [event.message for event in events.of(WarningIssued)]
    if make_renderer is SamePixels:
        assert not said
    else:
        assert len(said) == 1 and "shot_02, shot_03 and the shots that need them" in said[0]
    ask(root, rerender("ocean", "shot_01"))
    renderer = make_renderer()
    render(root, [OCEAN], renderer=renderer)
    assert len(renderer.rendered) == 3


def test_another_seed_for_a_shot_and_for_a_story(tmp_path: Path) -> None:
    root = tmp_path / "run"
    render(root, [OCEAN])
    seeds = [shown(root)[f"ocean:shot_0{number}"].seed for number in (1, 2, 3)]
    ask(root, replace(rerender("ocean", "shot_02", only=True), seed=77))
    renderer = FakeRenderer()
    render(root, [OCEAN], renderer=renderer)
    assert renderer.rendered == ["ocean:shot_02"]
    assert [shown(root)[f"ocean:shot_0{number}"].seed for number in (1, 2, 3)] == [seeds[0], 77, seeds[2]]
    ask(root, replace(rerender("ocean"), seed=100))
    render(root, [OCEAN])
    assert [shown(root)[f"ocean:shot_0{number}"].seed - 100 for number in (1, 2, 3)] == [
        seed - seeds[0] for seed in seeds
    ]
    check_finished(root, [OCEAN])


def test_a_damaged_request_and_one_for_an_unknown_story_change_nothing(tmp_path: Path) -> None:
    root, events = tmp_path / "run", Events()
    log = RequestLog(root)

    def before_step(job: ShotJob, step: int) -> None:
        if (job.story_id, job.shot_id, step) == ("city", "shot_01", 0):
            log.path(1).parent.mkdir(parents=True)
            log.path(1).write_text("{")
            ask(root, Request(action="first", story_id="nobody"), rerender("nobody", "shot_09"))

    assert render(root, [CITY], renderer=FakeRenderer(before_step=before_step), events=events).num_rendered == 2
    messages = [event.message for event in events.of(RequestApplied)]
    assert "is no request" in messages[0]
    assert messages[1:] == ["this job has no story nobody"] * 2


def test_two_parts_follow_their_own_logs(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("one", "two")]
    renderer = FakeRenderer(before_step=Asking(roots[1], "city:shot_01:0", Request(action="skip", story_id="ocean")))
    summary: BatchSummary = render_batch(
        parts=[make_part(root, [CITY, OCEAN]) for root in roots],
        renderer=renderer,
        settings=DispatchSettings(poll_seconds=0.01, lease_seconds=1.0),
    )
    assert summary.state == "done"
    assert (roots[0] / "stories/ocean/story.mp4").exists() and not (roots[1] / "stories/ocean/story.mp4").exists()
    outcomes = [json.loads((root / "stop.json").read_text()) for root in roots]
    assert [outcome["state"] for outcome in outcomes] == ["done", "done"]


def test_state_of_a_log_is_that_of_any_reader(tmp_path: Path) -> None:
    ask(tmp_path, add(OCEAN), Request(action="skip", story_id="ocean"), rerender("ocean", only=True))
    whole, piecewise, log = QueueState(), QueueState(), RequestLog(tmp_path)
    for request in RequestLog(tmp_path).read_new():
        whole.apply(request)
    for request in log.read_new():
        piecewise.apply(request)
    ask(tmp_path, Request(action="pause"))
    for request in log.read_new():
        piecewise.apply(request)
    assert whole != piecewise and piecewise.paused is not None
    whole.apply(piecewise.paused)
    assert whole == piecewise


torch.set_num_threads(1)
