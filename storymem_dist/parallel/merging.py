"""Teams of replicas that render a shot together: their process groups, and a transformer's tokens spread over them.

All groups are opened once, when a job begins (``open_teams``), for aligned runs of neighbouring replicas of one node. A
team needs no weights of its own: each rank holds whole experts, and ``spread_over`` rewires them for a while. Knows
ranks and layouts; not who is idle, nor what is rendered.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from storymem_dist.diffusion.step_cache import step_cache_of
from storymem_dist.events import Observer
from storymem_dist.models.compile import uncompiled
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.job_store import JobStore
from storymem_dist.parallel.layout import AXES, Layout
from storymem_dist.parallel.leader import LeaderDecides
from storymem_dist.parallel.mesh import Axis, ReplicaMesh
from storymem_dist.parallel.sequence import apply_sequence_parallel, token_split_of
from storymem_dist.parallel.session import Session, Team
from storymem_dist.parallel.settings import ParallelSettings

_SIGNS_OF_LIFE_PER_TIMEOUT = 6


def holds_whole_weights(parallel: ParallelSettings) -> bool:
    """Whether each rank holds whole experts (resident, swapped or streamed), as a team of replicas needs."""
    return parallel.weights != "zero3" and parallel.weight_shards == 1


def replicas_per_node(layout: Layout) -> int:
    """Return how many whole replicas a node holds; 0 where a replica spans nodes."""
    whole, rest = divmod(layout.ranks_per_node, layout.ranks_per_replica)
    return 0 if rest else whole


def merged_settings(
    parallel: ParallelSettings, size: int, *, num_heads: int, may_split_guidance: bool
) -> ParallelSettings:
    """Return the layout of a team of ``size`` replicas (a power of two) of layout ``parallel``.

    ``cfg`` doubles first, because its two passes exchange least, unless there is one pass only (not
    ``may_split_guidance``); then ``ulysses``, while it divides ``num_heads``; then ``ring``.
    """
    cfg, ring, ulysses = parallel.axes
    while size > 1:
        size //= 2
        if cfg == 1 and may_split_guidance:
            cfg = 2
        elif num_heads % (2 * ulysses) == 0:
            ulysses *= 2
        else:
            ring *= 2
    return replace(parallel, num_replicas=None, cfg=cfg, ring=ring, ulysses=ulysses)


@dataclass(frozen=True, kw_only=True)
class Teams:
    """The teams that this rank can be in: by number of replicas, each as a session of its own.

    ``leader_decides`` of such a session is not used: who leads a team differs (``led_by``). ``store`` is that of the
    job's ranks. ``silent`` observes shots that another replica reports.
    """

    sessions: Mapping[int, Session]
    settings: Mapping[int, ParallelSettings]
    store: JobStore
    silent: Observer
    _groups: Sequence[dist.ProcessGroup] = ()
    _leader_timeout_seconds: float = 600.0

    def led_by(self, size: int, replica: int, ranks_per_replica: int) -> Session:
        """Return the session of the team of ``size`` replicas, led by the first rank of ``replica``, one of them."""
        session = self.sessions[size]
        assert session.team.control is not None, "a team has several ranks"
        leader = replica % size * ranks_per_replica
        keep_alive = self._leader_timeout_seconds / _SIGNS_OF_LIFE_PER_TIMEOUT
        decide = LeaderDecides(session.team.control, keep_alive_seconds=keep_alive, leader=leader)
        return replace(session, team=replace(session.team, decide=decide))

    def close(self) -> None:
        """Destroy the groups, where the default group outlives the job. After an error, leave them alone instead."""
        for group in self._groups:
            dist.destroy_process_group(group)


def open_teams(
    session: Session,
    parallel: ParallelSettings,
    sizes: Sequence[int],
    *,
    num_heads: int,
    may_split_guidance: bool,
    silent: Observer,
) -> Teams:
    """Open the process groups of all teams of ``sizes`` replicas. Collective over all ranks of the job.

    ``sizes`` divide the replicas of a node. Groups of equal ranks are opened once.
    """
    assert dist.group.WORLD is not None, "several replicas of one job have a default group"
    groups = _Groups(timedelta(seconds=parallel.collective_timeout_seconds))
    controls = _Groups(timedelta(seconds=parallel.leader_timeout_seconds), backend="gloo")
    sessions, all_settings = {}, {}
    for size in sizes:
        settings = merged_settings(parallel, size, num_heads=num_heads, may_split_guidance=may_split_guidance)
        cfg, ring, ulysses = settings.axes
        layout = replace(session.layout, replica=session.layout.replica // size, cfg=cfg, ring=ring, ulysses=ulysses)
        mesh = _mesh(layout, session, groups)
        control, rank = controls.of(_runs_along(layout, AXES[1:]), session.rank)
        team = Team(size=layout.ranks_per_replica, rank=rank, control=control)
        sessions[size] = replace(session, layout=layout, mesh=mesh, team=team)
        all_settings[size] = settings
    return Teams(
        sessions=sessions,
        settings=all_settings,
        store=JobStore(),
        silent=silent,
        _groups=() if session.owns_default_group else (*groups.opened, *controls.opened),
        _leader_timeout_seconds=parallel.leader_timeout_seconds,
    )


@contextmanager
def spread_over(dit: WanDiT, mesh: ReplicaMesh) -> Iterator[None]:
    """Run the forwards of ``dit`` over the ranks of ``mesh`` while the body runs. Between two shots only.

    Whatever spreads it otherwise is back afterwards. Blocks whose tokens are spread differently run in eager mode:
    compiling them for a few shots takes longer than it saves.
    """
    split = token_split_of(dit)
    undo: list[Callable[[], object]] = []
    if split is None:
        undo.append(apply_sequence_parallel(dit, mesh))
    else:
        before = split.axes
        split.use((mesh.ring, mesh.ulysses, mesh.sequence))
        undo.append(lambda: split.use(before))
    if (cache := step_cache_of(dit)) is not None:
        sums_before = cache.sum_with(mesh.shard.sum)
        undo.append(lambda: cache.sum_with(sums_before))
    try:
        if split is None and mesh.sequence.size == 1:  # the guidance passes alone are spread
            yield
        else:
            with uncompiled(dit):
                yield
    finally:
        for step in undo:
            step()


class _Groups:
    """Process groups by the partition of all ranks that they belong to. All ranks ask for them in the same order."""

    def __init__(self, timeout: timedelta, *, backend: str | None = None) -> None:
        self._timeout = timeout
        self._backend = backend
        self._known: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    @property
    def opened(self) -> list[dist.ProcessGroup]:
        return list(self._known.values())

    def of(self, partition: list[list[int]], rank: int) -> tuple[dist.ProcessGroup | None, int]:
        """The group of this rank in ``partition`` (None where it is alone), and its place there."""
        key = tuple(tuple(ranks) for ranks in partition)
        mine = next(ranks for ranks in key if rank in ranks)
        if len(mine) == 1:
            return None, 0
        if key not in self._known:
            group, _ = dist.new_subgroups_by_enumeration(partition, timeout=self._timeout, backend=self._backend)
            self._known[key] = group
        return self._known[key], mine.index(rank)


def _mesh(layout: Layout, session: Session, groups: _Groups) -> ReplicaMesh:
    def axis(name: str, *along: str) -> Axis:
        runs = _runs_along(layout, along or (name,))
        group, rank = groups.of(runs, session.rank)
        return Axis(name=name, size=len(runs[0]), rank=rank, group=group, clock=session.mesh.clock)

    return ReplicaMesh(
        cfg=axis("cfg"),
        ring=axis("ring"),
        ulysses=axis("ulysses"),
        sequence=axis("sequence", "ring", "ulysses"),
        shard=axis("shard", *AXES[1:]),
        clock=session.mesh.clock,
    )


def _runs_along(layout: Layout, axes: Sequence[str]) -> list[list[int]]:
    """Partition all ranks into those that differ along ``axes`` only, in their order."""
    ranks = torch.arange(layout.world_size).reshape(layout.shape)
    along = [AXES.index(axis) for axis in axes]
    across = [dim for dim in range(len(AXES)) if dim not in along]
    size = 1
    for dim in along:
        size *= layout.shape[dim]
    runs: list[list[int]] = ranks.permute(*across, *along).reshape(-1, size).tolist()
    return runs
