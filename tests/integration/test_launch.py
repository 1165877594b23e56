"""Jobs in every kind of start: torchrun, accelerate, ``launch=torchrun``, sweeps; compared with one process."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from storymem_dist.artifacts.video import read_png
from storymem_dist.files import read_json
from tests.helpers.commands import run_in_fork
from tests.helpers.ranks import run_ranks
from tests.helpers.small_job import SMALL, media_bytes, records, render_small, write_storyboard

ROOT = Path(__file__).parents[2]
RENDER = ("-m", "storymem_dist.cli")
LOCAL_STEPS = "sampler.num_inference_steps=2"
REPLICAS = "parallel=replicas"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    for name in ("fox", "owl"):
        write_storyboard(folder / f"{name}.json", [[True, False]])
    return folder


@pytest.fixture(scope="module")
def alone(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert render_small(stories, run, LOCAL_STEPS) == 0
    return run


def run_python(arguments: Sequence[str], *, seconds: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("STORYMEM_JOB", "SLURM_"))}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    if tuple(arguments[:2]) == RENDER:
        return run_in_fork(arguments[2:], module=RENDER[1], cwd=ROOT, env=environment, seconds=seconds)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def overrides(stories: Path, run: Path, *more: str) -> list[str]:
    return [*SMALL, f"stories.path='{stories}'", f"output='{run}'", LOCAL_STEPS, *more]


def test_torchrun_with_two_replicas_renders_the_bytes_of_one_process(
    stories: Path, alone: Path, tmp_path: Path
) -> None:
    done = run_python(
        [*RENDER, *overrides(stories, tmp_path / "run", "launch=torchrun", "launch.processes_per_node=2", REPLICAS)]
    )
    assert done.returncode == 0, done.stderr
    assert media_bytes(tmp_path / "run") == media_bytes(alone)
    assert records(tmp_path / "run") == records(alone)
    assert read_json(tmp_path / "run" / "stop.json")["state"] == "done"


def test_four_replicas_for_two_stories_render_the_same_and_end(stories: Path, alone: Path, tmp_path: Path) -> None:
    """Two of them never get a shot: they load with the others and then do not wait for a peer."""
    assert run_ranks(render_small, 4, (stories, tmp_path / "run", LOCAL_STEPS, REPLICAS)) == [0] * 4
    assert media_bytes(tmp_path / "run") == media_bytes(alone)


def test_accelerate_with_two_ranks_renders_the_bytes_of_one_process(stories: Path, alone: Path, tmp_path: Path) -> None:
    config = str(ROOT / "launch" / "accelerate" / "cpu.yaml")
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", config, *RENDER]
    done = run_python([*accelerate, *overrides(stories, tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert media_bytes(tmp_path / "run") == media_bytes(alone)
    assert sorted(read_starts(tmp_path / "run")) == [0, 1]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, ["parallel.ulysses=2"]), (4, ["parallel.ring=2", "parallel.ulysses=2"])],
    ids=["ulysses", "ring-and-ulysses"],
)
def test_a_split_layout_renders_the_same_memory(
    ranks: int, layout: list[str], stories: Path, alone: Path, tmp_path: Path
) -> None:
    """Pixels of split layouts may differ by a level here and there; which frames are remembered may not.

    That their latents agree within 1e-5 is shown over ranks in ``tests/distributed``.
    """
    given = (stories, tmp_path / "run", LOCAL_STEPS, *layout, "stories.max_stories=1")
    assert run_ranks(render_small, ranks, given) == [0] * ranks
    here, there = records(tmp_path / "run"), records(alone)
    assert here
    for shot, record in here.items():
        assert record["keyframes"] == there[shot]["keyframes"]
    for name, pixels in pictures(tmp_path / "run").items():
        assert (pixels.int() - pictures(alone)[name].int()).abs().max() <= 1  # of 255 levels


def test_a_joined_sweep_loads_each_model_once_and_equals_separate_runs(stories: Path, tmp_path: Path) -> None:
    swept = ["sampler.seed=1,2", "sampler.guidance_scale_low=2.0,3.5"]
    sweep = tmp_path / "sweep"
    given = [*SMALL, LOCAL_STEPS, f"stories.path='{stories / 'fox.json'}'", f"output='{sweep}'"]
    done = run_python([*RENDER, "-m", *given, *swept])
    assert done.returncode == 0, done.stderr
    loads = [
        event
        for path in sweep.glob("*/events/*.jsonl")
        for event in map(json.loads, path.read_text().splitlines())
        if event["event"] == "StageFinished" and event["stage"] == "load"
    ]
    assert len(loads) == 2  # t2v and m2v experts, for eight shots of four points
    for seed in (1, 2):
        for scale in (2.0, 3.5):
            point = sweep / f"sampler.guidance_scale_low={scale},sampler.seed={seed}"
            assert f"{point.name}  done" in done.stdout
            run = tmp_path / f"{seed}-{scale}"
            settings = (LOCAL_STEPS, f"sampler.seed={seed}", f"sampler.guidance_scale_low={scale}")
            assert render_small(stories / "fox.json", run, *settings) == 0
            assert media_bytes(point) == media_bytes(run)
            assert records(point) == records(run)


def test_a_point_that_cannot_begin_stops_no_other(stories: Path, tmp_path: Path) -> None:
    given = [*SMALL, LOCAL_STEPS, f"output='{tmp_path}'", "stories.max_shots=1"]
    paths = f"stories.path={stories / 'fox.json'},{tmp_path / 'missing.json'}"
    done = run_python([*RENDER, "-m", *given, paths])
    assert done.returncode == 3
    assert "  done " in done.stdout and "  refused " in done.stdout
    assert done.stderr.count("storymem-render: error:") == 1


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["sampler.stepz=3"], 2, "'sampler.stepz' is not a setting; did you mean"),
        (["sampler.num_frames=18"], 2, "sampler.num_frames=18 is not allowed"),
        (["model=wan22_a14b", "model.t2v_checkpoint=nowhere"], 4, "nowhere is not a folder"),
        (["parallel.backend=nccl"], 2, "parallel.backend=nccl needs GPUs"),
        (["parallel=fsdp_4gpu"], 2, "needs 4 ranks per replica, but the job has 2 ranks"),
    ],
)
def test_a_mistake_is_reported_once_before_anything_starts(
    given: list[str], code: int, message: str, stories: Path, tmp_path: Path
) -> None:
    arguments = overrides(stories, tmp_path / "run", "launch=torchrun", "launch.processes_per_node=2")
    began = time.monotonic()
    done = run_python([*RENDER, *arguments, *given])
    assert done.returncode == code, done.stderr
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr and "elastic" not in done.stderr
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 100  # a hang, not a slow machine


def test_a_port_in_use_is_reported_before_anything_starts(stories: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        given = overrides(stories, tmp_path / "run", "launch=torchrun", "launch.processes_per_node=2")
        done = run_python([*RENDER, *given, f"launch.port={port}"])
    assert done.returncode == 2
    assert done.stderr.count(f"launch.port={port} cannot be used on this node") == 1


def test_ranks_that_meet_the_same_mistake_tell_it_once(stories: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *RENDER]
    done = run_python([*torchrun, *overrides(stories, tmp_path / "run"), "sampler.num_frames=18"])
    assert done.returncode != 0
    assert done.stderr.count("sampler.num_frames=18 is not allowed") == 1


def pictures(run: Path) -> dict[str, Tensor]:
    """All remembered keyframes, uint8 ``[3, H, W]``, by path in the run folder."""
    return {path.relative_to(run).as_posix(): read_png(path) for path in run.glob("stories/*/keyframes/*.png")}


def read_starts(run: Path) -> list[int]:
    """The replicas that took part."""
    events = [json.loads(line) for path in run.glob("events/*.jsonl") for line in path.read_text().splitlines() if line]
    return [event["replica"] for event in events if event["event"] == "JobStarted"]
