"""Decides whether a layout fits the started ranks, before anything is loaded. Pure arithmetic.

Ranks are numbered by torchrun, node after node; the axes ``replica x cfg x ring x ulysses`` are laid over them with the
last axis fastest, so that ranks that communicate most are neighbours. Nothing here knows ``torch.distributed``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import LayoutError
from storymem_dist.parallel.settings import AUTO, ParallelSettings

AXES = ("replica", "cfg", "ring", "ulysses")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the mesh axes, outermost first, and how many ranks share a node. Built by ``plan_layout``."""

    replica: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    ranks_per_node: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Axis sizes in the order of ``AXES``."""
        return self.replica, self.cfg, self.ring, self.ulysses

    @property
    def sequence(self) -> int:
        """Number of ranks that share the tokens of one forward."""
        return self.ring * self.ulysses

    @property
    def ranks_per_replica(self) -> int:
        """Size of the ``shard`` axis."""
        return self.cfg * self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        """Number of ranks in the process group."""
        return self.replica * self.ranks_per_replica

    def node_of(self, rank: int) -> int:
        """Index of the node that runs ``rank``."""
        return rank // self.ranks_per_node

    def replica_of(self, rank: int) -> int:
        """Index of the replica that ``rank`` belongs to."""
        return rank // self.ranks_per_replica

    def ranks_of_replica(self, replica: int) -> list[int]:
        """Global ranks of one replica, its leader first."""
        return list(range(replica * self.ranks_per_replica, (replica + 1) * self.ranks_per_replica))

    def reading_teams(self, num_shards: int) -> list[list[int]]:
        """Partition the ranks into teams that sit on one node and hold the same part of the weights, reader first.

        The weights are cut into ``num_shards`` parts, which neighbouring ranks hold in turn; 1: every rank holds all.
        """
        teams: dict[tuple[int, int], list[int]] = {}
        for rank in range(self.world_size):
            teams.setdefault((self.node_of(rank), rank % num_shards), []).append(rank)
        return list(teams.values())

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.shape, strict=True))


def plan_layout(settings: ParallelSettings, *, world_size: int, ranks_per_node: int | None = None) -> Layout:
    """Fit the settings to ``world_size`` started ranks, ``ranks_per_node`` of them on each node (None: all).

    Raises ``LayoutError`` with the wrong number and one that would work, and ``ConfigError`` for axes that are "auto".
    """
    per_node = ranks_per_node or world_size
    cfg, ring, ulysses = settings.axes
    per_replica = settings.ranks_per_replica
    axes = f"parallel.cfg={cfg} x ring={ring} x ulysses={ulysses}"
    needs = f"{axes} needs {_counted(per_replica)} per replica"
    if world_size % per_node:
        raise LayoutError(
            f"{world_size} ranks were started with {per_node} on this node; every node must run the same number "
            f"(a divisor of {world_size}: {_listed(_divisors(world_size))})"
        )
    if settings.weights == "zero3" and world_size > 1:
        raise LayoutError(
            f"parallel.weights=zero3 runs one rank per process group, but the job has {_counted(world_size)}; start "
            "each replica as a job of its own (they join through the run folder), or use parallel.weights=fsdp_offload"
        )
    if world_size % per_replica:
        raise LayoutError(
            f"{needs}, but the job has {_counted(world_size)}; start a multiple of {per_replica} ranks, "
            f"or choose axes whose product is {_listed(_divisors(world_size), 'or')}"
        )
    num_replicas = world_size // per_replica
    if settings.num_replicas not in (None, num_replicas):
        wanted = per_replica * (settings.num_replicas or 1)
        raise LayoutError(
            f"parallel.num_replicas={settings.num_replicas} does not fit the {_counted(world_size)} of this job: "
            f"{needs}. Start {_counted(wanted)}, set parallel.num_replicas={num_replicas}, or leave it out (null) to "
            "use all ranks (parallel=replicas does)"
        )
    if world_size > per_node and not settings.across_nodes:
        raise LayoutError(
            f"{world_size} ranks were started over {world_size // per_node} nodes of {per_node}. "
            f"{_advice_over_nodes(needs, per_replica, per_node)}"
        )
    return Layout(replica=num_replicas, cfg=cfg, ring=ring, ulysses=ulysses, ranks_per_node=per_node)


def axes_that_fit(
    settings: ParallelSettings, *, world_size: int, ranks_per_node: int | None = None, num_heads: int
) -> list[ParallelSettings]:
    """Return ``settings`` once for each choice of its free axes that the started ranks can form, narrowest first.

    Where no axis is free, that is ``settings`` alone. Replicas over several nodes are formed only with
    ``across_nodes``. ``weights`` stays as it is.

    Raises ``LayoutError`` when no choice fits: it names what is pinned, and what would fit.
    """
    per_node = ranks_per_node or world_size
    names = [name for name in ("cfg", "ring", "ulysses") if name in settings.free]
    ones: dict[str, Any] = dict.fromkeys(names, 1)
    pinned = replace(settings, **ones)
    found, refused = [], None
    for axes in layouts_for(world_size, num_heads=num_heads):
        if any(getattr(axes, name) != 1 for name in names) and settings.weights == "zero3":
            continue
        one = replace(pinned, **{name: getattr(axes, name) for name in names})
        if one.axes != axes.axes:
            continue
        try:
            plan_layout(one, world_size=world_size, ranks_per_node=per_node)
        except LayoutError as error:
            refused = refused or error
        else:
            found.append(one)
    if found:
        return found
    if refused is not None:
        raise refused
    check_heads(pinned, num_heads)
    plan_layout(pinned, world_size=world_size, ranks_per_node=per_node)
    return [pinned]


def check_heads(settings: ParallelSettings, num_heads: int) -> None:
    """Raise ``LayoutError`` unless the ``ulysses`` axis divides the model's attention heads, or is free."""
    if settings.ulysses != AUTO and num_heads % int(settings.ulysses):
        raise LayoutError(
            f"parallel.ulysses={settings.ulysses} does not divide the model's {num_heads} attention heads; use "
            f"{_listed(_divisors(num_heads), 'or')}, and parallel.ring for the rest"
        )


def check_guidance(settings: ParallelSettings, sampler: SamplerSettings) -> None:
    """Raise ``LayoutError`` if the two guidance passes are to run in parallel but an expert or a step has only one.

    With a scale of 1 there is no unconditional pass: half of the ranks would idle, and their share of the sharded
    weights would never be gathered.
    """
    if settings.cfg != 2:
        return
    if sampler.guidance_interval:
        raise LayoutError(
            f"parallel.cfg=2 runs the conditional and the unconditional pass in parallel, but "
            f"sampler.guidance_interval={list(sampler.guidance_interval)} leaves the second one out of some steps, "
            "where half of the ranks would idle; set parallel.cfg=1 (and double parallel.ulysses or ring)"
        )
    for name in ("guidance_scale_high", "guidance_scale_low"):
        if getattr(sampler, name) == 1:
            raise LayoutError(
                f"parallel.cfg=2 runs the conditional and the unconditional pass in parallel, but "
                f"sampler.{name}=1 has no unconditional pass; set parallel.cfg=1 (and double parallel.ulysses or ring)"
            )


def layouts_for(world_size: int, *, num_heads: int) -> list[ParallelSettings]:
    """Return all choices of axes that ``world_size`` ranks on one node can form, smallest replicas first."""
    return [
        ParallelSettings(cfg=cfg, ring=ring, ulysses=per_replica // cfg // ring)
        for per_replica in _divisors(world_size)
        for cfg in (1, 2)
        if per_replica % cfg == 0
        for ring in _divisors(per_replica // cfg)
        if num_heads % (per_replica // cfg // ring) == 0
    ]


def _advice_over_nodes(needs: str, per_replica: int, per_node: int) -> str:
    if per_replica > per_node:
        return (
            f"{needs}, more than one node has: set parallel.across_nodes=true, or choose axes whose product is at most "
            f"{per_node}"
        )
    return (
        f"{needs}, which fits one node: start one torchrun group per node, each with {per_node} ranks, and let them "
        "join through the run folder (or set parallel.across_nodes=true)"
    )


def _counted(num_ranks: int) -> str:
    return "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: Iterable[int], last: str = "and") -> str:
    *head, tail = map(str, numbers)
    return f"{', '.join(head)} {last} {tail}" if head else tail
