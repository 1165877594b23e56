"""One rank's view of its job: its numbers, device and mesh, and how its replica takes decisions.

``start_session`` is called once per process, under ``torchrun`` or ``accelerate launch`` (the environment describes
the ranks) or plain python (one rank, no process group). It refuses impossible layouts before anything is loaded.
Sessions know no models and are never kept in a global.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from storymem_dist.errors import ConfigError, ExtraNotInstalled, LayoutError
from storymem_dist.hardware import set_allocator_defaults
from storymem_dist.parallel.choice import Choice, Choose, gather_facts
from storymem_dist.parallel.clock import CollectiveClock
from storymem_dist.parallel.interfaces import set_gloo_interface
from storymem_dist.parallel.layout import Layout, axes_that_fit, check_heads, plan_layout
from storymem_dist.parallel.leader import LeaderDecides, all_or_none, decide_alone
from storymem_dist.parallel.mesh import ReplicaMesh, build_mesh, lone_mesh
from storymem_dist.parallel.settings import AUTO, ParallelSettings

T = TypeVar("T")
_SIGNS_OF_LIFE_PER_TIMEOUT = 6


@dataclass(frozen=True, kw_only=True)
class Team:
    """Ranks with a gloo group for decisions; the first rank is the leader. A team of one has no group."""

    size: int = 1
    rank: int = 0
    control: dist.ProcessGroup | None = None
    decide: Callable[[Callable[[], Any]], Any] = decide_alone


@dataclass(frozen=True, kw_only=True)
class Session:
    """One rank's view of the job, complete when built; close it (or use it as a context) when the job ends.

    ``backend`` is that of ``mesh``'s collectives, None when no process group was started. ``team`` are the ranks of
    this replica. ``readers`` are the ranks of this node that need the same part of the weights, which one of them may
    read for all; ``readers_group`` is their group for device tensors (``parallel.loading``). ``limits_its_end``: a
    process that hangs after an error is ended. ``choice``: what was chosen for the job, where ``start_session`` asked.
    """

    rank: int
    local_rank: int
    layout: Layout
    device: torch.device
    backend: str | None
    mesh: ReplicaMesh
    team: Team
    readers: Team
    readers_group: dist.ProcessGroup | None
    owns_default_group: bool
    limits_its_end: bool = True
    choice: Choice | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks that were started together."""
        return self.layout.world_size

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return self.layout.replica_of(self.rank)

    @property
    def rank_in_replica(self) -> int:
        """This rank's index in its replica."""
        return self.rank % self.layout.ranks_per_replica

    @property
    def is_leader(self) -> bool:
        """Whether this rank decides for its replica."""
        return self.rank_in_replica == 0

    @property
    def end_may_hang(self) -> bool:
        """Whether timers must end this process after an error: NCCL may wait for ranks that never come, even then."""
        return self.limits_its_end and self.backend == "nccl" and self.world_size > 1

    def leader_decides(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` on the leader of this replica; every rank of it gets the value, or raises the exception.

        Collective over the replica. The value must be picklable, its tensors on the CPU.
        """
        decided: T = self.team.decide(fn)
        return decided

    def all_or_none(self, fn: Callable[[], T]) -> T:
        """Run ``fn`` on every rank of this replica; if it raises on any of them, every rank raises.

        Collective over the replica. ``fn`` must not wait for other ranks.
        """
        return fn() if self.team.control is None else all_or_none(self.team.control, fn)

    def close(self, error: BaseException | None = None) -> None:
        """Destroy the process groups that this session started. Call it on every rank, last of all.

        After an ``error`` of this rank, groups of NCCL are left alone: to destroy them may wait for ranks that never
        come. A process can start the default group once only: torch's store keeps the addresses of the first one.
        """
        if not dist.is_initialized() or (error is not None and self.backend == "nccl"):
            return
        if self.owns_default_group:
            dist.destroy_process_group()
            return
        for group in dict.fromkeys([*self.mesh.groups, self.team.control, self.readers.control, self.readers_group]):
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


def start_session(
    settings: ParallelSettings,
    *,
    num_heads: int | None = None,
    choose: Choose | None = None,
    device: torch.device | None = None,
) -> Session:
    """Create this rank's session. Collective over all started ranks.

    The ranks are those of the environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``,
    ``MASTER_ADDR``, ``MASTER_PORT``: torchrun and accelerate set them), or this process alone. An existing default
    process group is used, and outlives ``close``. ``num_heads``: the model's attention heads, where known.
    ``choose`` decides the layout: the first rank calls it with what all ranks report, and every rank follows. It is
    needed where ``settings`` leave an axis or ``weights`` to the job ("auto"). With ``device``, this process is alone
    on it: neither the environment nor ``settings.device`` is asked, and nothing of the process is set.

    Raises ``LayoutError`` when the layout does not fit the ranks, or device and backend do not fit the machine,
    ``ConfigError`` where something is "auto" and there is no ``choose``, ``ExtraNotInstalled`` when ``weights=zero3``
    and DeepSpeed is not installed, and what ``choose`` raises.
    """
    is_guest = device is not None
    place = (
        _StartedRank(rank=0, world_size=1, local_rank=0, ranks_per_node=1) if is_guest else _place_from_environment()
    )
    _check_axes(settings, place, num_heads, may_be_free=choose is not None)
    device = device or choose_device(settings.device, local_rank=place.local_rank)
    if device.type == "cpu" and not is_guest:
        torch.set_num_threads(settings.cpu_threads)
    backend = choose_backend(settings.backend, device)
    collective_timeout = timedelta(seconds=settings.collective_timeout_seconds)
    owns_default_group = not dist.is_initialized()
    has_default_group = place.world_size > 1
    if has_default_group and owns_default_group:
        _start_default_group(place, backend, device, collective_timeout)
    choice = None
    if choose is not None:
        try:
            choice = _chosen(choose, place, device, timedelta(seconds=settings.leader_timeout_seconds))
        except BaseException:
            if has_default_group and owns_default_group:
                dist.destroy_process_group()
            raise
        settings = choice.parallel
    layout = plan_layout(settings, world_size=place.world_size, ranks_per_node=place.ranks_per_node)
    sharded = settings.weights != "replicated" and not settings.streams_blocks
    if not has_default_group and not sharded:
        return Session(
            rank=0,
            local_rank=place.local_rank,
            layout=layout,
            device=device,
            backend=None,
            mesh=lone_mesh(),
            team=Team(),
            readers=Team(),
            readers_group=None,
            owns_default_group=False,
            choice=choice,
        )
    if is_guest:
        raise ConfigError(
            f"parallel.weights={settings.weights} needs process groups, which are not started in another program's "
            "process; use replicated, or fsdp_offload, which streams the weights on one device"
        )
    if not has_default_group and owns_default_group:
        _start_default_group(place, backend, device, collective_timeout)
    replicas = [layout.ranks_of_replica(replica) for replica in range(layout.replica)]
    readers = layout.reading_teams(settings.weight_shards)
    leader_timeout = timedelta(seconds=settings.leader_timeout_seconds)
    clock = CollectiveClock() if device.type == "cpu" and settings.compile is not True else None
    return Session(
        rank=dist.get_rank(),
        local_rank=place.local_rank,
        layout=layout,
        device=device,
        backend=backend,
        mesh=build_mesh(layout, device, clock, collective_timeout, sharded=sharded, shard_over=settings.shard_over),
        team=_join_team(replicas, leader_timeout),
        readers=_join_team(readers, leader_timeout),
        readers_group=_join_group(readers, collective_timeout),
        owns_default_group=owns_default_group,
        limits_its_end=settings.stall_timeout_seconds is not None,
        choice=choice,
    )


def _check_axes(settings: ParallelSettings, place: "_StartedRank", num_heads: int | None, *, may_be_free: bool) -> None:
    """Raise unless the started ranks can form the axes, or some choice of those that are free."""
    if not may_be_free and settings.weights == AUTO:
        raise ConfigError("parallel.weights=auto is decided by a render job when its ranks have started")
    if may_be_free and settings.free and num_heads is not None:
        axes_that_fit(settings, world_size=place.world_size, ranks_per_node=place.ranks_per_node, num_heads=num_heads)
    elif not may_be_free or not settings.free:
        plan_layout(settings, world_size=place.world_size, ranks_per_node=place.ranks_per_node)
    if num_heads is not None:
        check_heads(settings, num_heads)
    if settings.weights == "zero3":
        _require_deepspeed()


def _chosen(choose: Choose, place: "_StartedRank", device: torch.device, timeout: timedelta) -> Choice:
    """What the first rank chooses, on all ranks. Collective over them."""
    team = _join_team([list(range(place.world_size))], timeout)
    try:
        ranks = gather_facts(device, ranks_per_node=place.ranks_per_node, control=team.control)
        choice: Choice = team.decide(lambda: choose(ranks))
        return choice
    finally:
        if team.control is not None and team.control is not dist.group.WORLD:
            dist.destroy_process_group(team.control)


def choose_device(choice: str, *, local_rank: int) -> torch.device:
    """Turn ``auto | cpu | cuda`` into this rank's device (one GPU per rank of a node). Raises ``LayoutError``.

    A rank that sees a single GPU uses it: ``srun --gpus-per-task=1`` shows every rank its own one only.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if not torch.cuda.is_available():
        raise LayoutError("parallel.device=cuda, but torch sees no GPU here; use parallel.device=cpu or auto")
    if local_rank >= num_gpus == 1 and _each_rank_sees_its_own_gpu():
        local_rank = 0
    if local_rank >= num_gpus:
        raise LayoutError(
            f"local rank {local_rank} has no GPU: this node has {num_gpus}; start at most {num_gpus} ranks on it, "
            "or use parallel.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    set_allocator_defaults()
    torch.cuda.set_device(device)
    return device


def _each_rank_sees_its_own_gpu() -> bool:
    """Whether this rank's view of the GPUs is its own; torchrun's ranks all see those of their node."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "TORCHELASTIC_RUN_ID" not in os.environ or len([name for name in named.split(",") if name]) == 1


def choose_backend(choice: str, device: torch.device) -> str:
    """Turn ``auto | gloo | nccl`` into the backend of the collectives. Raises ``LayoutError``."""
    if choice == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if choice == "nccl" and device.type != "cuda":
        found = "torch sees no GPU here" if not torch.cuda.is_available() else "parallel.device=cpu"
        raise LayoutError(f"parallel.backend=nccl needs GPUs, but {found}; use parallel.backend=gloo or auto")
    if choice == "nccl" and not dist.is_nccl_available():
        raise LayoutError("parallel.backend=nccl, but this build of torch has no NCCL; use parallel.backend=gloo")
    return choice


@dataclass(frozen=True, kw_only=True)
class _StartedRank:
    """Which rank this process is, according to its launcher."""

    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int


def _place_from_environment() -> _StartedRank:
    if dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        world_size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    else:
        return _StartedRank(rank=0, world_size=1, local_rank=0, ranks_per_node=1)
    return _StartedRank(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", rank),
        ranks_per_node=_number("LOCAL_WORLD_SIZE", world_size),
    )


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise LayoutError(f"the environment has {variable}={text!r}; torchrun and accelerate set a whole number")
    return int(text)


def _require_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ExtraNotInstalled(
            "parallel.weights=zero3 needs DeepSpeed, which is not installed: pip install 'storymem_dist[deepspeed]' "
            "(or use parallel.weights=fsdp_offload, which needs no extra package)"
        )


def _start_default_group(place: _StartedRank, backend: str, device: torch.device, timeout: timedelta) -> None:
    on_gpu = device if backend == "nccl" else None
    if place.world_size == 1:
        alone = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from torch's stubs
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout, device_id=on_gpu)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise LayoutError(
            f"{place.world_size} ranks were started, but {' and '.join(missing)} is not set; start them with torchrun "
            "or accelerate launch"
        )
    if place.world_size > place.ranks_per_node:
        set_gloo_interface(os.environ["MASTER_ADDR"])
    try:
        dist.init_process_group(backend, init_method="env://", timeout=timeout, device_id=on_gpu)
    except dist.DistBackendError as error:
        if "duplicate gpu" not in str(error).lower():
            raise
        raise LayoutError(
            f"rank {place.rank} (local rank {place.local_rank}) shares its GPU with another rank, and NCCL needs one "
            "for each; start at most one rank per GPU, or use parallel.backend=gloo"
        ) from None
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LayoutError(
            f"rank {place.rank} cannot join the other ranks at {address} ({str(error).splitlines()[0]}); if the port "
            "is taken by another job, choose a free one (torchrun --rdzv-endpoint=localhost:0, "
            "accelerate launch --main_process_port)"
        ) from error


def _join_team(teams: list[list[int]], timeout: timedelta) -> Team:
    """This rank's team in a partition of all ranks. Collective over all ranks."""
    control = _join_group(teams, timeout, backend="gloo")
    if control is None:
        return Team()
    keep_alive_seconds = timeout.total_seconds() / _SIGNS_OF_LIFE_PER_TIMEOUT
    decide = LeaderDecides(control, keep_alive_seconds=keep_alive_seconds)
    return Team(size=control.size(), rank=control.rank(), control=control, decide=decide)


def _join_group(teams: list[list[int]], timeout: timedelta, *, backend: str | None = None) -> dist.ProcessGroup | None:
    """The process group of this rank's team, None for a team of one. Collective over all ranks."""
    if max(map(len, teams)) == 1:
        return None
    mine, _ = dist.new_subgroups_by_enumeration(teams, timeout=timeout, backend=backend)
    return mine if mine.size() > 1 else None
