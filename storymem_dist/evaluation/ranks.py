"""Several processes of this node score one run, each on its own device: clips are dealt out in turn.

The processes share nothing but the run folder: each leaves its values in the cache, as one process would. So there is
no process group that could hang, and what a process that dies leaves undone is computed by the one that started it.
Knows processes; nothing of measures.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from storymem_dist.errors import ConfigError
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.evaluation.tasks import Progress, Task
from storymem_dist.resources import PACKAGE_FOLDER

_POLL_SECONDS = 0.2
_END_SECONDS = 10.0


def choose_device(settings: EvaluationSettings, local_rank: int = 0) -> torch.device:
    """The device of one of the processes of this node. Raises ``ConfigError`` for a GPU that is not there."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cuda" and not num_gpus:
        raise ConfigError("evaluation.device=cuda, but torch sees no GPU here; use evaluation.device=auto or cpu")
    return torch.device("cuda", local_rank % num_gpus) if num_gpus and settings.device != "cpu" else torch.device("cpu")


@dataclass(frozen=True)
class RankProcesses:
    """Starts ``num_ranks`` processes for the open tasks of a run, and waits for them."""

    settings: EvaluationSettings
    num_ranks: int

    def __call__(self, root: Path, tasks: Sequence[Task], progress: Progress) -> None:
        """Compute ``tasks``; what a process that fails leaves is left. Raises ``OSError``."""
        count = min(self.num_ranks, len(tasks))
        with tempfile.TemporaryDirectory(prefix="storymem-score-") as name:
            folder, processes = Path(name), list[subprocess.Popen[bytes]]()
            try:
                for rank in range(count):
                    processes.append(self._start(root, tasks[rank::count], folder, rank, count))
                while any(process.poll() is None for process in processes):
                    progress(_num_done(folder), len(tasks))
                    time.sleep(_POLL_SECONDS)
            finally:
                _end(processes)

    def _start(
        self, root: Path, tasks: Sequence[Task], folder: Path, rank: int, count: int
    ) -> "subprocess.Popen[bytes]":
        job = {
            "root": str(root.absolute()),
            "settings": asdict(self.settings),
            "tasks": [asdict(task) for task in tasks],
            "rank": rank,
            "launcher": os.getpid(),
        }
        path = folder / f"job-{rank}.json"
        path.write_text(json.dumps(job))
        parent = str(PACKAGE_FOLDER.parent)
        threads = str(max(1, (os.cpu_count() or 1) // count))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (parent, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            "TOKENIZERS_PARALLELISM": "false",
            "RANK": str(rank + 1),  # not 0: an interrupt is reported by this process alone
        }
        command = [sys.executable, "-m", "storymem_dist.evaluation.rank", str(path)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)


def _num_done(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("done-*"))


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()
