"""The same command again: what is skipped, what continues inside a shot, what is rendered again, and why."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import Replica
from storymem_dist.errors import RunFolderError
from storymem_dist.events import (
    ShotFailed,
    ShotResumed,
    ShotSkipped,
    ShotStarted,
    StopRequested,
    StoryFinished,
    WarningIssued,
)
from tests.helpers.batches import STORIES, fail_at, inodes, render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files, make_story
from tests.helpers.workers import quick_folder


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


def test_the_same_command_again_renders_nothing_and_touches_nothing(root: Path) -> None:
    render(root)
    before, events, renderer = inodes(root), Events(), FakeRenderer()
    summary = render(root, renderer=renderer, events=events)
    assert (summary.state, summary.num_rendered, summary.num_skipped) == ("done", 0, 6)
    assert renderer.rendered == renderer.prepared == []
    assert inodes(root) == before
    assert len(events.of(ShotSkipped)) == 6 and len(events.of(StoryFinished)) == 2


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_stopped_at_any_step_a_shot_continues_there_and_ends_the_same(root: Path, step: int, every: int) -> None:
    render(root / "whole")
    stop, events = StopSwitch(), Events()

    def before_step(job: ShotJob, at: int) -> None:
        if (job.story_id, job.index, at + 1) == ("ocean", 2, max(step, 1)):
            stop.request("SIGTERM")

    if step == 0:
        stop.request("SIGTERM")
    summary = render(
        root / "part",
        stop=stop,
        events=events,
        renderer=FakeRenderer(before_step=before_step),
        checkpoint_every_steps=every,
    )
    assert (summary.state, summary.exit_code) == ("stopped", 0)
    stop_file = json.loads((root / "part/stop.json").read_text())
    assert (stop_file["state"], stop_file["reason"]) == ("stopped", "SIGTERM")
    assert [event.reason for event in events.of(StopRequested)] == ["SIGTERM"]
    renderer, events = FakeRenderer(), Events()
    summary = render(root / "part", renderer=renderer, events=events)
    assert summary.state == "done"
    if step:
        assert renderer.resumed == [("ocean:shot_03", step)]
        assert [(event.step, event.num_steps) for event in events.of(ShotResumed)] == [(step, 4)]
        assert summary.num_resumed == 1
    assert finished_files(root / "part") == finished_files(root / "whole")
    assert not list((root / "part/checkpoints").rglob("*.safetensors"))


def test_a_crash_loses_no_more_than_the_steps_since_the_last_checkpoint(root: Path) -> None:
    def before_step(job: ShotJob, step: int) -> None:
        if (job.story_id, job.index, step) == ("ocean", 1, 3):
            raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        render(root, renderer=FakeRenderer(before_step=before_step), checkpoint_every_steps=2)
    renderer = FakeRenderer()
    assert render(root, renderer=renderer).state == "done"
    assert renderer.resumed == [("ocean:shot_02", 2)]


def test_a_checkpoint_that_cannot_be_read_costs_its_steps_and_a_warning(root: Path) -> None:
    with pytest.raises(RuntimeError):
        render(root, renderer=FakeRenderer(before_step=fail_at("city:shot_01", lambda: RuntimeError())))
    stop = StopSwitch()
    stopping = FakeRenderer(before_step=lambda job, step: stop.request("SIGTERM") if step == 1 else None)
    render(root, stop=stop, renderer=stopping)
    (checkpoint,) = (root / "checkpoints").rglob("*.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    renderer, events = FakeRenderer(), Events()
    assert render(root, renderer=renderer, events=events).state == "done"
    assert renderer.resumed == []
    assert "cannot be read" in events.of(WarningIssued)[0].message


def test_a_shot_that_crashes_the_process_every_time_is_given_up_after_max_attempts(root: Path) -> None:
    crashing = FakeRenderer(before_step=fail_at("ocean:shot_02", lambda: RuntimeError("illegal memory access")))
    for _ in range(3):
        child = os.fork()  # each crash must be that of a process of its own, so that its death can be seen
        if child == 0:
            try:
                render(root, renderer=crashing, max_attempts=3)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
    events = Events()
    summary = render(root, renderer=crashing, events=events, max_attempts=3)
    assert (summary.state, summary.num_failed, summary.num_blocked) == ("failed", 1, 2)
    assert "3 processes died" in summary.failures[0].reason
    [failed] = events.of(ShotFailed)
    assert (failed.shot_id, failed.error_type, failed.reason) == ("shot_02", "ProcessDied", summary.failures[0].reason)
    assert [skipped.shot_id for skipped in events.of(ShotSkipped) if skipped.reason == "predecessor failed"] == [
        "shot_03",
        "shot_04",
    ]
    assert ("ocean", "failed") in [(ended.story_id, ended.outcome) for ended in events.of(StoryFinished)]
    assert render(root, retry_failed=True).state == "done"


def test_an_edited_prompt_renders_that_shot_and_all_after_it_again_and_says_why(root: Path) -> None:
    render(root)
    before, renderer, events = inodes(root), FakeRenderer(), Events()
    edited = [make_story("ocean", 4, changed={2: "a storm"}), STORIES[1]]
    render(root, edited, renderer=renderer, events=events)
    assert renderer.rendered == ["ocean:shot_03", "ocean:shot_04"]
    assert [event.why for event in events.of(ShotStarted)] == [
        "prompt changed from 'ocean, shot 2' to 'a storm'",
        "a shot that it needs is rendered again",
    ]
    after = inodes(root)
    kept = [path for path in before if "city" in path or "shot_01" in path or "shot_02" in path]
    assert all(after[path] == before[path] for path in kept)
    render(root / "fresh", edited)
    assert finished_files(root) == finished_files(root / "fresh")


def test_going_back_to_an_old_prompt_finds_the_old_records(root: Path) -> None:
    render(root)
    whole = finished_files(root)
    render(root, [make_story("ocean", 4, changed={1: "a storm"}), STORIES[1]])
    renderer = FakeRenderer()
    assert render(root, renderer=renderer).num_rendered == 0
    assert finished_files(root) == whole, "views and the story video show the old shots again"


def test_strict_resume_refuses_any_difference_and_names_it(root: Path) -> None:
    render(root)
    assert render(root, resume="strict").num_skipped == 6
    edited = [make_story("ocean", 4, changed={2: "a storm"}), STORIES[1]]
    with pytest.raises(RunFolderError, match=r"resume=strict.*ocean:shot_03: prompt changed from") as caught:
        render(root, edited, resume="strict")
    assert "ocean:shot_04: a shot that it needs" in str(caught.value) and "city" not in str(caught.value)
    longer = [make_story("ocean", 5), *STORIES[1:]]
    assert render(root, longer, resume="strict").num_rendered == 1, "a shot that was never rendered is no difference"


def test_a_forced_rerender_happens_once_per_job_and_stays(root: Path) -> None:
    render(root)
    job = {"replica": Replica(job_id="monday"), "rerender": ["ocean:3"]}
    for expected in (["ocean:shot_03", "ocean:shot_04"], []):
        renderer, events = FakeRenderer(), Events()
        render(root, renderer=renderer, events=events, **job)
        assert renderer.rendered == expected
    renderer = FakeRenderer()
    render(root, renderer=renderer)
    assert renderer.rendered == [], "later jobs keep the new shots"
    with pytest.raises(RunFolderError, match="ocean has no shot '9'"):
        render(root, rerender=["ocean:9"])


def test_a_folder_that_is_not_a_run_folder_is_refused_and_left_alone(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").touch()
    with pytest.raises(RunFolderError, match="not a run folder"):
        render(root)
    assert [path.name for path in root.iterdir()] == ["thesis.txt"]


def damage_json(shot: Path) -> None:
    next(shot.glob("records/*.json")).write_text('{"format": 1, "st')


def damage_field(shot: Path) -> None:
    record = next(shot.glob("records/*.json"))
    record.write_text(record.read_text().replace('"num_frames"', '"number"'))


def damage_clip(shot: Path) -> None:
    clip = next(shot.glob("attempts/*/clip.mp4"))
    clip.write_bytes(clip.read_bytes()[:-1])


def damage_missing(shot: Path) -> None:
    next(shot.glob("attempts/*/keyframe_1.png")).unlink()


def damage_record_gone(shot: Path) -> None:
    next(shot.glob("records/*.json")).unlink()


def damage_attempt_gone(shot: Path) -> None:
    for path in shot.glob("attempts/*/*"):
        path.unlink()


@pytest.mark.parametrize(
    "damage", [damage_json, damage_field, damage_clip, damage_missing, damage_record_gone, damage_attempt_gone]
)
@pytest.mark.parametrize("shot", ["shot_01", "shot_03", "shot_04"])
def test_a_damaged_shot_is_set_aside_and_rendered_again_and_nothing_else_is(
    root: Path, damage: Callable[[Path], None], shot: str
) -> None:
    render(root)
    whole, renderer, events = finished_files(root), FakeRenderer(), Events()
    damage(root / "stories/ocean" / shot)
    summary = render(root, renderer=renderer, events=events)
    assert (summary.state, renderer.rendered) == ("done", [f"ocean:{shot}"])
    assert finished_files(root) == whole
    warnings = [event.message for event in events.of(WarningIssued)]
    if damage is not damage_record_gone:
        assert len(warnings) == 1 and shot in warnings[0] and "rendered again" in warnings[0]
        assert len(list((root / "stories/ocean" / shot / "records").glob("*.damaged-*"))) == 1


def test_an_image_that_cannot_be_decoded_is_found_when_it_is_needed(root: Path) -> None:
    """Its size is right, so only decoding it, for the memory of a later shot, finds the damage."""
    render(root, [make_story("ocean", 3)])
    image = next((root / "stories/ocean/shot_02/attempts").rglob("keyframe_0.png"))
    size = image.stat().st_size
    image.write_bytes(b"x" * size)
    renderer, events = FakeRenderer(), Events()
    assert render(root, [make_story("ocean", 4)], renderer=renderer, events=events).state == "done"
    assert renderer.rendered == ["ocean:shot_02", "ocean:shot_04"]
    render(root / "fresh", [make_story("ocean", 4)])
    assert finished_files(root) == finished_files(root / "fresh")
    assert "set aside" in events.of(WarningIssued)[0].message


def flip(path: Path, position: int = -10) -> None:
    """Change one bit in place."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_changed_bit_of_a_clip_is_found_by_every_resume_and_the_shot_is_rendered_again(root: Path) -> None:
    render(root)
    whole, events = finished_files(root), Events()
    flip(next((root / "stories/city/shot_02/attempts").rglob("clip.mp4")))
    assert render(root, events=events).num_rendered == 1
    assert finished_files(root) == whole
    (warning,) = events.of(WarningIssued)
    assert "was set aside: the contents of clip.mp4 have changed; the shot is rendered again" in warning.message


def test_changed_contents_that_no_sample_covers_are_found_on_demand(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("artifacts.records", "dispatch.saving", "dispatch.story_video"):
        monkeypatch.setattr(f"storymem_dist.{module}.quick_digest", lambda path: "the sample")
    render(root)
    whole = finished_files(root)
    flip(next((root / "stories/city/shot_02/attempts").rglob("clip.mp4")))
    flip(root / "stories/ocean/story.mp4")
    assert render(root).num_rendered == 0
    assert finished_files(root) != whole
    assert render(root, check_contents=True).num_rendered == 1
    assert finished_files(root) == whole


def test_a_changed_bit_of_a_story_video_is_found_and_the_video_made_again(root: Path) -> None:
    render(root)
    whole, events = finished_files(root), Events()
    flip(root / "stories/ocean/story.mp4", 1000)
    changed = (root / "stories/ocean/story.mp4").read_bytes()
    assert render(root, events=events).num_rendered == 0
    assert finished_files(root) == whole
    (aside,) = (root / "stories/ocean").glob("story.damaged-*")
    assert aside.read_bytes() == changed
    (warning,) = events.of(WarningIssued)
    assert str(aside) in warning.message and "set aside" in warning.message


def test_a_run_without_samples_and_checksums_of_an_earlier_version_is_not_touched(root: Path) -> None:
    render(root)
    for path in (root / "stories").rglob("*.json"):
        value = json.loads(path.read_text())
        value.get("host", {}).pop("checksum", None)
        path.write_text(json.dumps({k: v for k, v in value.items() if k not in ("clip_sample", "sample", "sha256")}))
    before = inodes(root)
    assert render(root, check_contents=True).num_rendered == 0
    assert inodes(root) == before


def test_views_and_story_videos_that_are_gone_come_back_without_rendering(root: Path) -> None:
    render(root)
    whole = finished_files(root)
    for name in ("story.mp4", "shot_02.mp4", "shot_01.json", "keyframes/shot_01_0.png"):
        (root / "stories/ocean" / name).unlink()
    (root / "stories/ocean/keyframes/shot_01_7.png").touch()
    (root / "stories/city/story.mp4").write_bytes(b"short")
    assert render(root).num_rendered == 0
    assert finished_files(root) == whole
