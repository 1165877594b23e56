"""Run a function on several gloo ranks, as torchrun would start them, and bring back what each returned.

    results = run_ranks(check_something, world_size=4, args=(17,))

The function must live at the top of a module and its arguments and results must be picklable. The ranks come from a
fork server that has imported torch already, so starting them costs tens of milliseconds. They find each other through a
store that the parent hosts on a port which the system chose (no races for ports). The first rank that fails ends the
others, and its trace is in the ``RankFailed`` that the parent raises; ranks that hang are shown where they hang. No
process outlives the call.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import torch.distributed as dist

PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "storymem_dist.parallel.session",
    "storymem_dist.parallel.text",
    "storymem_dist.parallel.vae",
    "storymem_dist.cli.render",
    "storymem_dist.render.job",
)
GRACE_SECONDS = 3.0


class RankFailed(AssertionError):
    """A rank raised, died or hung. ``rank`` is the first one seen; the message carries its trace."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    args: Sequence[object] = (),
    *,
    ranks_per_node: int | None = None,
    env: dict[str, str] | None = None,
    timeout_seconds: float = 100.0,
) -> list[Any]:
    """Return ``[fn(*args) on rank 0, on rank 1, ...]``.

    ``ranks_per_node`` sets ``LOCAL_WORLD_SIZE`` (default: all on one node); ``env`` adds environment variables.
    Raises ``RankFailed``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    store = dist.TCPStore("127.0.0.1", 0, world_size=world_size, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = []
        for rank in range(world_size):
            local_size = ranks_per_node or world_size
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank % local_size),
                "LOCAL_WORLD_SIZE": str(local_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
                **(env or {}),
            }
            job = (fn, tuple(args), variables, Path(folder), rank)
            processes.append(context.Process(target=_run_rank, args=job, name=f"rank-{rank}", daemon=True))
        try:
            for process in processes:
                process.start()
            _wait(processes, deadline=time.monotonic() + timeout_seconds)
            return _collect(processes, Path(folder), timeout_seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


def _run_rank(fn: Callable[..., Any], args: tuple[object, ...], env: dict[str, str], folder: Path, rank: int) -> None:
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    hang_report = (folder / f"{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR2, file=hang_report)
    try:
        outcome = ("value", fn(*args))
        payload = pickle.dumps(outcome)
    except BaseException:
        payload = pickle.dumps(("error", traceback.format_exc()))
    temporary = folder / f"{rank}.tmp"
    temporary.write_bytes(payload)
    temporary.rename(folder / f"{rank}.pickle")
    failed = pickle.loads(payload)[0] == "error"
    if failed:
        os._exit(1)  # peers in a collective must notice; nothing is left to clean up
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait(processes: list[Any], deadline: float) -> None:
    """Until all have ended, one has failed (the others get a moment), or the deadline has passed."""
    alive = list(processes)
    while alive and time.monotonic() < deadline:
        wait_for_any([p.sentinel for p in alive], timeout=max(0.0, deadline - time.monotonic()))
        alive = [p for p in alive if p.is_alive()]
        if any(p.exitcode for p in processes if not p.is_alive()):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _collect(processes: list[Any], folder: Path, timeout: float) -> list[Any]:
    values, errors = [], []
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        os.kill(process.pid, signal.SIGUSR2)  # writes its stack
    time.sleep(0.5 if hanging else 0.0)
    for rank, process in enumerate(processes):
        report = folder / f"{rank}.pickle"
        if report.exists():
            kind, content = pickle.loads(report.read_bytes())
            if kind == "value":
                values.append(content)
                continue
            errors.append((report.stat().st_mtime_ns, rank, content))
        elif process.is_alive():
            stack = (folder / f"{rank}.stack").read_text() if (folder / f"{rank}.stack").exists() else ""
            errors.append((2**63, rank, f"still running after {timeout:g} s (or after a peer failed)\n{stack}"))
        else:
            errors.append((2**62, rank, f"died with exit code {process.exitcode}"))
    if errors:
        errors.sort()
        others = "".join(f"\nrank {rank} too: {text.strip().splitlines()[-1]}" for _, rank, text in errors[1:])
        _, rank, text = errors[0]
        raise RankFailed(f"rank {rank} failed:\n{text}{others}", rank)
    return values
