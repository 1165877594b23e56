"""Processes that share one run folder, each a replica with a fake renderer; they can be killed, paused and counted.

Forked, so that they start in milliseconds with everything imported.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.summary import Replica
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import FakeRenderer, make_part


def fork_worker(work: Callable[[], int]) -> int:
    """Fork a process that calls ``work`` and exits with what it returns, or with 70 when it raises; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        torch.set_num_threads(1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start_worker(
    root: Path,
    stories: Sequence[Story],
    *,
    log: Path | None = None,
    step_seconds: float = 0.0,
    before: Callable[[], None] = lambda: None,
    settings: DispatchSettings | None = None,
    replica: Replica | None = None,
) -> int:
    """Fork a process that renders ``stories`` into ``root``; return its id. It exits as the command would.

    ``before`` runs in the child first, for instance to set traps.
    """

    def work() -> int:
        before()
        summary = render_batch(
            parts=[make_part(root, stories)],
            renderer=FakeRenderer(step_seconds=step_seconds, log=log),
            settings=settings or DispatchSettings(poll_seconds=0.02, lease_seconds=20.0, checkpoint_every_steps=1),
            replica=replica,
        )
        return summary.exit_code

    return fork_worker(work)


def exit_code(pid: int) -> int:
    """Wait for a worker and return its exit code (negative: the signal that killed it)."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def has_ended(pid: int) -> bool:
    """Whether a worker has ended; ``exit_code`` may still be called."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until ``condition`` holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} seconds: {condition}")
        time.sleep(0.005)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a worker."""
    os.kill(pid, number)


def begun(log: Path) -> list[str]:
    """All shots that were begun, once for each attempt."""
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def begun_by(log: Path, pid: int) -> list[str]:
    """The shots that one worker began."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [name for name, of in lines if of == str(pid)]


def in_flight(root: Path, shots: Iterable[str], pid: int) -> set[str]:
    """Of the ``shots`` that an ended process began, those that it did not commit itself."""
    lost = set()
    for name in shots:
        records = (root / "stories" / name.replace(":", "/") / "records").glob("*.json")
        attempts = [ShotRecord.from_json(json.loads(path.read_text())).attempt_id for path in records]
        if str(pid) not in [attempt.rsplit("-", 3)[1] for attempt in attempts]:
            lost.add(name)
    return lost


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A fresh folder in memory where the system has one, so that flushing costs nothing; else in the usual place."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)
