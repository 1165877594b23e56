"""Starts one rank per GPU of this node through torch's elastic launch API, and starts them again when one dies.

The launcher finds out what is wrong with a job before it starts anything, so that a mistake is told once, by one
process. Signals become a file: ranks look for it between two denoising steps and have all the time that a step takes
(torchrun's own way kills them 30 seconds after a signal). Knows nothing of what the ranks do.
"""

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from storymem_dist.config.launch import LaunchSettings
from storymem_dist.config.points import Point, points_to_plain
from storymem_dist.dispatch.stop import STOP_FILES_VARIABLE
from storymem_dist.errors import ConfigError, LayoutError
from storymem_dist.launch.group_folder import GroupFolder, RankError
from storymem_dist.parallel.layout import check_heads, plan_layout
from storymem_dist.parallel.session import choose_backend, choose_device
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.check import check_job

_ELASTIC_LOGGER = "torch.distributed.elastic"
_JOIN_SECONDS = 300
_NO_RESTART_HELPED = 1
_MEETING_PORT = 29400  # torchrun's own default


def render_with_torchrun(points: Sequence[Point], *, sweep: str | None = None) -> int:
    """Render ``points`` as one job on the ranks of this node; return its exit code.

    Raises ``StoryMemError`` for what is wrong before the ranks start, and for what a rank could not go on with.
    """
    settings = points[0].settings
    num_processes = check_start(points)
    with tempfile.TemporaryDirectory(prefix="storymem-ranks-") as name:
        folder = GroupFolder(Path(name))
        folder.write_job(points_to_plain(points, sweep))
        _set_environment(folder, num_processes)
        with _signals_become_a_file(folder), _quiet_about(folder):
            _run(settings.launch, settings.parallel, num_processes, folder)
        if error := folder.error():
            raise error
        return folder.exit_code()


def check_start(points: Sequence[Point]) -> int:
    """Check the job, its layout, its devices and its port; return how many ranks this node is to start."""
    settings = points[0].settings
    launch, parallel = settings.launch, settings.parallel
    if "RANK" in os.environ:
        raise ConfigError(
            "launch=torchrun, but this process is already one of the ranks that torchrun or accelerate started "
            "(RANK is set); use launch=inline there, or start storymem-render by itself"
        )
    num_gpus = torch.cuda.device_count()
    num_processes = launch.processes_per_node or max(1, num_gpus)
    num_nodes = launch.num_nodes if parallel.across_nodes else 1
    plan_layout(parallel, world_size=num_processes * num_nodes, ranks_per_node=num_processes)
    if parallel.device == "cpu" or (parallel.device == "auto" and num_gpus == 0):
        choose_backend(parallel.backend, torch.device("cpu"))
    elif num_gpus == 0:
        choose_device(parallel.device, local_rank=0)
    elif num_processes > num_gpus:
        raise LayoutError(
            f"launch.processes_per_node={num_processes}, but this node has {num_gpus} GPUs; start at most that many "
            "ranks on it, or use parallel.device=cpu"
        )
    port = chosen_port(launch, parallel)
    if port is not None and launch.node_rank == 0:
        _check_port(port)
    checked = check_job(points)
    check_heads(parallel, checked.weights.any_checkpoint.dit_config.num_heads)
    return num_processes


def chosen_port(launch: LaunchSettings, parallel: ParallelSettings) -> int | None:
    """The port that somebody chose for this node's group; None: any free one.

    Among several nodes without a rendezvous it would be the port where they do not meet.
    """
    return launch.port if parallel.across_nodes or launch.num_nodes == 1 else None


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LayoutError(
                f"launch.port={port} cannot be used on this node ({error.strerror}); is another job using it? Choose "
                "another port, or on one node leave it out (null) to take a free one"
            ) from error


def _set_environment(folder: GroupFolder, num_processes: int) -> None:
    """Set what the ranks, and torch's agent in this process, read from the environment."""
    # Otherwise ranks of a restarted group meet the addresses of the dead one in the agent's store (pytorch #135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Token counts change from shot to shot, and with them the sizes of what is allocated.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("STORYMEM_JOB_ID", f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    others = [path for path in os.environ.get(STOP_FILES_VARIABLE, "").split(os.pathsep) if path]
    os.environ[STOP_FILES_VARIABLE] = os.pathsep.join([*others, str(folder.stop_file)])
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))


def _run(launch: LaunchSettings, parallel: ParallelSettings, num_processes: int, folder: GroupFolder) -> None:
    """Run the ranks until they have ended. Raises ``RankError`` when they died once too often."""
    one_node = not (parallel.across_nodes and launch.num_nodes > 1)
    port = chosen_port(launch, parallel)
    config = LaunchConfig(
        min_nodes=1 if one_node else launch.num_nodes,
        max_nodes=1 if one_node else launch.num_nodes,
        nproc_per_node=num_processes,
        run_id=os.environ["STORYMEM_JOB_ID"] if not one_node else folder.root.name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port or 0}" if one_node else f"{launch.head}:{port or _MEETING_PORT}",
        rdzv_configs={"is_host": one_node or launch.node_rank == 0, "timeout": _JOIN_SECONDS},
        local_addr="localhost" if one_node else None,
        max_restarts=launch.max_restarts,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder.root / "logs")),
        signals_to_handle="SIGQUIT",  # the others are ours, see _signals_become_a_file
    )
    where = config.rdzv_endpoint
    try:
        elastic_launch(config, sys.executable)("-m", "storymem_dist.launch.rank", str(folder.root))
    except RendezvousError as error:
        raise LayoutError(
            f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}); is node {launch.head} there, and is the "
            f"port free and open? launch.head and launch.port say where the {launch.num_nodes} nodes meet"
        ) from error
    except ChildFailedError as error:
        if folder.error() is not None:
            return
        rank, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        raise RankError(
            f"rank {rank} ended with {how}, after {launch.max_restarts} restarts (launch.max_restarts); its last words "
            "are above. What is finished is kept: the same command goes on from there",
            _NO_RESTART_HELPED,
        ) from None


@contextmanager
def _signals_become_a_file(folder: GroupFolder) -> Iterator[None]:
    """Turn signals into the group's stop file; a second SIGINT ends the ranks at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and folder.stop_file.exists():
            for child in _children():
                os.kill(child, signal.SIGKILL)
            raise KeyboardInterrupt
        folder.stop_file.touch()

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """Processes that this one started."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


@contextmanager
def _quiet_about(folder: GroupFolder) -> Iterator[None]:
    """Keep torch's agent from commenting on ranks that ended because of an error which they reported."""

    def unexplained(record: logging.LogRecord) -> bool:
        return folder.error() is None or not record.name.startswith(_ELASTIC_LOGGER)

    names = [name for name in logging.root.manager.loggerDict if name.startswith(_ELASTIC_LOGGER)]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(unexplained)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(unexplained)
