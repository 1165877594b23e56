"""The ``debug`` group in whole jobs: what it promises is delivered, changes no result, and ends with the job."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem_dist.render import job
from storymem_dist.render.debugging import PACKAGE, WORKSPACE_VARIABLE
from tests.helpers.commands import run_in_fork
from tests.helpers.small_job import SMALL, media_bytes, records, render_small, write_storyboard

LOG_LINE = re.compile(r"^\[rank (\d+)\] \d{4}-\S+ \S+ (DEBUG|INFO|WARNING) storymem_dist\.\S+: (\w+)", re.MULTILINE)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process as a test finds it, and as a job must leave it."""
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = process_state()
    yield
    assert process_state() == before


def process_state() -> dict[str, Any]:
    package = logging.getLogger(PACKAGE)
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "workspace": os.environ.get(WORKSPACE_VARIABLE),
        "level": package.level,
        "handlers": len(package.handlers),
    }


def state_inside(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> dict[str, Any]:
    """What a job's code finds when it begins to render; the job then ends as one that renders nothing."""
    found: dict[str, Any] = {}
    render_batch = job.render_batch

    def look(**arguments: Any) -> Any:
        found.update(process_state())
        return render_batch(**arguments)

    monkeypatch.setattr(job, "render_batch", look)
    board = write_storyboard(folder / "fox.json", [[True]])
    assert render_small(board, folder / "run", "sampler.num_inference_steps=1", *overrides) == 0
    return found


def test_deterministic_chooses_repeatable_kernels_while_the_job_lasts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = state_inside(monkeypatch, tmp_path, "debug.deterministic=true")
    assert (found["deterministic"], found["warn only"], found["benchmark"]) == (True, True, False)
    assert found["workspace"] == ":4096:8"


def test_a_workspace_that_somebody_chose_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(WORKSPACE_VARIABLE, ":16:8")
    found = state_inside(monkeypatch, tmp_path, "debug.deterministic=true")
    assert found["workspace"] == os.environ[WORKSPACE_VARIABLE] == ":16:8"
    monkeypatch.delenv(WORKSPACE_VARIABLE)


def test_without_debug_settings_kernels_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = state_inside(monkeypatch, tmp_path)
    assert (found["deterministic"], found["benchmark"], found["workspace"]) == (False, True, None)
    assert found["level"] == logging.WARNING


def test_a_job_that_fails_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(**arguments: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(job, "render_batch", fail)
    board = write_storyboard(tmp_path / "fox.json", [[True]])
    with pytest.raises(RuntimeError, match="a fault"):
        render_small(board, tmp_path / "run", "debug=verbose")


def test_verbose_shows_events_and_stages_and_changes_no_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board = write_storyboard(tmp_path / "fox.json", [[True, False]])
    quiet = ("sampler.num_inference_steps=2", "tracking.console.mode=plain")
    assert render_small(board, tmp_path / "plain", *quiet) == 0
    said = capfd.readouterr().err
    assert not LOG_LINE.search(said) and not re.search(r"fox/shot_01 decode \d", said)

    assert render_small(board, tmp_path / "run", *quiet, "debug=verbose") == 0
    said = capfd.readouterr().err
    lines = LOG_LINE.findall(said)
    assert {rank for rank, _, _ in lines} == {"0"}
    assert {"StageStarted", "StageFinished", "StepFinished", "ShotFinished"} <= {word for *_, word in lines}
    assert re.search(r"INFO storymem_dist\.render\.job: rank 0 of 1, replica 0, device cpu, ", said)
    assert re.search(r"fox/shot_01 decode \d", said), "a verbose console shows every stage"
    assert media_bytes(tmp_path / "run") == media_bytes(tmp_path / "plain")
    assert records(tmp_path / "run") == records(tmp_path / "plain")

    assert render_small(board, tmp_path / "plain", *quiet, "debug=verbose") == 0
    assert "ShotStarted" not in {word for *_, word in LOG_LINE.findall(capfd.readouterr().err)}, "fingerprints differ"


def test_all_ranks_write_log_lines(tmp_path: Path) -> None:
    board = write_storyboard(tmp_path / "fox.json", [[True]])
    given = [f"stories.path='{board}'", f"output='{tmp_path / 'run'}'", "parallel.ulysses=2", "debug.log_level=debug"]
    ranks = ["launch=torchrun", "launch.processes_per_node=2"]
    done = run_in_fork([*SMALL, *given, *ranks], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    steps = [rank for rank, _, word in LOG_LINE.findall(done.stderr) if word == "StepFinished"]
    assert sorted(steps) == ["0"] * 3 + ["1"] * 3
