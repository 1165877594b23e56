"""Renders on several GPUs in a child process: ``storymem-render launch=torchrun``, followed through its event files."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from storymem_dist.dispatch.stop import STOP_FILES_VARIABLE
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.events import StampedEvent
from storymem_dist.observe.journal import JournalTail
from storymem_dist.pipeline.stopping import StopAsker

_POLL_SECONDS = 0.2
_MOST_MESSAGE = 4000
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_PROGRAM = (
    "import sys\n"
    "from storymem_dist.parallel.launcher_watch import follow_launcher\n"
    "follow_launcher(int(sys.argv.pop(1)))\n"
    "from storymem_dist.cli.commands import render\n"
    "render()\n"
)
"""The command, which stops after its running step when the process that started it is gone."""


class ChildFailed(StoryMemError):
    """The child ended with an error; ``exit_code`` is its own, and the message what it printed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def render_in_child(
    device: torch.device,
    gpus: int,
    overrides: Sequence[str],
    run_folder: Path,
    on_event: Callable[[StampedEvent], None],
    asker: StopAsker,
) -> None:
    """Run ``storymem-render`` on ``gpus`` ranks and wait for it.

    ``on_event`` receives its events. When ``asker`` says so, the child is asked to stop; it finishes its step first.
    Raises ``ConfigError`` for more GPUs than there are, ``ChildFailed`` when it fails, and what ``asker`` raises.
    """
    if device.type == "cuda" and gpus > (found := torch.cuda.device_count()):
        raise ConfigError(f"gpus={gpus}, but torch sees {found} here; use at most that many")
    arguments = [
        *overrides,
        "launch=torchrun",
        f"launch.processes_per_node={gpus}",
        f"parallel.device={device.type}",
    ]
    tail = JournalTail(run_folder / "events", offsets=_ends_of(run_folder / "events"))
    with tempfile.TemporaryDirectory(prefix="storymem-child-") as folder:
        stop_file, printed = Path(folder) / "STOP", Path(folder) / "stderr"
        with printed.open("wb") as stream:
            child = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                env=_environment(stop_file),
                start_new_session=True,  # a signal for the host's terminal is not for the child
            )
        try:
            is_over = False
            while not is_over:
                is_over = child.poll() is not None
                while events := tail.poll():
                    for stamped in events:
                        on_event(stamped)
                if asker.should_stop():
                    stop_file.touch()
                if not is_over:
                    time.sleep(_POLL_SECONDS)
        finally:
            if child.poll() is None:  # the host's callback raised: the child ends after its step
                stop_file.touch()
                child.wait()
        if child.returncode:
            raise ChildFailed(_message(printed, child.returncode), max(1, child.returncode))
    asker.check("the render was stopped; the same call continues it")


def _environment(stop_file: Path) -> dict[str, str]:
    """The host's variables, without those that make a process one of several ranks, and with a stop file of its own."""
    variables = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    variables[STOP_FILES_VARIABLE] = str(stop_file)
    folder = Path(__file__).parents[2]
    if folder.name != "site-packages":  # a checkout, which the child may not find by itself
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), variables.get("PYTHONPATH")]))
    return variables


def _ends_of(folder: Path) -> dict[str, int]:
    """The lengths of the event files of earlier jobs."""
    ends = {}
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):
            ends[path.name] = path.stat().st_size
    return ends


def _message(printed: Path, exit_code: int) -> str:
    """The error that the child printed, else its last lines."""
    text = printed.read_bytes()[-_MOST_MESSAGE:].decode(errors="replace")
    marker = "storymem-render: error"
    if marker in text:
        return text[text.rindex(marker) :].partition(": error")[2].partition(": ")[2].split("\n")[0]
    how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return f"storymem-render ended with {how}: {' '.join(text.split())[-600:]}"
