"""A real job is stopped inside a shot; the same command continues with other ranks: same run folder, same latents."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from storymem_dist.diffusion.denoise import denoise
from storymem_dist.diffusion.solver import Solver
from storymem_dist.render import clip as render_clip
from tests.helpers.ranks import run_ranks
from tests.helpers.small_job import records, render_small, write_storyboard
from tests.helpers.tiny_dit import largest_error
from tests.helpers.workers import quick_folder

TOLERANCE = 1e-5
NUM_STEPS = 8
OVERRIDES = (
    f"sampler.num_inference_steps={NUM_STEPS}",
    "dispatch.checkpoint_every_steps=0",
    "dispatch.poll_seconds=0.1",
)
SHOT = "fox/shot_02"
LAYOUTS = {
    "single": ["parallel=single"],
    "cfg": ["parallel.cfg=2"],
    "ring": ["parallel.ring=2"],
    "ulysses": ["parallel.ulysses=2"],
    "fsdp": ["parallel=fsdp_2gpu"],
    "fsdp_cfg": ["parallel.cfg=2", "parallel.weights=fsdp"],
    "auto": [],
    "auto_together": ["parallel.num_replicas=1"],
}


def render(board: Path, run: Path, layout: str, stop_after: int = 0) -> tuple[int, Tensor | None]:
    """Render two shots of eight steps; stop this job as SIGTERM does, in step ``stop_after`` of all that it takes.

    Returns the exit code and the last latents that were finished.
    """
    steps, last = [], []
    step = Solver.step

    def counted(*arguments: Any) -> Tensor:
        steps.append(1)
        if len(steps) == stop_after and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    def kept(*arguments: Any, **options: Any) -> Tensor:
        last.append(denoise(*arguments, **options))
        return last[-1]

    with patch.object(Solver, "step", counted), patch.object(render_clip, "denoise", kept):
        code = render_small(board, run, *LAYOUTS[layout], *OVERRIDES)
    return code, last[-1] if last else None


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in run.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[Path, Tensor]]:
    """A folder with a storyboard, and what one rank makes of it without a stop."""
    with quick_folder() as folder:
        board = write_storyboard(folder / "fox.json", [[True, False]])
        ((code, latents),) = run_ranks(render, 1, (board, folder / "run", "single"))
        assert code == 0
        yield folder, latents


@pytest.mark.parametrize(
    ("first", "then", "step"),
    [
        (("single", 1), ("ulysses", 2), 3),
        (("single", 1), ("cfg", 2), 1),
        (("single", 1), ("fsdp", 2), 7),
        (("ulysses", 2), ("single", 1), 5),
        (("fsdp_cfg", 2), ("ring", 2), 4),
        (("auto_together", 2), ("auto_together", 4), 6),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_a_job_that_was_stopped_inside_a_shot_continues_there_in_another_layout(
    alone: tuple[Path, Tensor], tmp_path: Path, first: tuple[str, int], then: tuple[str, int], step: int
) -> None:
    folder, expected = alone
    board, run = folder / "fox.json", tmp_path / "run"
    stopped = run_ranks(render, first[1], (board, run, first[0], NUM_STEPS + step))
    assert [code for code, _ in stopped] == [0] * first[1]
    assert json.loads((run / "stop.json").read_text())["state"] == "stopped"
    (checkpoint,) = run.glob("checkpoints/**/*.safetensors")
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()

    resumed = run_ranks(render, then[1], (board, run, then[0]))
    found, undisturbed = records(run), records(folder / "run")
    assert [code for code, _ in resumed] == [0] * then[1]
    assert [(event["shot_id"], event["step"]) for event in events(run, "ShotResumed")] == [("shot_02", step)]
    assert json.loads((run / f"stories/{SHOT}.json").read_text())["host"]["resumed_at_step"] == step
    assert metadata["fingerprint"] == found[SHOT]["fingerprint"] == undisturbed[SHOT]["fingerprint"], (
        "a fingerprint holds nothing of the layout"
    )
    assert [frame["frame_index"] for frame in found[SHOT]["keyframes"]] == [
        frame["frame_index"] for frame in undisturbed[SHOT]["keyframes"]
    ]
    for _, latents in resumed:
        assert largest_error(latents, expected) <= TOLERANCE
        assert torch.isfinite(latents).all()


def test_ranks_that_choose_for_themselves_render_the_same_and_say_what_they_chose(
    alone: tuple[Path, Tensor], tmp_path: Path
) -> None:
    folder, expected = alone
    run = tmp_path / "run"
    done = run_ranks(render, 2, (folder / "fox.json", run, "auto"))
    assert [code for code, _ in done] == [0, 0]
    assert {name: record["fingerprint"] for name, record in records(run).items()} == {
        name: record["fingerprint"] for name, record in records(folder / "run").items()
    }
    assert max(largest_error(latents, expected) for _, latents in done if latents is not None) <= TOLERANCE
    (chosen,) = events(run, "LayoutChosen")
    started = events(run, "JobStarted")
    assert {event["layout"] for event in started} == {chosen["layout"]}
    assert chosen["reasons"] and chosen["considered"] and chosen["total_seconds"] > 0
    assert json.loads((run / f"stories/{SHOT}.json").read_text())["host"]["layout"] == chosen["layout"]
    assert not events(folder / "run", "LayoutChosen"), "a preset leaves nothing to choose"
