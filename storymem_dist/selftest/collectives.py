"""Checks each collective of a layout alone, with numbers whose result is known. Knows no models."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from storymem_dist.parallel.mesh import Axis
from storymem_dist.parallel.session import Session
from storymem_dist.selftest.reference import distance

MESSAGE_ELEMENTS = 2**18
"""fp32 numbers that a rank sends to another one in each of these collectives (1 MiB)."""


def collective_checks(session: Session) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield the collectives of this layout by name and axis; each returns its largest error (0 is right)."""
    mesh, device = session.mesh, session.device
    if mesh.ulysses.group is not None:
        yield "all_to_all over ulysses", lambda: _all_to_all_error(mesh.ulysses, device)
    if mesh.ring.group is not None:
        yield "send/receive over ring", lambda: _send_receive_error(mesh.ring, device)
    for axis in (mesh.sequence, mesh.cfg, mesh.shard):
        if axis.group is not None:
            yield f"all_gather over {axis.name}", partial(_all_gather_error, axis, device)
    if mesh.shard.group is not None:
        yield "all_to_all of neighbours over shard", partial(_neighbours_error, mesh.shard, device)
    if session.readers_group is not None:
        yield "broadcast over readers", lambda: _broadcast_error(session)
    if session.team.control is not None:
        yield "leader_decides over replica", lambda: _leader_error(session)


def _all_to_all_error(axis: Axis, device: torch.device) -> float:
    """Rank r sends r * size + s to rank s."""
    places = torch.arange(axis.size, device=device, dtype=torch.float32)[:, None].expand(-1, MESSAGE_ELEMENTS)
    sent = (axis.rank * axis.size + places).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return distance(received, places * axis.size + axis.rank)


def _neighbours_error(axis: Axis, device: torch.device) -> float:
    """Each rank sends its number to its two neighbours and nothing to the others, as the VAE does."""
    lengths = [MESSAGE_ELEMENTS if abs(place - axis.rank) == 1 else 0 for place in range(axis.size)]
    sent = torch.full((sum(lengths),), float(axis.rank), device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, lengths, lengths, group=axis.group)
    parts = zip(torch.split(received, lengths), range(axis.size), strict=True)
    return max(distance(part, torch.full_like(part, float(place))) for part, place in parts if part.numel())


def _send_receive_error(axis: Axis, device: torch.device) -> float:
    sent = torch.full((MESSAGE_ELEMENTS,), float(axis.rank), device=device)
    received = torch.empty_like(sent)
    following, previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    ops = [
        dist.P2POp(dist.isend, sent, group=axis.group, group_peer=following),
        dist.P2POp(dist.irecv, received, group=axis.group, group_peer=previous),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return distance(received, torch.full_like(received, float(previous)))


def _all_gather_error(axis: Axis, device: torch.device) -> float:
    sent = torch.full((MESSAGE_ELEMENTS,), float(axis.rank), device=device)
    received = [torch.empty_like(sent) for _ in range(axis.size)]
    dist.all_gather(received, sent, group=axis.group)
    return max(distance(part, torch.full_like(part, float(place))) for place, part in enumerate(received))


def _broadcast_error(session: Session) -> float:
    tensor = torch.full((MESSAGE_ELEMENTS,), float(session.readers.rank + 1), device=session.device)
    dist.broadcast(tensor, group=session.readers_group, group_src=0)
    return distance(tensor, torch.ones_like(tensor))


def _leader_error(session: Session) -> float:
    leader = session.leader_decides(lambda: session.rank)
    return float(abs(leader - session.layout.ranks_of_replica(session.replica)[0]))
