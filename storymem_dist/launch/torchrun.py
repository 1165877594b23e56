"""Starts one rank per GPU of this node through torch's elastic launch API, and restarts them when one dies.

The launcher checks a job before it starts any rank, so that one process reports an error once. It turns signals into a
stop file: ranks look for it between two denoising steps and can finish their step (torchrun itself kills them 30
seconds after a signal). Knows nothing of what the ranks do.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from storymem_dist.config.launch import LaunchSettings
from storymem_dist.config.points import Point, points_to_plain
from storymem_dist.dispatch.stop import signals_that_stop
from storymem_dist.errors import ConfigError, LayoutError, MachineError, StoryMemError
from storymem_dist.hardware import machine_fault
from storymem_dist.launch.environment import set_rank_environment
from storymem_dist.launch.group_folder import GroupFolder, RankError
from storymem_dist.launch.numa import numa_options
from storymem_dist.parallel.layout import axes_that_fit, check_heads, plan_layout
from storymem_dist.parallel.session import choose_backend, choose_device
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.check import check_job

_ELASTIC_LOGGER = "torch.distributed.elastic"
_RENDEZVOUS_PORT = 29400  # torchrun's own default
_NOTE_SECONDS = 0.5  # for a rank to note at its leases that it was asked to stop
_CRASH_EXIT_CODE = 1  # ranks died after the last restart, or nodes did not meet


def render_with_torchrun(points: Sequence[Point], *, sweep: str | None = None) -> int:
    """Render ``points`` as one job on the ranks of this node; return its exit code.

    Raises ``StoryMemError`` for errors found before the ranks start, for the error that a rank reported, and for faults
    of the machine.
    """
    settings = points[0].settings
    num_processes = check_start(points)
    with _machine_faults(), GroupFolder.of_this_process() as folder:
        folder.write_job(points_to_plain(points, sweep))
        set_rank_environment(num_processes=num_processes, stop_file=folder.stop_file)
        with _signals_become_a_file(folder), _agent_silent_after_error(folder):
            _run(settings.launch, settings.parallel, num_processes, folder)
        if error := folder.error():
            raise error
        return folder.exit_code()


@contextmanager
def _machine_faults() -> Iterator[None]:
    """Raise ``MachineError`` for a temporary folder that is missing, full or cannot be written."""
    try:
        yield
    except (OSError, StoryMemError) as error:
        if fault := machine_fault(error, while_writing=isinstance(error, OSError)):
            raise fault from error
        raise


def check_start(points: Sequence[Point]) -> int:
    """Check a job, its layout, devices and port; return the number of ranks to start. Raises ``StoryMemError``."""
    settings = points[0].settings
    launch, parallel = settings.launch, settings.parallel
    if "RANK" in os.environ:
        raise ConfigError(
            "launch=torchrun, but this process is already one of the ranks that torchrun or accelerate started "
            "(RANK is set); use launch=inline there, or start storymem-render directly"
        )
    num_gpus = torch.cuda.device_count()
    num_processes = launch.processes_per_node or max(1, num_gpus)
    num_nodes = launch.num_nodes if parallel.across_nodes else 1
    if not parallel.free:
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
    _numa_options(launch, parallel)  # raises where the setting cannot be followed
    port = chosen_port(launch, parallel)
    if port is not None and launch.node_rank == 0:
        _check_port(port)
    num_heads = check_job(points).weights.any_checkpoint.dit_config.num_heads
    check_heads(parallel, num_heads)
    axes_that_fit(parallel, world_size=num_processes * num_nodes, ranks_per_node=num_processes, num_heads=num_heads)
    return num_processes


def _numa_options(launch: LaunchSettings, parallel: ParallelSettings) -> dict[str, Any]:
    on_gpus = parallel.device != "cpu" and torch.cuda.device_count() > 0
    return numa_options(launch.numa, on_gpus=on_gpus, accepted=[field.name for field in fields(LaunchConfig)])


def chosen_port(launch: LaunchSettings, parallel: ParallelSettings) -> int | None:
    """Return the port that the settings choose for the rendezvous of this node's group; None: any free one.

    With several nodes, ``launch.port`` is used only when they form one group (``parallel.across_nodes``).
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


def _run(launch: LaunchSettings, parallel: ParallelSettings, num_processes: int, folder: GroupFolder) -> None:
    """Run the ranks until they have ended.

    Raises ``RankError`` when the nodes do not meet, and when a rank died after the last restart.
    """
    one_node = not (parallel.across_nodes and launch.num_nodes > 1)
    port = chosen_port(launch, parallel)
    config = LaunchConfig(
        min_nodes=1 if one_node else launch.num_nodes,
        max_nodes=1 if one_node else launch.num_nodes,
        nproc_per_node=num_processes,
        run_id=os.environ["STORYMEM_JOB_ID"] if not one_node else folder.root.name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port or 0}" if one_node else f"{launch.head}:{port or _RENDEZVOUS_PORT}",
        rdzv_configs={"is_host": one_node or launch.node_rank == 0, "timeout": launch.meet_seconds},
        local_addr="localhost" if one_node else None,
        max_restarts=launch.max_restarts,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder.root / "logs")),
        **_numa_options(launch, parallel),
        signals_to_handle="SIGQUIT",  # the others are ours, see _signals_become_a_file
    )
    where = config.rdzv_endpoint
    try:
        elastic_launch(config, sys.executable)("-m", "storymem_dist.launch.rank", str(folder.root))
    except RendezvousError as error:
        raise RankError(  # also when the first node of a replica is lost: the same command may cure it
            f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}); check that node {launch.head} is up and "
            f"the port free and open: the {launch.num_nodes} nodes meet at launch.head and launch.port, within "
            f"{launch.meet_seconds} s (launch.meet_seconds)",
            _CRASH_EXIT_CODE,
        ) from error
    except ChildFailedError as error:
        if folder.error() is not None:
            return
        rank, failure = error.get_first_failure()
        if failure.exitcode == MachineError.exit_code:
            raise MachineError(
                f"rank {rank} met a fault of the machine and cannot write it into {folder.root}; its message is above"
            ) from None
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        raise RankError(
            f"rank {rank} ended with {how}, after {launch.max_restarts} restarts (launch.max_restarts); its last "
            "output is above. Finished shots are kept: the same command continues from there",
            _CRASH_EXIT_CODE,
        ) from None


@contextmanager
def _signals_become_a_file(folder: GroupFolder) -> Iterator[None]:
    """Turn signals into the group's stop file; a second SIGINT ends the ranks at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and folder.stop_file.exists():
            _end_children()
            raise KeyboardInterrupt
        folder.ask_to_stop(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in signals_that_stop()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_children() -> None:
    """End the ranks at once; SIGTERM first, so that they can note that this end was asked for."""
    for number, seconds in ((signal.SIGTERM, _NOTE_SECONDS), (signal.SIGKILL, 0.0)):
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, number)
        time.sleep(seconds)


def _children() -> list[int]:
    """Ids of the processes that this one started."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


@contextmanager
def _agent_silent_after_error(folder: GroupFolder) -> Iterator[None]:
    """Drop the log lines of torch's agent once a rank has reported the error that ended it."""

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
