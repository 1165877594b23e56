"""For benchmarks on several ranks, real or simulated.

Real ranks: start a benchmark under torchrun, collect the report of each rank, watch its memory. Simulated ranks: one
process acts as one rank of N and sends nothing; it counts the work of that rank.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.mesh import ReplicaMesh, build_mesh, lone_mesh

CPU = torch.device("cpu")
_FOLDER = "STORYMEM_BENCHMARK_REPORTS"


def run_ranks(module: str, num_ranks: int, arguments: Sequence[object]) -> list[dict[str, Any]]:
    """Start ``module`` under torchrun on this machine, with one thread per rank; return the report of every rank.

    Freed memory goes back to the system at once (glibc keeps none), so resident memory is live memory.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        variables = {
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
            _FOLDER: folder,
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        subprocess.run([*torchrun, "-m", module, *map(str, arguments)], env=os.environ | variables, check=True)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def reporting_rank() -> int | None:
    """This process's rank if ``run_ranks`` started it, else None."""
    return int(os.environ["RANK"]) if _FOLDER in os.environ else None


def report(values: dict[str, Any]) -> None:
    """Report this rank's results to ``run_ranks``."""
    (Path(os.environ[_FOLDER]) / f"{reporting_rank()}.json").write_text(json.dumps(values))


@contextlib.contextmanager
def simulated_ranks(
    num_ranks: int, rank: int = 0, layout: Layout | None = None, *, shard_over: str = "replica"
) -> Iterator[ReplicaMesh]:
    """Act as ``rank`` of ``num_ranks`` in one replica; the other ranks do not exist. The default layout is all Ulysses.

    Rank 0 holds the uneven remainders of sharded weights.
    """
    if num_ranks == 1:
        yield lone_mesh()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield build_mesh(layout or Layout(ulysses=num_ranks, ranks_per_node=num_ranks), CPU, shard_over=shard_over)
    finally:
        dist.destroy_process_group()


class MemoryPeak:
    """Peak of this process's anonymous resident memory while the block runs, sampled every 2 ms.

    Pages of mapped files are not counted: the system takes them back when it needs them.
    """

    def __enter__(self) -> "MemoryPeak":
        self.start_bytes = self.peak_bytes = rss_anon_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, rss_anon_bytes())

    @property
    def grown_bytes(self) -> int:
        """The peak, less the memory at the start of the block."""
        return self.peak_bytes - self.start_bytes

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak_bytes = max(self.peak_bytes, rss_anon_bytes())
            time.sleep(0.002)


def rss_anon_bytes() -> int:
    """Anonymous resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon line")
