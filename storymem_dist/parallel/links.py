"""Measures how fast the ranks of an axis exchange tensors. For ``storymem-plan calibrate`` on several ranks."""

import time

import torch
import torch.distributed as dist

from storymem_dist.parallel.mesh import Axis

_SENT = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
_SMALL = 1024
_REPEATS = 5


def link_rate(axis: Axis, device: torch.device) -> float | None:
    """Bytes per second that each rank sends in an all-to-all over ``axis``, the same on all of them. Collective.

    The time of a small message is taken off. None for an axis of one rank.
    """
    if axis.group is None:
        return None
    sent = _SENT.get(device.type, _SENT["cpu"])
    seconds = max(_exchange(axis, device, sent) - _exchange(axis, device, _SMALL), 1e-6)
    slowest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=axis.group)
    return sent * (axis.size - 1) / axis.size / float(slowest)


def _exchange(axis: Axis, device: torch.device, num_bytes: int) -> float:
    """Seconds of the fastest of some exchanges of ``num_bytes`` bytes."""
    rows = torch.zeros(axis.size, -(-num_bytes // axis.size), dtype=torch.uint8, device=device)
    received, fastest = torch.empty_like(rows), float("inf")
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        dist.all_to_all_single(received, rows, group=axis.group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
