"""Whole jobs of the tiny model whose shots have settings, pictures and clips of their own."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from storymem_dist.artifacts.video import count_frames, read_clip, read_png
from storymem_dist.diffusion.denoise import denoise
from storymem_dist.diffusion.solver import Solver
from storymem_dist.doctor.job import check_stories
from storymem_dist.launch.forecast import describe
from storymem_dist.observe.report import read_run, write_report
from storymem_dist.observe.run.rates import rates
from storymem_dist.pipeline import StoryMemPipeline
from storymem_dist.render import clip as render_clip
from storymem_dist.render.given import ClipReader
from storymem_dist.weights.bundle import with_generated_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.small_job import media_bytes, records, render_small, small_point, small_settings
from tests.helpers.tiny_dit import largest_error
from tests.helpers.videos import numbered_frames, write_video
from tests.helpers.workers import quick_folder

OPTIONS = {"num_frames": 13, "num_inference_steps": 2, "guidance": 2.0, "negative_prompt": "no clouds"}
AS_JOB = (
    "sampler.num_frames=13",
    "sampler.num_inference_steps=2",
    "sampler.guidance_scale_high=2.0",
    "sampler.guidance_scale_low=2.0",
    "sampler.negative_prompt='no clouds'",
)


def write_shots(path: Path, shots: Sequence[dict[str, Any]], **extra: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"story_name": "Fox", "story_overview": "", "scenes": [{"scene_num": 1, "shots": shots}], **extra})
    )
    return path


def plain(*shots: str, **options: Any) -> list[dict[str, Any]]:
    return [{"prompt": text, "cut": number != 1, **options} for number, text in enumerate(shots)]


def own_of(run: Path) -> dict[str, Any]:
    return {key: record.get("own", {}) for key, record in records(run).items()}


# -- settings ----------------------------------------------------------------------------------------------------------


def test_shots_with_settings_equal_a_job_with_them(tmp_path: Path) -> None:
    own = write_shots(tmp_path / "own" / "fox.json", plain("one", "two", "three", **OPTIONS))
    job = write_shots(tmp_path / "job" / "fox.json", plain("one", "two", "three"))
    assert render_small(own, tmp_path / "own_run") == 0
    assert render_small(job, tmp_path / "job_run", *AS_JOB) == 0
    assert media_bytes(tmp_path / "own_run") == media_bytes(tmp_path / "job_run")
    for key, record in records(tmp_path / "own_run").items():
        other = records(tmp_path / "job_run")[key]
        assert record["fingerprint"] == other["fingerprint"] and record["inputs"] == other["inputs"]
        assert record["own"]["num_inference_steps"] == 2 and "own" not in other


def test_one_shot_of_another_length_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """The last shot recalls the same keyframes, so only the middle one differs: here it leaves none."""
    longer = plain("one", "two", "three")
    longer[1] |= {"num_frames": 21, "guidance": [1.0, 1.0], "remember": False}
    short = plain("one", "two", "three")
    short[1] |= {"remember": False}
    for name, shots in (("longer", longer), ("short", short)):
        board = write_shots(tmp_path / name / "fox.json", shots)
        assert render_small(board, tmp_path / f"{name}_run", "sampler.continuation=none") == 0
    frames = {name: count_frames(tmp_path / f"{name}_run/stories/fox/shot_02.mp4") for name in ("longer", "short")}
    assert frames == {"longer": 21, "short": 9}
    for shot in ("shot_01.mp4", "shot_03.mp4"):
        one, other = (tmp_path / f"{name}_run" / "stories" / "fox" / shot for name in ("longer", "short"))
        assert one.read_bytes() == other.read_bytes()
    assert count_frames(tmp_path / "longer_run/stories/fox/story.mp4") == 9 + 21 + 9


def test_both_formats_give_equal_records_and_bytes(tmp_path: Path) -> None:
    shots = write_shots(tmp_path / "a" / "fox.json", plain("one", "two", "three"))
    lists = tmp_path / "b" / "fox.json"
    lists.parent.mkdir()
    scene = {"scene_num": 1, "video_prompts": ["one", "two", "three"], "cut": [True, False, True]}
    lists.write_text(json.dumps({"story_name": "Fox", "story_overview": "", "scenes": [scene]}))
    for board, run in ((shots, "a_run"), (lists, "b_run")):
        assert render_small(board, tmp_path / run) == 0
    assert records(tmp_path / "a_run") == records(tmp_path / "b_run")
    assert media_bytes(tmp_path / "a_run") == media_bytes(tmp_path / "b_run")


def test_a_kill_inside_a_shot_with_settings_and_a_resume_give_the_bytes_of_an_undisturbed_job(tmp_path: Path) -> None:
    shots = plain("one", "two", "three", num_frames=13, num_inference_steps=6)
    shots[1] |= {"num_inference_steps": 9, "num_frames": 17, "guidance": [3.0, 1.0]}
    board = write_shots(tmp_path / "fox.json", shots)
    assert render_small(board, tmp_path / "whole") == 0

    steps: list[int] = []
    step = Solver.step

    def counted(*arguments: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 6 + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with patch.object(Solver, "step", counted):
        assert render_small(board, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "stop.json").read_text())["state"] == "stopped"
    assert list(records(tmp_path / "run")) == ["fox/shot_01"]
    assert render_small(board, tmp_path / "run") == 0
    (resumed,) = (json.loads(line) for line in _events(tmp_path / "run", "ShotResumed"))
    assert (resumed["shot_id"], resumed["step"], resumed["num_steps"]) == ("shot_02", 5, 9)
    assert media_bytes(tmp_path / "run") == media_bytes(tmp_path / "whole")
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def _events(run: Path, name: str) -> list[str]:
    lines = [line for path in sorted(run.glob("events/*.jsonl")) for line in path.read_text().splitlines()]
    return [line for line in lines if json.loads(line)["event"] == name]


def test_events_have_the_sizes_and_steps_of_each_shot(tmp_path: Path) -> None:
    board = write_shots(tmp_path / "fox.json", [{"prompt": "one"}, {"prompt": "two", **OPTIONS}])
    assert render_small(board, tmp_path / "run") == 0
    started = [json.loads(line) for line in _events(tmp_path / "run", "ShotStarted")]
    assert [(event["num_frames"], event["num_steps"]) for event in started] == [(9, 3), (13, 2)]
    steps = [json.loads(line) for line in _events(tmp_path / "run", "StepFinished")]
    assert [event["num_steps"] for event in steps] == [3] * 3 + [2] * 2


# -- a picture to begin with -------------------------------------------------------------------------------------------


def test_a_start_image_renders_what_the_python_api_renders_from_the_same_picture(tmp_path: Path) -> None:
    still = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    still.save(tmp_path / "still.png")
    board = write_shots(tmp_path / "fox.json", [{"prompt": "one", "start_image": "still.png"}])
    assert render_small(board, tmp_path / "run") == 0
    record = records(tmp_path / "run")["fox/shot_01"]
    assert (record["mode"], record["kind"], record["num_frames"]) == ("mi2v", "m2v", 9), "the picture stays in the clip"
    assert record["memory"]["recalled"] == [] and record["own"] == {"start_image": "still.png"}

    settings = small_settings()
    model = with_generated_weights(settings.model)
    with StoryMemPipeline(None, model.i2v_checkpoint, model.storymem_lora, device="cpu", dtype=model.dtype) as pipeline:
        sizes = {"num_frames": 9, "height": 32, "width": 48, "steps": 3}
        video = pipeline.generate_mi2v("one", [], still, seed=record["seed"], **sizes)
    expected = video[0].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    (attempt,) = (tmp_path / "run/stories/fox/shot_01/attempts").iterdir()
    for keyframe in record["keyframes"]:
        image = read_png(attempt / keyframe["file"])
        assert (image.int() - expected[:, keyframe["frame_index"]].int()).abs().max() <= 1
    for number, name in enumerate(record["tail"]):
        assert (read_png(attempt / name).int() - expected[:, 4 + number].int()).abs().max() <= 1


def test_a_picture_of_the_storyboard_reaches_memory_and_clip_in_order(tmp_path: Path) -> None:
    for name, colour in (("a", (250, 0, 0)), ("b", (0, 250, 0)), ("c", (0, 0, 250))):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{name}.png")
    shots = plain("one", "two", "three")
    shots[1] |= {"references": ["a.png", {"path": "b.png", "sink": True}], "cut": True, "start_image": "c.png"}
    board = write_shots(tmp_path / "fox.json", shots)
    requests: list[Any] = []
    sample = render_clip.ClipSampler.sample

    def kept(self: Any, request: Any, **options: Any) -> Tensor:
        requests.append(request)
        return sample(self, request, **options)

    with patch.object(render_clip.ClipSampler, "sample", kept):
        assert render_small(board, tmp_path / "run") == 0
    found = records(tmp_path / "run")
    recalled = {key: [one["keyframe"] for one in record["memory"]["recalled"]] for key, record in found.items()}
    own = ["reference image of shot_02"] * 2
    assert recalled["fox/shot_02"][-2:] == own and [name for name in recalled["fox/shot_03"] if name in own] == own
    second = requests[1]
    assert [tuple(image.float().mean(dim=(1, 2)).int().tolist()) for image in second.memory_images[-2:]] == [
        (250, 0, 0),
        (0, 250, 0),
    ]
    assert second.first_frame.float().mean(dim=(1, 2)).int().tolist() == [0, 0, 250]
    assert found["fox/shot_02"]["num_frames"] == 9
    (story,) = read_run(tmp_path / "run").stories
    pictures = {(view.shot_index, view.slot): view.image for view in story.keyframes}
    for slot in (-2, -1):
        picture = pictures[1, slot]
        assert picture is not None and (tmp_path / "run" / picture).is_file()
    assert story.shots[1].own["references"][1] == {"path": "b.png", "sink": True}
    page = write_report(tmp_path / "run", tmp_path / "run" / "report.html").read_text()
    assert "own settings: references a.png sink no b.png sink yes, start_image c.png" in page
    copies = {path.name for path in (tmp_path / "run/stories/fox/references").iterdir()}
    assert copies == {"shot_02_reference_1.jpg", "shot_02_reference_2.jpg", "shot_02_start.jpg"}


# -- given clips -------------------------------------------------------------------------------------------------------


def test_a_given_clip_is_remembered_continued_and_joined(tmp_path: Path) -> None:
    frames = numbered_frames(12, width=48, height=32)
    write_video(tmp_path / "filmed.mkv", frames, fps=16, codec="ffv1", pixel_format="bgr0")
    board = write_shots(tmp_path / "fox.json", [{"video": "filmed.mkv"}, {"prompt": "goes on", "cut": False}])
    requests: list[Any] = []
    sample = render_clip.ClipSampler.sample

    def kept(self: Any, request: Any, **options: Any) -> Tensor:
        requests.append(request)
        return sample(self, request, **options)

    with patch.object(render_clip.ClipSampler, "sample", kept):
        assert render_small(board, tmp_path / "run", "sampler.continuation=mm2v") == 0
    (request,) = requests
    last_five = torch.from_numpy(np.stack(frames[-5:])).permute(0, 3, 1, 2)
    assert torch.equal(request.motion_frames, last_five), "the tail is exactly the clip's"
    first, second = records(tmp_path / "run").values()
    assert (first["mode"], first["kind"], first["num_frames"], first["fps"]) == ("given", "given", 12, 16)
    assert [one["keyframe"] for one in second["memory"]["recalled"]] == [
        f"shot_01 keyframe {keyframe['slot']}" for keyframe in first["keyframes"]
    ]
    assert first["keyframes"] and torch.equal(request.memory_images[0], torch.from_numpy(frames[0]).permute(2, 0, 1))
    facts = first["own"]["given"]
    assert (facts["width"], facts["height"], facts["rate"], facts["codec"]) == (48, 32, 16.0, "ffv1")
    assert len(first["inputs"]["given_clip"]) == 64 and first["own"]["video"] == "filmed.mkv"
    view = read_run(tmp_path / "run")
    assert rates(view.state).num_clips == 1, "a given clip is no work"
    assert view.stories[0].shots[0].status == "finished"
    joined = read_clip(tmp_path / "run/stories/fox/story.mp4")
    assert len(joined) == 12 + 4
    assert (joined[:12].float() - torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)).abs().mean() < 4


@pytest.mark.parametrize(
    ("name", "options", "num_frames"),
    [
        ("a.mp4", {"frames": 25, "fps": 25, "sound": True}, 16),
        ("a.mov", {"frames": 7, "fps": 30, "codec": "libx264rgb", "pixel_format": "rgb24"}, 4),
        ("a.webm", {"frames": 6, "fps": 8, "codec": "libvpx-vp9"}, 12),
        ("a.mp4", {"frames": 12, "pixel_format": "yuv420p10le", "rotation": -90}, 8),
        ("a.mkv", {"frames": 1, "codec": "ffv1", "pixel_format": "yuv444p"}, 1),
    ],
)
def test_given_clips_of_other_sizes_rates_and_formats_join_with_rendered_ones(
    tmp_path: Path, name: str, options: dict[str, Any], num_frames: int
) -> None:
    write_video(tmp_path / name, options.pop("frames"), **options)
    board = write_shots(tmp_path / "fox.json", [{"prompt": "one"}, {"video": name}, {"prompt": "on", "cut": False}])
    assert render_small(board, tmp_path / "run") == 0
    assert [record["num_frames"] for record in records(tmp_path / "run").values()] == [9, num_frames, 8]
    assert count_frames(tmp_path / "run/stories/fox/story.mp4") == 9 + num_frames + 8


def test_a_story_of_given_clips_alone_loads_no_experts(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    board = write_shots(tmp_path / "fox.json", [{"video": "a.mp4"}, {"video": "a.mp4", "remember": False}])
    with patch.object(render_clip.ClipSampler, "prepare", side_effect=AssertionError("experts were loaded")):
        assert render_small(board, tmp_path / "run") == 0
    first, second = records(tmp_path / "run").values()
    assert first["keyframes"] and not second["keyframes"] and second["memory"]["remember"] is False
    assert render_small(board, tmp_path / "run") == 0
    assert len(_events(tmp_path / "run", "ShotStarted")) == 2, "nothing is read again"


def test_a_clip_that_was_edited_is_read_again_and_what_needs_it_is_rendered_again(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 12)
    board = write_shots(tmp_path / "fox.json", [{"video": "a.mp4"}, {"prompt": "on", "cut": False}])
    assert render_small(board, tmp_path / "run") == 0
    write_video(tmp_path / "a.mp4", 24)
    assert render_small(board, tmp_path / "run") == 0
    started = [json.loads(line) for line in _events(tmp_path / "run", "ShotStarted")]
    assert [event["shot_id"] for event in started] == ["shot_01", "shot_02"] * 2
    assert "given_clip changed" in started[2]["why"]
    assert count_frames(tmp_path / "run/stories/fox/story.mp4") == 16 + 8


def test_a_story_with_an_unreadable_clip_is_rejected_alone_before_anything_is_rendered(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_shots(folder / "good.json", [{"prompt": "one"}])
    write_shots(folder / "bad.json", [{"prompt": "one"}, {"video": "a.mp4"}])
    (folder / "a.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(400))
    assert render_small(folder, tmp_path / "run") == 3
    assert list(records(tmp_path / "run")) == ["good/shot_01"]
    (rejected,) = (json.loads(line) for line in _events(tmp_path / "run", "StoryboardRejected"))
    assert "bad.json" in rejected["message"] and "a.mp4 is not a video" in rejected["message"]


def test_a_damaged_clip_is_used_and_said(tmp_path: Path) -> None:
    noise = [np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8) for number in range(24)]
    path = write_video(tmp_path / "a.mp4", noise)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    board = write_shots(tmp_path / "fox.json", [{"video": "a.mp4"}])
    assert render_small(board, tmp_path / "run") == 0
    warnings = [json.loads(line)["message"] for line in _events(tmp_path / "run", "WarningIssued")]
    assert any("left out" in message and "fox, shot_01" in message for message in warnings), warnings
    assert any("left out" in note for note in own_of(tmp_path / "run")["fox/shot_01"]["given"]["notes"])


# -- ranks -------------------------------------------------------------------------------------------------------------


def render_on_ranks(board: Path, run: Path, overrides: tuple[str, ...]) -> tuple[int, list[Tensor]]:
    latents = []

    def kept(*arguments: Any, **options: Any) -> Tensor:
        latents.append(denoise(*arguments, **options))
        return latents[-1]

    with patch.object(render_clip, "denoise", kept):
        return render_small(board, run, "dispatch.poll_seconds=0.1", *overrides), latents


@pytest.mark.parametrize(
    "layout", [("parallel.ulysses=2",), ("parallel.ring=2",), ("parallel.cfg=2", "parallel.weights=fsdp")]
)
def test_ranks_that_share_a_shot_render_what_one_rank_does(layout: tuple[str, ...]) -> None:
    with quick_folder() as folder:
        write_video(folder / "a.mp4", 12, sound=True)
        Image.new("RGB", (70, 40), (250, 0, 0)).save(folder / "still.png")
        shots = [
            {"video": "a.mp4"},
            {"prompt": "on", "cut": False, "num_frames": 13, "num_inference_steps": 2, "guidance": [4.0, 2.0]},
            {"prompt": "a still", "start_image": "still.png", "negative_prompt": "no clouds", "num_frames": 5},
        ]
        board = write_shots(folder / "fox.json", shots)
        ((code, alone),) = run_ranks(render_on_ranks, 1, (board, folder / "alone", ()))
        both = run_ranks(render_on_ranks, 2, (board, folder / "both", layout))
        assert [code, *(code for code, _ in both)] == [0, 0, 0]
        for _, latents in both:
            assert len(latents) == len(alone) == 2
            assert max(largest_error(one, other) for one, other in zip(latents, alone, strict=True)) <= 1e-5
        given = "stories/fox/shot_01.mp4"
        assert (folder / "alone" / given).read_bytes() == (folder / "both" / given).read_bytes()


def test_a_shot_without_guidance_is_refused_where_two_ranks_share_the_passes(tmp_path: Path) -> None:
    board = write_shots(tmp_path / "in" / "bad.json", [{"prompt": "one"}, {"prompt": "two", "guidance": 1.0}])
    write_shots(tmp_path / "in" / "good.json", [{"prompt": "one"}])
    point = small_point(f"stories.path='{board.parent}'", f"output='{tmp_path / 'run'}'", "parallel.cfg=2")
    plan = describe([point])
    assert "refused: " in plan and "bad.json, scene 1, shot_02: parallel.cfg=2" in plan
    assert "1 of 1 shots are left" in plan


# -- before a job ------------------------------------------------------------------------------------------------------


def test_dry_run_and_doctor_say_what_is_rounded_given_and_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", sound=True)
    shots = [{"video": "a.mp4"}, {"prompt": "one", "duration": 1.2}, {"prompt": "two"}]
    write_shots(tmp_path / "in" / "fox.json", [{**shots[0], "video": str(tmp_path / "a.mp4")}, *shots[1:]])
    write_shots(tmp_path / "in" / "owl.json", [{"prompt": "one", "start_image": str(tmp_path / "gone.png")}])
    overrides = (f"stories.path='{tmp_path / 'in'}'", f"output='{tmp_path / 'run'}'")
    plan = describe([small_point(*overrides)])
    assert "1.2 s at 16 frames per second, 19.2 frames, became 21 frames (4n+1)" in plan
    assert "its sound is not used" in plan and "refused: " in plan and "gone.png does not exist" in plan
    assert "3 of 3 shots are left" in plan
    findings = list(check_stories(small_settings(*overrides)))
    texts = [f"{finding.value} {finding.fix}" for finding in findings]
    assert any("1 story, 3 shots, 1 of them given, 1 with settings of their own" in text for text in texts), texts
    assert any("became 21 frames" in text for text in texts) and any("gone.png" in text for text in texts)
    assert not (tmp_path / "run").exists()


def test_a_stop_while_a_given_clip_is_read_leaves_nothing_and_the_next_job_reads_it(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 48)
    board = write_shots(tmp_path / "fox.json", [{"video": "a.mp4"}])
    parts: list[int] = []

    def one_frame(reader: ClipReader) -> bool:
        parts.append(1)
        if len(parts) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return read_part(reader, 0.0)

    read_part = ClipReader.read_part
    with patch.object(ClipReader, "read_part", one_frame):
        assert render_small(board, tmp_path / "run") == 0
    assert len(parts) == 3 and not records(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "stop.json").read_text())["state"] == "stopped"
    assert render_small(board, tmp_path / "run") == 0
    assert records(tmp_path / "run")["fox/shot_01"]["num_frames"] == 32
