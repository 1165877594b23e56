"""A dry run plans as the render does, and writes nothing."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storymem_dist.artifacts.fingerprint import reference_image_digest
from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.cli.render import run
from storymem_dist.dispatch import plan
from storymem_dist.errors import RunFolderError, StoryboardError
from storymem_dist.files import read_json
from storymem_dist.launch import forecast as module
from storymem_dist.launch.forecast import Forecast, describe, forecast
from tests.helpers.small_job import render_small, small_point, write_storyboard

ONE_STEP = "sampler.num_inference_steps=1"


def counts(stories: Path, run: Path, *overrides: str) -> tuple[int, int, int]:
    """Stories, shots and shots that are rendered already, as a dry run sees them."""
    found = forecast([small_point(f"stories.path='{stories}'", f"output='{run}'", ONE_STEP, *overrides)])
    return found.num_stories, found.num_shots, found.num_committed


def contents(folder: Path) -> dict[str, int]:
    """Every file below ``folder`` with the time of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storyboard of two shots in ``fox.json`` and a run folder with the first one, its seed drawn."""
    root = tmp_path_factory.mktemp("rendered")
    board = write_storyboard(root / "fox.json", [[True, False]])
    assert render_small(board, root / "run", ONE_STEP, "sampler.seed=-1", "stories.max_shots=1") == 0
    return root


def test_a_seed_that_is_not_drawn_yet_is_left_to_the_render(tmp_path: Path) -> None:
    boards = tmp_path / "in"
    write_storyboard(boards / "fox.json", [[True, False]])
    write_storyboard(boards / "owl.json", [[True]], seed=3)
    assert counts(boards, tmp_path / "run", "sampler.seed=-1") == (2, 3, 0)
    assert not (tmp_path / "run").exists()


def test_a_drawn_seed_finds_what_was_rendered_with_it(rendered: Path) -> None:
    before = contents(rendered)
    assert counts(rendered / "fox.json", rendered / "run", "sampler.seed=-1") == (1, 2, 1)
    assert counts(rendered / "fox.json", rendered / "run", "sampler.seed=5") == (1, 2, 0)
    assert contents(rendered) == before


def test_a_forced_rerender_counts_before_the_job_has_noted_it(rendered: Path) -> None:
    before = contents(rendered)
    given = (rendered / "fox.json", rendered / "run", "sampler.seed=-1")
    assert counts(*given, "dispatch.rerender=['fox:2']") == (1, 2, 1)
    assert counts(*given, "dispatch.rerender=['fox:1','fox:1']") == (1, 2, 0)
    with pytest.raises(RunFolderError, match="fox has no shot '3'"):
        counts(*given, "dispatch.rerender=['fox:3']")
    assert contents(rendered) == before


def test_a_damaged_record_counts_as_not_rendered_and_stays_where_it_is(tmp_path: Path) -> None:
    board = write_storyboard(tmp_path / "fox.json", [[True]])
    assert render_small(board, tmp_path / "run", ONE_STEP) == 0
    assert counts(board, tmp_path / "run") == (1, 1, 1)
    for clip in (tmp_path / "run").glob("stories/fox/shot_01/attempts/*/clip.mp4"):
        clip.unlink()
    before = contents(tmp_path)
    assert counts(board, tmp_path / "run") == (1, 1, 0)
    assert contents(tmp_path) == before


def unreadable(name: str) -> Callable[[Path], str]:
    def digest(path: Path) -> str:
        if path.name == name:
            raise StoryboardError(f"reference image {path} cannot be read: Input/output error")
        return reference_image_digest(path)

    return digest


def test_what_the_render_rejects_is_reported_and_the_others_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards = tmp_path / "in"
    write_storyboard(boards / "fox.json", [[True, False]])
    for name in ("ape", "owl"):
        write_storyboard(boards / f"{name}.json", [[True]], reference_images=[f"{name}.png"])
        Image.new("RGB", (64, 64)).save(boards / f"{name}.png")
    (boards / "bad.json").write_text('{"story_name": 3}')
    monkeypatch.setattr(plan, "reference_image_digest", unreadable("owl.png"))
    said = describe([small_point(f"stories.path='{boards}'", f"output='{tmp_path / 'run'}'", name="a=1")])
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("refused: a=1: ") and "bad.json" in line]
    assert f"refused: a=1: owl: reference image {boards / 'owl.png'} cannot be read: Input/output error" in lines
    assert f"3 of 3 shots are left to render, of 2 stories, in {tmp_path / 'run'}" in lines


def test_the_time_of_what_is_left_follows_from_what_was_rendered(
    rendered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"stories.path='{rendered / 'fox.json'}'", f"output='{rendered / 'run'}'", ONE_STEP, "sampler.seed=-1")
    found = forecast([small_point(*given)])
    assert found.device_seconds is not None and found.device_seconds > 0
    assert found.elapsed_seconds(1) == found.elapsed_seconds(8), "one story is one chain"

    known: dict[str, Any] = {"num_stories": 4, "num_shots": 9, "num_committed": 1, "refused": ()}
    fake = Forecast(**known, longest_path_share=0.25, device_seconds=4 * 3723.0)
    monkeypatch.setattr(module, "forecast", lambda points: fake)
    assert describe([], num_replicas=8).splitlines()[-1] == (
        "estimated time: 1:02:03 with 8 replicas like those that rendered 1 shot before, and loading"
    )


@pytest.mark.parametrize("place", ["fox/shot_01/attempts", "fox/shot_01/records", "fox/shot_01", "fox", ""])
def test_a_file_where_a_folder_should_be_counts_as_nothing_rendered(tmp_path: Path, place: str, rendered: Path) -> None:
    run = shutil.copytree(rendered / "run", tmp_path / "run")
    shutil.rmtree(run / "stories" / place)
    (run / "stories" / place).write_text("{}")
    assert counts(rendered / "fox.json", run, "sampler.seed=-1") == (1, 2, 0)


@pytest.mark.parametrize("timing", [{}, {"stage_seconds": []}, {"stage_seconds": {"denoise": "long", "decode": 1e308}}])
def test_a_record_with_odd_times_is_counted(tmp_path: Path, timing: dict[str, object], rendered: Path) -> None:
    run = shutil.copytree(rendered / "run", tmp_path / "run")
    (path,) = run.glob("stories/fox/shot_01/records/*.json")
    path.write_bytes(replace(ShotRecord.from_json(read_json(path)), timing=timing).to_json())
    given = (f"stories.path='{rendered / 'fox.json'}'", f"output='{run}'", ONE_STEP, "sampler.seed=-1")
    assert "1 of 2 shots are left to render" in describe([small_point(*given)])


def test_the_time_of_the_compiler_is_not_expected_again(tmp_path: Path, rendered: Path) -> None:
    run = shutil.copytree(rendered / "run", tmp_path / "run")
    (path,) = run.glob("stories/fox/shot_01/records/*.json")
    given = (f"stories.path='{rendered / 'fox.json'}'", f"output='{run}'", ONE_STEP, "sampler.seed=-1")
    expected = []
    for stages in ({"denoise": 40.0, "decode": 2.0}, {"denoise": 100.0, "compile": 60.0, "decode": 2.0}):
        timing = {"stage_seconds": stages}
        path.write_bytes(replace(ShotRecord.from_json(read_json(path)), timing=timing).to_json())
        expected.append(forecast([small_point(*given)]).device_seconds)
    assert expected[0] == expected[1] is not None


def test_a_dry_run_of_a_sweep_with_a_point_that_cannot_begin_ends_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Hydra puts its own there
    with pytest.raises(SystemExit) as ended:
        run(["-m", "model=tiny", "sampler.fps=8,9", "stories=none", "launch.dry_run=true", f"output={tmp_path}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("give a storyboard file") == 2
