"""A run folder of an earlier version resumes: finished shots stay, a half-done shot continues at its step."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from storymem_dist.render.inputs import config_hash
from tests.helpers.small_job import render_small

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_of_70da1c0"
SETTINGS = ("sampler.num_inference_steps=250", "dispatch.checkpoint_every_steps=50")
STEPS_IN_CHECKPOINT = 110


def events(run: Path, name: str) -> list[dict]:
    lines = [line for path in sorted(run.glob("events/*.jsonl")) for line in path.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == name]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old run folder, completed by this version."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    assert render_small(folder / "old_run.json", folder / "run", *SETTINGS) == 0
    record = json.loads((folder / "run/stories/old_run/shot_03.json").read_text())
    old = json.loads((FIXTURE / "run/stories/old_run/shot_01.json").read_text())
    if (
        old["host"]["versions"]["torch"] != torch.__version__
        and record["inputs"]["weights"] != old["inputs"]["weights"]
    ):
        pytest.skip(f"torch {torch.__version__} writes other bytes for the tiny weights: their run folder is another")
    return folder / "run"


def test_a_committed_shot_is_not_rendered_again(resumed: Path) -> None:
    before = {
        path.relative_to(FIXTURE): path.read_bytes() for path in FIXTURE.glob("run/stories/old_run/shot_01/**/*.*")
    }
    after = {
        path.relative_to(resumed.parent): path.read_bytes() for path in resumed.glob("stories/old_run/shot_01/**/*.*")
    }
    assert len(before) == 10
    assert after == before
    started = [event["shot_id"] for event in events(resumed, "ShotStarted")]
    assert started == ["shot_01", "shot_02", "shot_02", "shot_03"], "the first two are those of the old version"


def test_a_half_done_shot_continues_at_its_step(resumed: Path) -> None:
    assert [(event["shot_id"], event["step"]) for event in events(resumed, "ShotResumed")] == [
        ("shot_02", STEPS_IN_CHECKPOINT)
    ]
    record = json.loads((resumed / "stories/old_run/shot_02.json").read_text())
    assert record["host"]["resumed_at_step"] == STEPS_IN_CHECKPOINT


def test_the_rest_is_rendered_as_the_old_version_would_have_rendered_it(resumed: Path) -> None:
    for shot in ("shot_02", "shot_03"):
        (last_frame,) = resumed.glob(f"stories/old_run/{shot}/attempts/*/tail_4.png")
        difference = np.abs(pixels(last_frame) - pixels(FIXTURE / "expected" / f"{shot}.png"))
        assert difference.max() <= 2, "two levels of 255, for processors that sum in another order"
    assert (resumed / "stories/old_run/story.mp4").exists()


def test_the_old_record_is_read_as_it_was_written(resumed: Path) -> None:
    old = json.loads((FIXTURE / "run/stories/old_run/shot_01.json").read_text())
    new = json.loads((resumed / "stories/old_run/shot_03.json").read_text())
    assert new.keys() - old.keys() == {"clip_sample"} and old.keys() <= new.keys()
    assert new["inputs"].keys() - old["inputs"].keys() == {"memory.max_keyframes", "memory.num_fixed"}, "M2V recalls"


def test_the_configuration_differs_by_later_settings_only(resumed: Path) -> None:
    """``config_hash`` names a file of the run folder; what makes a shot stale is its fingerprint."""
    (old_file,) = FIXTURE.glob("run/config/*.yaml")
    record = json.loads((resumed / "stories/old_run/shot_03.json").read_text())
    old, new = (
        yaml.safe_load(path.read_text()) for path in (old_file, resumed / f"config/{record['config_hash']}.yaml")
    )
    known = {group: {key: new[group][key] for key in old[group]} for group in ("model", "sampler", "memory", "video")}
    assert config_hash(known) == old_file.stem
    assert (resumed / "config" / old_file.name).read_bytes() == old_file.read_bytes()
