"""Whole jobs of the tiny model whose shots have LoRAs of their own."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storymem_dist.artifacts.video import read_clip
from storymem_dist.diffusion import adapter_switch
from storymem_dist.doctor.job import check_stories
from storymem_dist.errors import StoryboardError
from storymem_dist.events import event_from_dict
from storymem_dist.launch.forecast import describe
from storymem_dist.observe.console import event_line
from tests.helpers.lora_shots import write_backbones, write_lora
from tests.helpers.small_job import media_bytes, records, render_small, small_point, small_settings
from tests.helpers.videos import numbered_frames, write_video
from tests.helpers.workers import fork_worker

FLOAT32 = ("model.dtype=float32", "model.text_encoder_dtype=float32")


def write_shots(path: Path, shots: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes = [{"scene_num": 1, "shots": list(shots)}]
    path.write_text(json.dumps({"story_name": "Fox", "story_overview": "", "scenes": scenes}))
    return path


def cuts(*loras: Any) -> list[dict[str, Any]]:
    """Shots that remember nothing, so that each depends on its own LoRAs alone."""
    return [
        {"prompt": f"a fox, {number}", "cut": True, "recall": ["none"], **({"loras": own} if own else {})}
        for number, own in enumerate(loras)
    ]


def clip(run: Path, shot: str, story: str = "fox") -> np.ndarray:
    return read_clip(run / "stories" / story / f"{shot}.mp4").numpy().astype(int)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in sorted(run.glob("events/*.jsonl")) for line in path.open()]
    return [line for line in lines if line["event"] == name]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "style.safetensors", 1)
    write_backbones(folder / "walk", 2)
    return folder


def test_two_shots_with_different_loras_equal_jobs_that_merge_them(tmp_path: Path, loras: Path) -> None:
    shutil.copytree(loras, tmp_path / "loras")
    own = [["loras/style.safetensors"], [{"path": "loras/walk", "strength": 0.4}], None, ["loras/style.safetensors"]]
    board = write_shots(tmp_path / "fox.json", cuts(*own))
    plain = write_shots(tmp_path / "plain" / "fox.json", cuts(None, None, None, None))
    assert render_small(board, tmp_path / "run", *FLOAT32) == 0
    jobs = {
        "style": f"model.loras=['{loras}/style.safetensors']",
        "walk": f"model.loras=[{{path: '{loras}/walk', strength: 0.4}}]",
        "none": "model.loras=[]",
    }
    for name, setting in jobs.items():
        assert render_small(plain, tmp_path / name, *FLOAT32, setting) == 0
    for shot, name in (("shot_01", "style"), ("shot_02", "walk"), ("shot_03", "none"), ("shot_04", "style")):
        errors = {job: np.abs(clip(tmp_path / "run", shot) - clip(tmp_path / job, shot)).max() for job in jobs}
        assert errors.pop(name) <= 2, f"{shot} is that of the job with {name}"
        assert min(errors.values()) > 8, f"{shot} differs from the other jobs: {errors}"

    used = {event["shot_id"]: event for event in events(tmp_path / "run", "LorasUsed")}
    assert sorted(used) == ["shot_01", "shot_02", "shot_04"]
    assert all(event["device_gib"] > 0 for event in used.values())
    stamped = {key: value for key, value in used["shot_02"].items() if key in ("event", *used["shot_02"])}
    line = event_line(event_from_dict(stamped), "normal")
    assert line is not None and "used 1 LoRA of its own: read in" in line.plain
    found = records(tmp_path / "run")
    assert [len(found[f"fox/shot_0{number}"]["inputs"].get("loras", ())) for number in (1, 2, 3, 4)] == [1, 1, 0, 1]
    record = json.loads((tmp_path / "run/stories/fox/shot_02.json").read_text())
    assert record["timing"]["loras"]["num_loras"] == 1 and "loras" in record["timing"]["stage_seconds"]
    read = [used[shot]["already_read"] for shot in ("shot_01", "shot_04")]
    assert sorted(read) == [False, True], "the same LoRAs are read once"


def test_a_shot_with_memory_and_loras_equals_a_job_that_merges_them(tmp_path: Path, loras: Path) -> None:
    write_video(tmp_path / "filmed.mp4", numbered_frames(9), fps=16)
    given = {"prompt": "filmed", "video": "filmed.mp4", "cut": True}
    continued = {"prompt": "a fox runs", "cut": False}
    with_loras = {**continued, "loras": [str(loras / "walk")]}
    board = write_shots(tmp_path / "fox.json", [given, with_loras])
    plain = write_shots(tmp_path / "plain.json", [given, continued])
    assert render_small(board, tmp_path / "run", *FLOAT32) == 0
    assert render_small(plain, tmp_path / "merged", *FLOAT32, f"model.loras=['{loras}/walk']") == 0
    assert render_small(plain, tmp_path / "without", *FLOAT32) == 0
    own, merged = clip(tmp_path / "run", "shot_02"), clip(tmp_path / "merged", "shot_02", "plain")
    assert np.abs(own - merged).max() <= 2
    assert np.abs(own - clip(tmp_path / "without", "shot_02", "plain")).max() > 8


@pytest.mark.parametrize("call", [2, 3])
def test_a_kill_during_a_switch_and_a_resume_give_the_bytes_of_an_undisturbed_job(
    tmp_path: Path, loras: Path, call: int
) -> None:
    style, walk = str(loras / "style.safetensors"), str(loras / "walk")
    board = write_shots(tmp_path / "fox.json", cuts([style], [walk], None))
    assert render_small(board, tmp_path / "whole") == 0

    def killed() -> int:
        calls = iter(range(1, 100))
        own = adapter_switch.set_adapters

        def dying(*arguments: Any) -> int:
            placed = own(*arguments)
            if arguments[1] and next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return placed

        with patch.object(adapter_switch, "set_adapters", dying):
            return render_small(board, tmp_path / "run", "dispatch.checkpoint_every_steps=1")

    child = fork_worker(killed)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it must have died"
    assert render_small(board, tmp_path / "run") == 0
    assert media_bytes(tmp_path / "run") == media_bytes(tmp_path / "whole")
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_lora_that_cannot_be_used_rejects_its_story_alone_before_weights_are_read(
    tmp_path: Path, loras: Path
) -> None:
    wide = {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 5120), "blocks.0.ffn.0.lora_B.weight": torch.ones(13824, 2)}
    save_file(wide, tmp_path / "wide.safetensors")
    (tmp_path / "text.safetensors").write_text("not a LoRA")
    boards = {
        "good": cuts([str(loras / "walk")]),
        "gone": cuts(None, ["missing.safetensors"]),
        "wide": cuts(None, [str(tmp_path / "wide.safetensors")]),
        "damaged": cuts([str(tmp_path / "text.safetensors")]),
        "unknown": cuts([{"path": str(loras / "walk"), "scale_rule": "half"}]),
    }
    for name, shots in boards.items():
        write_shots(tmp_path / "stories" / f"{name}.json", shots)
    text = describe([small_point(f"stories.path='{tmp_path}/stories'", f"output='{tmp_path}/dry'")])
    findings = list(check_stories(small_settings(f"stories.path='{tmp_path}/stories'")))
    code = render_small(tmp_path / "stories", tmp_path / "run")
    assert code == StoryboardError.exit_code
    assert list(records(tmp_path / "run")) == ["good/shot_01"]
    rejected = {
        Path(event["source"]).stem: event["message"] for event in events(tmp_path / "run", "StoryboardRejected")
    }
    assert sorted(rejected) == ["damaged", "gone", "unknown", "wide"]
    assert "missing.safetensors" in rejected["gone"]
    assert "scene 1, shot_02: " in rejected["wide"] and "made for another width" in rejected["wide"]
    assert "scale_rule" in rejected["unknown"]
    for message in rejected.values():
        assert "\n" not in message
        assert message in text, "the dry run says the same"
        assert any(message == finding.fix for finding in findings), "the doctor says the same"
