"""Shots that several replicas render together: what one rank needs to take part in a team (``dispatch.tail``).

The team has the experts, the VAE and the prompts of its ranks, over other process groups. Everything that is kept from
one shot to the next and decides which collectives follow (encoded latents, prompts) is kept apart for teams, because
the replicas of a team have rendered different shots before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from storymem_dist.config.points import Point
from storymem_dist.config.schema import RenderConfig
from storymem_dist.diffusion.conditioning import ConditionBuilder
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.dispatch.gathering import Gathering, Merge
from storymem_dist.dispatch.merging import SLACK, team_sizes
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import RenderedShot, ShotHistory, ShotJob, ShotRenderer
from storymem_dist.dispatch.shot_settings import shot_sampler
from storymem_dist.dispatch.tail import TeamRules
from storymem_dist.errors import LayoutError
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.layout import check_guidance
from storymem_dist.parallel.merging import Teams, holds_whole_weights, open_teams, replicas_per_node, spread_over
from storymem_dist.parallel.progress import ProgressBoard
from storymem_dist.parallel.session import Session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.calibration import load_constants
from storymem_dist.planner.hardware import hardware_here
from storymem_dist.planner.teams import team_speedups
from storymem_dist.planner.timing import TimeModel
from storymem_dist.render.build import Engine
from storymem_dist.render.check import CheckedJob
from storymem_dist.render.clip import ClipSampler
from storymem_dist.render.crew import Crew
from storymem_dist.render.prompts import CachedPrompts
from storymem_dist.render.shot import Scorers, ShotRules, StoryShotRenderer
from storymem_dist.story.modes import M2V, T2V


class Peers(Protocol):
    """What is needed of ``parallel.watch.Watch``."""

    def among(self, ranks: Sequence[int], crew: str) -> AbstractContextManager[None]:
        """While the body runs, ``ranks`` are in lock step."""
        ...


@contextmanager
def opened_teams(
    points: Sequence[Point],
    checked: CheckedJob,
    session: Session,
    parallel: ParallelSettings,
    warn: Callable[[str], None],
    board: ProgressBoard,
) -> Iterator[Teams | None]:
    """Keep the teams of replicas that ``dispatch.elastic_tail`` asks for open while the body runs.

    None where there can be none: ``warn`` then receives the reason on the first rank. Collective over all ranks of the
    job. After an error the groups are left alone: to close them may wait for ranks that never come. ``board`` notes
    what this rank does in shots that another replica reports.
    """
    teams = _open(points, checked, session, parallel, warn if session.rank == 0 else lambda message: None, board)
    yield teams
    if teams is not None:
        teams.close()


def _open(
    points: Sequence[Point],
    checked: CheckedJob,
    session: Session,
    parallel: ParallelSettings,
    warn: Callable[[str], None],
    board: ProgressBoard,
) -> Teams | None:
    choice = points[0].settings.dispatch.elastic_tail
    if choice == "off" or session.layout.replica == 1:
        return None
    if not holds_whole_weights(parallel):
        warn(
            f"dispatch.elastic_tail={choice} has no effect: with parallel.weights={parallel.weights} a rank holds a "
            "part of the experts only, and replicas could not render together without loading them again"
        )
        return None
    sizes = team_sizes(replicas_per_node(session.layout))
    if not sizes:
        warn(
            f"dispatch.elastic_tail={choice} has no effect: replicas of one node render together, in teams of 2, 4, 8 "
            f"and so on that divide their number, and a node has {replicas_per_node(session.layout)}"
        )
        return None
    return open_teams(
        session,
        parallel,
        sizes,
        num_heads=checked.weights.any_checkpoint.dit_config.num_heads,
        may_split_guidance=_may_split_guidance(points, checked, parallel),
        silent=board.silent(),
    )


def _may_split_guidance(points: Sequence[Point], checked: CheckedJob, parallel: ParallelSettings) -> bool:
    """Whether all shots have two guidance passes in each step."""
    both = replace(parallel, cfg=2)
    try:
        for point, batch in zip(points, checked.batches, strict=True):
            for shot in (shot for story in batch.stories for shot in story.shots):
                check_guidance(both, shot_sampler(shot, point.settings.sampler))
    except LayoutError:
        return False
    return True


def speedups_of(
    teams: Teams, settings: RenderConfig, checked: CheckedJob, session: Session, parallel: ParallelSettings
) -> dict[int, float]:
    """Return how much faster each size of team is than one replica: by the planner, or by its size (``always``)."""
    if settings.dispatch.elastic_tail == "always":
        return {size: float(size) for size in teams.sessions}
    model = checked.model
    if parallel.streams_blocks:  # on one rank; a wider layout of these settings would be sharded
        parallel, model = replace(parallel, weights="replicated"), replace(model, experts="stream")
    hardware = hardware_here(session.device, ranks_per_node=session.layout.ranks_per_node)
    kind = M2V if M2V in checked.weights.checkpoints else T2V
    return team_speedups(
        TimeModel(hardware=hardware, constants=load_constants(hardware)),
        {size: replace(team, weights=parallel.weights) for size, team in teams.settings.items()},
        parallel,
        model,
        checked.weights.checkpoints[kind].dit_config,
        settings.sampler,
        kind,
        settings.memory.max_keyframes if kind == M2V else 0,
    )


@dataclass(frozen=True, kw_only=True)
class MergedCrews:
    """Implements ``render.crew.Crews``. ``parts``, ``shot_rules`` and ``renderer`` are those of this rank's replica."""

    teams: Teams
    engine: Engine
    prompts: CachedPrompts
    scorers: Scorers
    parts: Sequence[BatchPart]
    shot_rules: Sequence[ShotRules]
    renderer: ShotRenderer
    peers: Peers
    speedups: Mapping[int, float]
    _conditions: dict[int, ConditionBuilder] = field(default_factory=dict)

    def rules(self) -> TeamRules:
        """See ``Crews.rules``."""
        session = self.engine.session
        per_node, planned = replicas_per_node(session.layout), session.choice.tail_slack if session.choice else None
        first = session.replica - session.replica % per_node
        return TeamRules(
            gathering=Gathering(self.teams.store, replica=session.replica, replicas=range(first, first + per_node)),
            replica=session.replica,
            replicas_per_node=per_node,
            speedups=self.speedups,
            slack=SLACK if planned is None else planned,
        )

    @contextmanager
    def crew(self, merge: Merge) -> Iterator[Crew]:
        """See ``Crews.crew``. Only the replica that leads sends events of the shot."""
        own = self.engine.session
        session = self.teams.led_by(merge.team.size, merge.leader, own.layout.ranks_per_replica)
        parts, rules = self.parts, self.shot_rules
        if merge.leader != own.replica:
            parts = [replace(part, observers=self.teams.silent) for part in parts]
            rules = [replace(rule, observer=self.teams.silent) for rule in rules]
        with ExitStack() as rewired:
            renderer = StoryShotRenderer(
                clips=self._clips(merge.team.size, session, rewired),
                prompts=self.prompts.among(session.team),
                scorers=self.scorers,
                rules=rules,
                leader_decides=session.leader_decides,
                measure=self.engine.measure,
                retries_in_place=False,
            )
            rewired.enter_context(self.engine.vae_over(session.mesh))
            in_lock_step = _CrewRenderer(renderer, self.renderer, session, self.peers, merge)
            yield Crew(parts=parts, renderer=in_lock_step, leader_decides=session.leader_decides)

    def _clips(self, size: int, session: Session, rewired: ExitStack) -> ClipSampler:
        """A sampler that borrows the experts of this replica's, spread over the team until ``rewired`` is closed."""
        engine = self.engine
        if size not in self._conditions:
            self._conditions[size] = ConditionBuilder(engine.vae, session.device)

        def borrow(kind: str) -> ExpertPair:
            experts = engine.clips.prepare(kind)
            for module in experts.modules.values():
                assert isinstance(module, WanDiT), "whole weights are not wrapped"
                rewired.enter_context(spread_over(module, session.mesh))
            return experts

        return ClipSampler(
            load_experts=borrow,
            guidance=make_guidance(session.mesh),
            vae=engine.vae,
            device=session.device,
            is_alone=False,
            read_loras=engine.loras.among(session.all_or_none),
            conditions=self._conditions[size],
        )


class _CrewRenderer:
    """The ``ShotRenderer`` of a crew: loads experts as each replica does, and watches all ranks while they render."""

    retries_in_place = False

    def __init__(
        self, shared: StoryShotRenderer, own: ShotRenderer, session: Session, peers: Peers, merge: Merge
    ) -> None:
        self._shared, self._own, self._session, self._peers, self._merge = shared, own, session, peers, merge

    def prepare(self, kind: str) -> None:
        """See ``ShotRenderer.prepare``: every replica of the crew loads the experts that it lacks."""
        self._session.all_or_none(lambda: self._own.prepare(kind))

    def render(self, job: ShotJob, history: ShotHistory, **options: Any) -> RenderedShot:
        """See ``ShotRenderer.render``."""
        replicas = self._merge.team.replicas
        crew = f"the team of replicas {replicas[0]} to {replicas[-1]} ({job.attempt_id})"
        session = self._session
        with self._peers.among(session.layout.ranks_of_replica(session.replica), crew):
            return self._shared.render(job, history, **options)
