"""A rank that hangs in a render: all ranks end in time, it and its place are named, and the shot is rendered later."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from storymem_dist.diffusion.solver import Solver
from storymem_dist.dispatch import saving as background
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.errors import CollectiveFailed
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.render import shot as render_shot
from tests.helpers.commands import run_in_fork
from tests.helpers.ranks import RankFailed, run_ranks
from tests.helpers.small_job import SMALL, media_bytes, render_small, write_storyboard
from tests.helpers.workers import quick_folder

ROOT = Path(__file__).parents[2]
TIMEOUT = 4.0
LIMITS = (
    f"parallel.collective_timeout_seconds={TIMEOUT}",
    f"parallel.leader_timeout_seconds={TIMEOUT}",
    "dispatch.poll_seconds=0.1",
)
STALL = f"parallel.stall_timeout_seconds={TIMEOUT}"
SPLIT = "parallel.ulysses=2"


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        write_storyboard(folder / "in" / "moon.json", [[True, False]])
        yield folder


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[dict[str, bytes]]:
    with quick_folder() as folder:
        write_storyboard(folder / "in" / "moon.json", [[True, False]])
        assert run_ranks(render, 2, (folder, "", SPLIT, STALL)) == [0, 0]
        assert said(folder, 0) == said(folder, 1) == "", "nothing is reported of a render in which nothing hangs"
        yield media_bytes(folder / "run")


def hang_for_a_minute() -> None:
    time.sleep(60)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(60)  # no other thread of Python runs meanwhile


def pause() -> None:
    time.sleep(1.0)  # so that the last sign of life was before
    subprocess.Popen(["sh", "-c", f"sleep {1.2 * TIMEOUT}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1.0)


def at_call(number: int, do: Callable[[], None], work: Callable[..., Any]) -> Callable[..., Any]:
    """``work``, which does ``do`` before its ``number``-th call."""
    calls = []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            do()
        return work(*arguments, **options)

    return wrapped


def nothing_is_ready(claim: Callable[..., Any]) -> Callable[..., Any]:
    ready_at = time.monotonic() + 3 * TIMEOUT

    def wrapped(*arguments: Any) -> Any:
        return claim(*arguments) if time.monotonic() > ready_at else None

    return wrapped


def render(folder: Path, hang: str, *overrides: str) -> int:
    """Render two shots of three steps. ``hang`` is ``WHERE of RANK``; standard error goes to a file of each rank."""
    rank = os.environ["RANK"]
    where, _, hanging_rank = hang.partition(" of ")
    if rank == hanging_rank:
        owner, name, replacement = {
            "step": (Solver, "step", at_call(5, hang_for_a_minute, Solver.step)),
            "interpreter": (Solver, "step", at_call(5, hold_the_interpreter, Solver.step)),
            "pause": (Solver, "step", at_call(5, pause, Solver.step)),
            "decode": (WanVae, "decode", at_call(2, hang_for_a_minute, WanVae.decode)),
            "choice": (render_shot, "choose_keyframes", at_call(2, hang_for_a_minute, render_shot.choose_keyframes)),
            "save": (background, "save_shot", at_call(2, hang_for_a_minute, background.save_shot)),
            "wait": (ShotQueue, "claim", nothing_is_ready(ShotQueue.claim)),
        }[where]
        patch.object(owner, name, replacement).start()
    with (folder / f"rank-{rank}.txt").open("w") as sys.stderr:
        os.dup2(sys.stderr.fileno(), 2)
        try:
            return render_small(folder / "in", folder / "run", *LIMITS, *overrides)
        except CollectiveFailed as error:
            sys.stderr.write(f"{error}\n")
            raise


def said(folder: Path, rank: int) -> str:
    return (folder / f"rank-{rank}.txt").read_text()


def warnings_in(run: Path) -> str:
    lines = [json.loads(line) for path in run.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    return "\n".join(line["message"] for line in lines if line["event"] == "WarningIssued")


HERE = r"at test_hangs.py:\d+ in hang_for_a_minute"
DENOISE = "stage 'denoise' of moon:shot_02"
DECODE = "stage 'decode' of moon:shot_02"
KEYFRAMES = "stage 'keyframes' of moon:shot_02"
HANGS = {
    "step of 1": rf"rank 1 \(\S+\) has not left {DENOISE}, step 2 of 3, for \d s; it is {HERE}; "
    rf"rank 0 waits for it in {DENOISE}, step 3 of 3, for \d s",
    "decode of 0": rf"rank 0 \(\S+\) has not left {DECODE}, for \d s; it is {HERE}; rank 1 waits for it in {DECODE}",
    "choice of 0": rf"rank 0 \(\S+\) ended in {KEYFRAMES}: no sign of life for \d s "
    rf"\(parallel.stall_timeout_seconds\), {HERE}; rank 1 waits for it in {KEYFRAMES}",
    "save of 0": r"rank 0 \(\S+\) ended in stage 'save' of moon:shot_02: no sign of life for \d s "
    rf"\(parallel.stall_timeout_seconds\), at .*; rank 1 waits for it in the time after {KEYFRAMES}",
    "interpreter of 1": r"rank 1 \(\S+\) has shown no sign of life for \d s; it was last seen in stage '.*; "
    rf"rank 0 waits for it in {DENOISE}, step 3 of 3",
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_rank_that_hangs_is_named_with_its_place_and_its_shot_is_rendered_after_a_restart(
    folder: Path, hang: str, undisturbed: dict[str, bytes]
) -> None:
    hanging = int(hang[-1])
    limits = (
        (STALL,) if hang in ("choice of 0", "save of 0") else ()
    )  # a leader keeps sending signs of life: its own limit counts
    with pytest.raises(RankFailed, match="CollectiveFailed") as failed:
        run_ranks(render, 2, (folder, hang, SPLIT, *limits))
    assert failed.value.rank == 1 - hanging
    assert re.search(HANGS[hang], said(folder, 1 - hanging)), said(folder, 1 - hanging)
    assert re.search(HANGS[hang], warnings_in(folder / "run")), "the event files have it too"
    if "interpreter" not in hang:
        assert "died with exit code 1" in str(failed.value), "the rank that hangs ends by itself"
        assert re.search(r"File .*test_hangs.py., line \d+ in hang_for_a_minute", said(folder, hanging)), "its stack"
    assert run_ranks(render, 2, (folder, "", SPLIT)) == [0, 0]
    assert media_bytes(folder / "run") == undisturbed


@pytest.mark.parametrize("hang", ["step of 0", "interpreter of 0"])
def test_a_rank_that_has_no_peers_does_not_hang_for_ever_either(folder: Path, hang: str) -> None:
    limits = ("parallel.collective_timeout_seconds=1", "parallel.stall_timeout_seconds=1")
    with pytest.raises(RankFailed, match="died with exit code 1"):
        run_ranks(render, 1, (folder, hang, *limits), timeout_seconds=40)
    if hang == "step of 0":
        expected = rf"rank 0 \(\S+\) ended in {DENOISE}, step 2 of 3: no sign of life for 1 s .*{HERE}"
        assert re.search(expected, said(folder, 0))
        assert re.search(expected, warnings_in(folder / "run"))
        assert "in hang_for_a_minute" in said(folder, 0)
    else:
        assert "Timeout (0:00:02)!" in said(folder, 0) and "in hold_the_interpreter" in said(folder, 0)


def test_a_long_wait_for_a_shot_is_no_hang(folder: Path, undisturbed: dict[str, bytes]) -> None:
    assert run_ranks(render, 2, (folder, "wait of 0", SPLIT, STALL)) == [0, 0]
    assert said(folder, 0) == said(folder, 1) == ""
    assert media_bytes(folder / "run") == undisturbed


def test_a_paused_rank_does_not_take_the_pause_for_a_hang(folder: Path) -> None:
    assert run_ranks(render, 1, (folder, "pause of 0", STALL)) == [0]
    assert said(folder, 0) == ""


HANG_ONCE = """
import os, threading, time, sys

def hang_at_the_second_step():
    while not hasattr(sys.modules.get("storymem_dist.diffusion.solver"), "Solver"):
        time.sleep(0.01)
    solver, calls = sys.modules["storymem_dist.diffusion.solver"].Solver, []
    step = solver.step
    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(200)
        return step(*arguments)
    solver.step = wrapped

if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    threading.Thread(target=hang_at_the_second_step, daemon=True).start()
"""


def test_torchrun_starts_the_ranks_again_after_a_hang(folder: Path, undisturbed: dict[str, bytes]) -> None:
    (folder / "hang").mkdir()
    (folder / "hang" / "sitecustomize.py").write_text(HANG_ONCE)
    given = (f"stories.path='{folder / 'in'}'", "stories.max_shots=1", f"output='{folder / 'run'}'", SPLIT, *LIMITS)
    done = run_in_fork(
        [*SMALL, *given, "launch=torchrun", "launch.processes_per_node=2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder / 'hang'}{os.pathsep}{ROOT}"},
        seconds=150,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank 1 \(\S+\) has not left stage 'denoise' of moon:shot_01, step 2 of 3", done.stderr)
    assert "Traceback" not in done.stderr
    (shot,) = (folder / "run").glob("stories/moon/shot_*.mp4")
    assert shot.read_bytes() == undisturbed["stories/moon/shot_01.mp4"]
