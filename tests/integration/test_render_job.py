"""Whole jobs of the tiny model: from a storyboard file to videos, keyframes and records."""

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts.video import count_frames, read_clip, read_png
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.errors import ShotError, StoryboardError, StoryMemError
from storymem_dist.events import StageFinished
from storymem_dist.observe.journal import read_journal
from storymem_dist.render import job
from storymem_dist.story.modes import NUM_GIVEN_FRAMES
from tests.helpers.commands import run_in_fork
from tests.helpers.small_job import SMALL, media_bytes, records, render_small, write_storyboard

CUTS = ((True, False), (True,))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rendered")
    write_storyboard(root / "in" / "fox.json", CUTS)
    assert render_small(root / "in" / "fox.json", root / "run") == 0
    return root


def test_every_shot_leaves_a_video_a_record_and_its_keyframes(rendered: Path) -> None:
    run = rendered / "run"
    found = records(run)
    assert list(found) == ["fox/shot_01", "fox/shot_02", "fox/shot_03"]
    assert [record["mode"] for record in found.values()] == ["t2v", "mi2v", "m2v"]
    for key, record in found.items():
        clip = read_clip(run / "stories" / f"{key}.mp4")
        expected = 9 - NUM_GIVEN_FRAMES[record["mode"]]
        assert list(clip.shape) == [expected, 3, 32, 48] and record["num_frames"] == expected
        assert clip.float().std() > 2, f"{key} is a flat picture"
    assert found["fox/shot_01"]["keyframes"], "the first shot must leave something in memory"
    folder = run / "stories" / "fox" / "shot_01" / "attempts"
    [attempt] = folder.iterdir()
    for keyframe in found["fox/shot_01"]["keyframes"]:
        assert read_png(attempt / keyframe["file"]).shape == (3, 32, 48)


def test_a_record_holds_what_was_remembered_and_why(rendered: Path) -> None:
    found = records(rendered / "run")
    first, second = found["fox/shot_01"], found["fox/shot_02"]
    assert first["memory"]["recalled"] == []
    kept = [decision for decision in first["memory"]["decisions"] if decision["verdict"] == "kept"]
    assert [decision["frame_index"] for decision in kept] == [frame["frame_index"] for frame in first["keyframes"]]
    recalled = second["memory"]["recalled"]
    assert [(one["shot_index"], one["slot"]) for one in recalled] == [
        (0, frame["slot"]) for frame in first["keyframes"]
    ]
    assert all(one["why"] for one in [*kept, *recalled])
    assert second["predecessor"] == first["fingerprint"]


def test_each_stage_of_the_job_is_reported_once(rendered: Path) -> None:
    events = [stamped.event for stamped in read_journal(rendered / "run" / "events")]
    of_job = [event.stage for event in events if isinstance(event, StageFinished) and event.shot_id is None]
    assert of_job == ["text", "load", "load", "join"], "load: the two experts of t2v, then those of m2v"


def test_seeds_follow_the_index_in_the_scene(rendered: Path) -> None:
    assert [record["seed"] for record in records(rendered / "run").values()] == [0, 1, 0]


def test_the_story_video_holds_all_shots(rendered: Path) -> None:
    run = rendered / "run" / "stories"
    parts = [count_frames(run / f"fox/shot_0{number}.mp4") for number in (1, 2, 3)]
    assert parts == [9, 8, 9]
    assert count_frames(run / "fox" / "story.mp4") == sum(parts)


def test_the_same_command_gives_the_same_bytes_and_records_in_another_folder(rendered: Path) -> None:
    assert render_small(rendered / "in" / "fox.json", rendered / "again") == 0
    assert media_bytes(rendered / "again") == media_bytes(rendered / "run")
    assert records(rendered / "again") == records(rendered / "run")


def test_the_same_command_in_the_same_folder_renders_nothing_again(rendered: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (rendered / "run" / "stories").rglob("*.mp4")}
    assert render_small(rendered / "in" / "fox.json", rendered / "run") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((rendered / "run" / "stories").glob("*/shot_*/attempts/*"))) == 3


def test_a_stop_file_made_while_weights_are_loaded_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_together = job._load_together

    def stop_while_loading(*arguments: Any, **keywords: Any) -> str | None:
        (tmp_path / "run" / "STOP").touch()
        return load_together(*arguments, **keywords)

    monkeypatch.setattr(job, "_load_together", stop_while_loading)
    monkeypatch.setattr(job, "StopSwitch", partial(StopSwitch, file_seconds=0.0))
    assert render_small(write_storyboard(tmp_path / "fox.json", CUTS), tmp_path / "run") == 0
    stop = json.loads((tmp_path / "run" / "stop.json").read_text())
    assert (stop["state"], stop["reason"], records(tmp_path / "run")) == ("stopped", "STOP file", {})


def test_another_seed_gives_other_pictures(rendered: Path) -> None:
    assert render_small(rendered / "in" / "fox.json", rendered / "seeded", "sampler.seed=5", "stories.max_shots=1") == 0
    shot = "stories/fox/shot_01.mp4"
    assert media_bytes(rendered / "seeded")[shot] != media_bytes(rendered / "run")[shot]


def test_an_edited_prompt_renders_its_shot_and_those_after_it_again(tmp_path: Path) -> None:
    board = write_storyboard(tmp_path / "fox.json", CUTS)
    assert render_small(board, tmp_path / "run") == 0
    before = records(tmp_path / "run")
    document = json.loads(board.read_text())
    document["scenes"][0]["video_prompts"][1] = "something else"
    board.write_text(json.dumps(document))
    assert render_small(board, tmp_path / "run") == 0
    after = records(tmp_path / "run")
    assert after["fox/shot_01"] == before["fox/shot_01"]
    assert after["fox/shot_02"]["fingerprint"] != before["fox/shot_02"]["fingerprint"]
    assert after["fox/shot_03"]["fingerprint"] != before["fox/shot_03"]["fingerprint"]
    assert len(list((tmp_path / "run/stories/fox/shot_01/attempts").iterdir())) == 1


@pytest.mark.parametrize(
    ("continuation", "first_shot", "modes", "frames"),
    [("mm2v", "m2v", ["m2v", "mm2v"], [9, 4]), ("none", "t2v", ["t2v", "m2v"], [9, 9])],
)
def test_every_continuation_renders(
    tmp_path: Path, continuation: str, first_shot: str, modes: list[str], frames: list[int]
) -> None:
    board = write_storyboard(tmp_path / "fox.json", ((True, False),))
    overrides = (f"sampler.continuation={continuation}", f"sampler.first_shot={first_shot}")
    assert render_small(board, tmp_path / "run", *overrides, "sampler.height=48", "sampler.width=32") == 0
    found = records(tmp_path / "run")
    assert [record["mode"] for record in found.values()] == modes
    assert [record["num_frames"] for record in found.values()] == frames
    assert read_clip(tmp_path / "run" / "stories" / "fox" / "shot_02.mp4").shape[2:] == (48, 32)


def test_reference_images_are_the_first_memory(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (70, 30), (200, 30, 30)).save(tmp_path / "red.png")
    board = write_storyboard(tmp_path / "fox.json", ((True,),), reference_images=["red.png"])
    assert render_small(board, tmp_path / "run") == 0
    [record] = records(tmp_path / "run").values()
    assert record["mode"] == "m2v"
    assert [one["shot_index"] for one in record["memory"]["recalled"]] == [-1]


def test_a_bad_storyboard_does_not_stop_the_others_but_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_storyboard(tmp_path / "in" / "good.json", ((True,),))
    (tmp_path / "in" / "bad.json").write_text('{"story_name": 3}')
    assert render_small(tmp_path / "in", tmp_path / "run") == StoryboardError.exit_code
    assert (tmp_path / "run" / "stories" / "good" / "story.mp4").exists()
    assert "bad.json" in capsys.readouterr().out


def test_a_reference_image_that_breaks_later_fails_its_story_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from storymem_dist.render import given

    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "ref.png")
    write_storyboard(tmp_path / "in" / "a.json", ((True, True),), reference_images=["ref.png"])
    write_storyboard(tmp_path / "in" / "b.json", ((True,),))

    def unreadable(path: Path) -> None:
        raise StoryboardError(f"the image {path} cannot be read (truncated)")

    monkeypatch.setattr(given, "open_reference_image", unreadable)
    assert render_small(tmp_path / "in", tmp_path / "run") == ShotError.exit_code
    assert (tmp_path / "run" / "stories" / "b" / "story.mp4").exists()
    assert "cannot be read (truncated)" in capsys.readouterr().out


def test_waiting_experts_and_a_resumed_run_in_strict_mode_change_nothing(rendered: Path) -> None:
    for setting in ("model.experts=swap", "model.experts=stream", "parallel.weights=fsdp_offload"):
        assert render_small(rendered / "in" / "fox.json", rendered / setting, setting) == 0
        assert media_bytes(rendered / setting) == media_bytes(rendered / "run")
    assert render_small(rendered / "in" / "fox.json", rendered / "run", "dispatch.resume=strict") == 0
    with pytest.raises(StoryMemError, match=r"num_inference_steps"):
        render_small(
            rendered / "in" / "fox.json", rendered / "run", "dispatch.resume=strict", "sampler.num_inference_steps=4"
        )


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_in_fork([*SMALL, *arguments], seconds=120)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("stories=no/such.json",), 3, "no/such.json"),
        (("stories=examples", "sampler.num_frames=10"), 2, "sampler.num_frames=10 is not allowed"),
        (("stories=examples", "model.generate=null"), 4, "model.t2v_checkpoint is not set"),
        (("stories=examples", "parallel.ulysses=3"), 2, "ulysses"),
        (("stories=examples", "sampler.stepz=3"), 2, "sampler.stepz"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_without_a_trace(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    done = run_command(*arguments, f"output={tmp_path / 'run'}")
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "nothing is written for a mistake"


def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    done = run_command("stories=examples", f"output={tmp_path / 'photos'}")
    assert done.returncode == 5, done.stderr
    assert "photos" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
