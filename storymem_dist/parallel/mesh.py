"""The axes of one rank's replica, as process groups: ``replica x cfg x ring x ulysses``, plus two flattened ones.

``sequence`` = ring x ulysses (the ranks that share one forward's tokens) and ``shard`` = cfg x ring x ulysses (all
ranks of the replica: they share the VAE's work and, unless ``sequence`` alone does, the weights). A ``ReplicaMesh`` is
passed as an argument, never kept in a global. It knows neither models nor settings.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from storymem_dist.parallel.clock import CollectiveClock, timed
from storymem_dist.parallel.layout import AXES, Layout


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis as a rank sees it: its size, this rank's place on it, and the group of the ranks along it.

    ``group`` is None on an axis of size 1: no collective may be called. ``clock`` counts the time in collectives where
    that can be measured; put every collective on ``group`` inside ``timed(clock)``.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    clock: CollectiveClock | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over the axis, on every rank; may overwrite ``values``. Collective."""
        if self.group is not None:
            with timed(self.clock):
                dist.all_reduce(values, group=self.group)
        return values


@dataclass(frozen=True, kw_only=True)
class ReplicaMesh:
    """The axes inside one replica. ``shard_mesh`` is what FSDP2 shards over (None: no process group was started).

    All axes share ``clock``: the time this rank spends in collectives, None where it cannot be measured. ``groups`` are
    the process groups that were opened for the mesh on this rank, those of axes of size 1 included.
    """

    cfg: Axis
    ring: Axis
    ulysses: Axis
    sequence: Axis
    shard: Axis
    shard_mesh: DeviceMesh | None = None
    clock: CollectiveClock | None = None
    groups: tuple[dist.ProcessGroup, ...] = ()


def lone_mesh() -> ReplicaMesh:
    """The mesh of a single rank that started no process group. It calls no collectives, so its clock stays at 0."""
    return ReplicaMesh(
        cfg=Axis(name="cfg"),
        ring=Axis(name="ring"),
        ulysses=Axis(name="ulysses"),
        sequence=Axis(name="sequence"),
        shard=Axis(name="shard"),
        clock=CollectiveClock(),
    )


def build_mesh(
    layout: Layout,
    device: torch.device,
    clock: CollectiveClock | None = None,
    timeout: timedelta | None = None,
    *,
    sharded: bool = False,
    shard_over: str = "replica",
) -> ReplicaMesh:
    """Build the groups of every axis. Collective over the default process group, whose size is the layout's.

    ``device`` decides between CPU and CUDA ranks. All axes share ``clock``. ``timeout`` is that of their collectives
    (None: torch's default, not that of the default group). ``sharded``: weights travel between ranks while activations
    travel along the axes. Weights then have their own group even if an axis has the same ranks, because a group runs
    its collectives one after the other. ``shard_over`` "sequence": each guidance pass has its own copy of the weights,
    sharded over the ranks of that pass.
    """
    mesh = init_device_mesh(device.type, layout.shape, mesh_dim_names=AXES)
    sequence = mesh["ring", "ulysses"]._flatten("sequence")
    own_group = dist.get_backend() if sharded else None
    over_sequence = shard_over == "sequence"
    replica = mesh["cfg", "ring", "ulysses"]._flatten("shard", None if over_sequence else own_group)
    weights = mesh["ring", "ulysses"]._flatten("weights", own_group) if over_sequence else replica
    groups = dict.fromkeys([*mesh.get_all_groups(), *(part.get_group() for part in (sequence, replica, weights))])
    if timeout is not None:
        for group in groups:
            _set_pg_timeout(timeout, group)

    def axis(name: str, mesh: DeviceMesh) -> Axis:
        group = mesh.get_group() if mesh.size() > 1 else None
        return Axis(name=name, size=mesh.size(), rank=mesh.get_local_rank(), group=group, clock=clock)

    return ReplicaMesh(
        cfg=axis("cfg", mesh["cfg"]),
        ring=axis("ring", mesh["ring"]),
        ulysses=axis("ulysses", mesh["ulysses"]),
        sequence=axis("sequence", sequence),
        shard=axis("shard", replica),
        shard_mesh=weights,
        clock=clock,
        groups=tuple(groups),
    )
