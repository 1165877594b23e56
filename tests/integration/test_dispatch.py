"""The whole batch loop over a run folder, with a renderer that draws instead of computing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.events import JobFinished, ShotFinished, StageFinished, StepFinished, StoryFinished
from storymem_dist.render.batch import render_batch
from tests.helpers.batches import STORIES, render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files, make_part, make_story
from tests.helpers.workers import quick_folder


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


def test_a_batch_renders_every_shot_once_and_loads_each_model_once(root: Path) -> None:
    renderer, events = FakeRenderer(), Events()
    summary = render(root, renderer=renderer, events=events)
    assert (summary.state, summary.num_rendered, summary.num_stories_done, summary.exit_code) == ("done", 6, 2, 0)
    assert len(renderer.rendered) == len(set(renderer.rendered)) == 6
    assert renderer.prepared == ["t2v", "m2v"]
    names = set(finished_files(root))
    for story in STORIES:
        folder = f"stories/{story.story_id}"
        assert {f"{folder}/story.mp4"} | {
            f"{folder}/{s.shot_id}.{e}" for s in story.shots for e in ("mp4", "json")
        } <= names
        assert {f"{folder}/keyframes/{s.shot_id}_{slot}.png" for s in story.shots for slot in (0, 1)} <= names
    assert json.loads((root / "stop.json").read_text())["state"] == "done"
    assert list((root / "leases").iterdir()) == []


def test_two_runs_write_the_same_bytes_apart_from_timing_and_host(root: Path) -> None:
    render(root / "one")
    render(root / "two", list(reversed(STORIES)))
    assert finished_files(root / "one") == finished_files(root / "two")


def test_a_record_says_what_was_rendered_from_what_and_how_long_it_took(root: Path) -> None:
    render(root)
    record = json.loads((root / "stories/ocean/shot_03.json").read_text())
    assert (record["prompt"], record["mode"], record["kind"], record["cut"]) == ("ocean, shot 2", "mi2v", "m2v", False)
    assert (record["num_frames"], record["height"], record["width"], record["fps"]) == (8, 32, 48, 16)
    assert [kept["slot"] for kept in record["memory"]["recalled"]] == [0, 1, 0, 1]
    assert record["memory"]["decisions"][0] == {"frame_index": 0, "verdict": "kept", "quality": None}
    assert record["inputs"]["prompt"] == record["prompt"] and record["config_hash"] == "c0ffee"
    before = json.loads((root / "stories/ocean/shot_02.json").read_text())
    assert record["predecessor"] == before["fingerprint"]
    assert set(record["timing"]["stage_seconds"]) == {"denoise", "save"}
    assert record["host"]["replica"] == 0 and record["host"]["resumed_at_step"] is None


def test_observers_receive_the_events_of_a_story_in_order(root: Path) -> None:
    events = Events()
    render(root, [make_story("city", 2)], events=events)
    names = [type(event).__name__ for event in events.seen if not isinstance(event, StepFinished)]
    assert names == [
        "StoryStarted",
        *("ShotStarted", "ThroughputSampled", "StageStarted", "StageFinished"),  # load
        *("StageStarted", "StageFinished", "ShotFinished"),  # save
        *("ShotStarted", "ThroughputSampled", "StageStarted", "StageFinished"),  # load
        *("StageStarted", "StageFinished", "ShotFinished"),  # save
        *("StageStarted", "StageFinished", "StoryFinished"),  # join: the story video
        "JobFinished",
    ]
    assert [event.stage for event in events.of(StageFinished)] == ["load", "save", "load", "save", "join"]
    finished = events.of(ShotFinished)[0]
    assert (root / finished.clip).is_file() and all((root / path).is_file() for path in finished.keyframes)
    assert (root / events.of(StoryFinished)[0].video).is_file()
    assert events.of(JobFinished)[0].outcome == "finished"


def test_a_story_whose_reference_image_cannot_be_read_fails_alone(root: Path) -> None:
    bad = make_story("bad", 3, reference_images=(Path("/absent/image.png"),))
    summary = render(root, [bad, *STORIES])
    assert (summary.state, summary.num_rendered, summary.num_failed, summary.exit_code) == ("failed", 6, 1, 6)
    assert "/absent/image.png" in summary.failures[0].reason


def test_parts_with_settings_of_their_own_share_one_renderer_and_have_folders_of_their_own(root: Path) -> None:
    renderer = FakeRenderer()
    parts = [make_part(root / str(shift), STORIES, flow_shift_m2v=shift) for shift in (4.0, 5.0)]
    summary = render_batch(parts=parts, renderer=renderer, settings=DispatchSettings(poll_seconds=0.01))
    assert (summary.state, summary.num_rendered) == ("done", 12)
    assert renderer.prepared == ["t2v", "m2v"], "each model is loaded once for all points of a sweep"
    for shift in (4.0, 5.0):
        render(root / f"alone {shift}", part={"flow_shift_m2v": shift})
        assert finished_files(root / str(shift)) == finished_files(root / f"alone {shift}")
