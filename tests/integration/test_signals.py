"""Jobs that are stopped, preempted or orphaned: by signals to this process, to a launcher, or to a sleeping rank."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.hardware import process_start
from storymem_dist.launch.group_folder import remove_dead_folders
from storymem_dist.render.batch import render_batch
from tests.helpers.batches import STORIES, render
from tests.helpers.fake_renderer import FakeRenderer, finished_files, make_part
from tests.helpers.small_job import SMALL, media_bytes, render_small, write_storyboard
from tests.helpers.workers import exit_code, fork_worker, kill, quick_folder, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_every_signal_of_a_scheduler_or_a_lost_terminal_stops_a_job_in_this_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    stories, run = write_storyboard(tmp_path / "fox.json", [[True, False]]), tmp_path / "run"
    steps = "sampler.num_inference_steps=60"
    timer = threading.Thread(target=_when_rendering, args=(run, lambda: os.kill(os.getpid(), number)))
    timer.start()
    assert render_small(stories, run, steps, "sampler.solver=euler") == 0
    timer.join()
    stop = json.loads((run / "stop.json").read_text())
    assert (stop["state"], stop["reason"]) == ("stopped", number.name)
    assert len(list((run / "checkpoints").rglob("*.safetensors"))) == 1
    assert not list((run / "leases").iterdir())


def _when_rendering(run: Path, act: Callable[[], None]) -> None:
    wait_until(lambda: any("StepFinished" in path.read_text() for path in run.glob("events/*.jsonl")), seconds=120)
    act()


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSwitch().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason() is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("request_stop", ["signal", "file", "none"])
def test_a_kill_after_a_request_to_stop_is_no_death_of_the_shot(root: Path, request_stop: str) -> None:
    """A scheduler sends SIGTERM, then SIGKILL before the step has ended. Without a request, a kill is a death."""
    rendering = root.parent / "rendering"
    worker = fork_worker(lambda: _render_long_steps(root, rendering))
    wait_until(rendering.exists)
    if request_stop == "signal":
        kill(worker, signal.SIGTERM)
    elif request_stop == "file":
        (root / "STOP").touch()
    if request_stop != "none":
        wait_until(lambda: bool(list((root / "leases").glob("*.stopping"))))
    kill(worker)
    assert exit_code(worker) == -signal.SIGKILL
    again = render(root, max_attempts=1, stop=StopSwitch())
    assert again.state == ("failed" if request_stop == "none" else "done")
    assert not list((root / "leases").iterdir())
    if request_stop != "none":
        render(root.with_name("whole"))
        assert finished_files(root) == finished_files(root.with_name("whole"))


def _render_long_steps(root: Path, rendering: Path) -> int:
    def before_step(job: ShotJob, step: int) -> None:
        rendering.touch()

    with StopSwitch([root / "STOP"], file_seconds=0.1).listening() as stop:
        return render_batch(
            parts=[make_part(root, STORIES)],
            renderer=FakeRenderer(step_seconds=60.0, before_step=before_step),
            settings=DispatchSettings(poll_seconds=0.02, checkpoint_every_steps=0),
            stop=stop,
        ).exit_code


def _start(arguments: list[str], temporary: Path) -> subprocess.Popen[str]:
    temporary.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("STORYMEM_", "SLURM_"))}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("launcher", ["launch=torchrun", "torchrun"])
def test_ranks_end_when_their_launcher_is_killed_and_leave_nothing(tmp_path: Path, launcher: str) -> None:
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    for name in ("fox", "owl"):
        write_storyboard(tmp_path / "stories" / f"{name}.json", [[True]])
    steps = ["sampler.num_inference_steps=900", "sampler.solver=euler"]
    given = [*SMALL, "parallel=replicas", f"stories.path='{tmp_path / 'stories'}'", f"output='{run}'", *steps]
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "storymem_dist"]
    else:
        start = ["storymem_dist", "launch=torchrun", "launch.processes_per_node=2"]
    started = _start([*start, *given], temporary)
    ranks: list[int] = []
    try:
        _when_rendering(run, lambda: ranks.extend(_children(started.pid)))
        assert len(ranks) >= (1 if launcher == "torchrun" else 2)
        started.kill()
        wait_until(lambda: not any(process_start(rank) for rank in ranks), seconds=60)
    finally:
        for pid in [started.pid, *ranks]:
            if process_start(pid):
                os.kill(pid, signal.SIGKILL)
        output, _ = started.communicate()
    assert not list((run / "leases").glob("*.lease")), output
    assert "Traceback" not in output
    if launcher == "launch=torchrun":
        left = [path.name[:15] for path in temporary.iterdir() if "torchinductor" not in path.name]
        assert left == ["storymem-ranks-"]
        remove_dead_folders(temporary)
        assert not list(temporary.glob("*-ranks-*")) and not list(temporary.glob("torchelastic_*"))


def test_a_full_disk_under_several_ranks_ends_all_with_5_without_restarts(tmp_path: Path) -> None:
    """A limit on file sizes, which ranks inherit, is a full disk for whatever is larger."""
    write_storyboard(tmp_path / "stories" / "fox.json", [[True]])
    write_storyboard(tmp_path / "stories" / "owl.json", [[True]])
    run = tmp_path / "run"
    assert render_small(tmp_path / "stories", tmp_path / "whole") == 0  # and the weights are made
    given = [*SMALL, "parallel=replicas", f"stories.path='{tmp_path / 'stories'}'", f"output='{run}'"]
    command = [sys.executable, "-m", "storymem_dist", *given, "launch=torchrun", "launch.processes_per_node=2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("STORYMEM_", "SLURM_"))}
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("storymem-render: error:") == 1 and "Traceback" not in done.stderr
    assert "next, once that is mended: " in done.stdout
    assert not list((run / "failures").glob("*")) and not list((run / "leases").glob("*.lease"))
    assert time.monotonic() - began < 200
    assert render_small(tmp_path / "stories", run, "dispatch.max_attempts=1") == 0
    assert media_bytes(run) == media_bytes(tmp_path / "whole")
