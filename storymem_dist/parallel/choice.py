"""What a job decides once its ranks have started: the facts of the ranks, and the choice as plain values.

One rank chooses for all (``session.start_session`` asks it, ``render.choice`` answers). Knows no models and no plans.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from storymem_dist.hardware import free_device_memory_bytes, host_memory_bytes
from storymem_dist.parallel.settings import ParallelSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """One started rank: its host, and the bytes that it can still take of its device (None: a CPU) and of its host."""

    host: str
    free_bytes: int | None
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class StartedRanks:
    """All ranks of a job before they have a layout. ``device`` is that of the rank that chooses."""

    device: torch.device
    ranks_per_node: int
    facts: Sequence[RankFacts]

    @property
    def world_size(self) -> int:
        """Number of ranks that were started together."""
        return len(self.facts)

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return max(1, self.world_size // self.ranks_per_node)

    @property
    def free_bytes(self) -> int | None:
        """What every rank can take of its device: the least of all; None on CPUs."""
        free = [one.free_bytes for one in self.facts if one.free_bytes is not None]
        return min(free, default=None)

    @property
    def host_bytes(self) -> int:
        """Host memory of the node that has the least."""
        return min(one.host_bytes for one in self.facts)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen: ``parallel`` without "auto" in axes, ``weights`` and ``compile``; ``experts`` likewise.

    ``compile_reason`` and ``reasons`` say why, in words. ``memory_gib``: what a rank needs of its device by part, at
    the largest shot. Predictions, None where none was made: ``seconds_per_step`` and ``seconds_per_shot`` of an average
    shot, ``total_seconds`` of the job; ``tail_slack`` of ``dispatch.merging``. ``considered``: other layouts, a line
    each.
    """

    parallel: ParallelSettings
    experts: str
    is_planned: bool = False
    compile_reason: str = ""
    reasons: tuple[str, ...] = ()
    considered: tuple[str, ...] = ()
    memory_gib: tuple[tuple[str, float], ...] = ()
    seconds_per_step: float | None = None
    seconds_per_shot: float | None = None
    total_seconds: float | None = None
    tail_slack: float | None = None


Choose = Callable[[StartedRanks], Choice]
"""Called on one rank of the job. May raise: every rank then raises the same."""


def gather_facts(
    device: torch.device, *, ranks_per_node: int, control: dist.ProcessGroup | None = None
) -> StartedRanks:
    """Return what all ranks report of themselves. Collective over ``control``, a gloo group (None: this rank alone)."""
    mine = RankFacts(
        host=os.environ.get("STORYMEM_NODE") or socket.gethostname(),
        free_bytes=free_device_memory_bytes(device),
        host_bytes=host_memory_bytes(),
    )
    facts: list[RankFacts] = [mine]
    if control is not None:
        gathered: list[RankFacts | None] = [None] * control.size()
        dist.all_gather_object(gathered, mine, group=control)
        facts = [one for one in gathered if one is not None]
    return StartedRanks(device=device, ranks_per_node=ranks_per_node, facts=facts)
