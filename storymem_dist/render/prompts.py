"""Provides prompt embeddings from the run folder's cache, and encodes ahead what the next shots need.

A job of 500 stories must not wait for 5,000 prompts before its first shot, and the text encoder (11 GB) must not be
loaded for every shot. So prompts are encoded in groups, in the order in which shots will probably be claimed:

* At the start, all ranks encode ``FIRST_PER_RANK`` prompts each: for a rank that takes about as long as loading the
  encoder.
* Later, a replica that claims a shot without an embedding encodes that prompt and its share of those that follow, each
  time ``GROWTH`` times as many, at most ``MOST_PER_RANK`` per rank. Replicas do not wait for each other, and their
  shares are disjoint. So 5,000 prompts need six loads on one GPU, four on eight.

Knows nothing of experts; ``make_room`` frees their memory where the encoder does not fit next to them.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from storymem_dist.artifacts.commit_log import CommitLog
from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.dispatch.choosing import likely_order
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_part
from storymem_dist.dispatch.scanning import lease_key
from storymem_dist.errors import StoryboardError
from storymem_dist.parallel.leader import LeaderDecides, decide_alone
from storymem_dist.parallel.session import Team
from storymem_dist.parallel.text import MIN_PROMPTS_PER_RANK, PATIENCE, Encoder, WorldRank, all_ranks, encode_prompts
from storymem_dist.render.clip import Stage, no_stage
from storymem_dist.story.modes import GIVEN

FIRST_PER_RANK = MIN_PROMPTS_PER_RANK
GROWTH = 4
MOST_PER_RANK = 512
_SIGNS_OF_LIFE_PER_TIMEOUT = 60


class CachedPrompts:
    """A ``PromptSource`` over the prompt cache of a run folder. All ranks of a replica call it in lock step.

    ``team`` are the ranks of this replica, number ``replica`` of ``num_replicas``. ``make_room`` is called on all of
    them before the encoder is loaded between two shots.
    """

    def __init__(
        self,
        cache: PromptCache,
        load_encoder: Callable[[], Encoder],
        *,
        team: Team | None = None,
        replica: int = 0,
        num_replicas: int = 1,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._cache = cache
        self._load_encoder = load_encoder
        self._team = team or Team()
        self._replica = replica
        self._num_replicas = num_replicas
        self._make_room = make_room
        self._order: Sequence[str] = ()
        self._group_size = FIRST_PER_RANK * self._team.size
        self._negative: frozenset[str] = frozenset()
        self._kept: dict[str, Tensor] = {}

    def begin(self, order: Callable[[], Sequence[str]], negative: Collection[str], world: WorldRank) -> None:
        """Encode what the first shots need. Collective over all ranks of the job.

        ``order`` returns the prompts of the job, each once, in the order in which they will probably be needed; the
        first rank calls it. ``negative``: prompts that every shot needs.
        """
        self._negative = frozenset(negative)
        with all_ranks(world.world_size) as group:
            decide: Callable[[Callable[[], Sequence[str]]], Sequence[str]] = decide_alone
            if group is not None:
                seconds = PATIENCE.total_seconds() / _SIGNS_OF_LIFE_PER_TIMEOUT
                decide = LeaderDecides(group, keep_alive_seconds=seconds)
            self._order = decide(order)
            first = [*negative, *self._order[: FIRST_PER_RANK * world.world_size]]
            encode_prompts(first, self._cache, self._load_encoder, place=world, group=group)

    def among(self, team: Team) -> "CachedPrompts":
        """Return the same prompts for the ranks of ``team``; what this rank alone has kept is read again."""
        prompts = copy.copy(self)
        prompts._team, prompts._kept = team, {}
        return prompts

    def embeds(self, prompt: str, stage: Stage = no_stage) -> Tensor:
        """See ``PromptSource.embeds``. Collective over the replica: only its leader reads the run folder."""
        if prompt in self._kept:
            return self._kept[prompt]
        embeds: Tensor | None = self._team.decide(partial(self._cache.find, prompt))
        if embeds is None:
            group: list[str] = self._team.decide(partial(self._next_group, prompt))
            with stage("text"):
                self._make_room()
                place = _Place(rank=self._team.rank, world_size=self._team.size)
                encode_prompts(group, self._cache, self._load_encoder, place=place, group=self._team.control)
            embeds = self._team.decide(partial(self._cache.find, prompt))
            assert embeds is not None, "an entry that was just written is there"
        if prompt in self._negative:
            self._kept[prompt] = embeds
        return embeds

    def _next_group(self, prompt: str) -> list[str]:
        """``prompt``, and those of this replica's share that follow it and have no entry. Leader only."""
        self._group_size = min(GROWTH * self._group_size, MOST_PER_RANK * self._team.size)
        group = [prompt]
        start = self._order.index(prompt) + 1 if prompt in self._order else 0
        for position in range(start, len(self._order)):
            if len(group) == self._group_size:
                break
            if position % self._num_replicas == self._replica and not self._cache.path(self._order[position]).exists():
                group.append(self._order[position])
        return group


def prompts_left(parts: Sequence[BatchPart], num_replicas: int) -> list[str]:
    """Return the prompts of all shots that are not committed, each once, in about the order of their claims.

    A shot's own negative prompt follows its prompt. Given clips need neither.
    """
    graph = ShotGraph(shots_left(parts))
    of_job = {part.sampler.needed_negative_prompt for part in parts}
    prompts: dict[str, None] = {}
    for shot in likely_order(graph, num_replicas):
        if shot.kind != GIVEN:
            prompts[shot.shot.prompt] = None
            own = shot.sampler.needed_negative_prompt
            if own is not None and own not in of_job:
                prompts[own] = None
    return list(prompts)


def shots_left(parts: Sequence[BatchPart]) -> list[list[PlannedShot]]:
    """Return, for each story that is not complete, its shots that are not committed, as far as was noted."""
    left: list[list[PlannedShot]] = []
    for part_index, part in enumerate(parts):
        noted = CommitLog(part.run.commits_folder).read_new()
        for story, planned in plan_part(part_index, part):
            if isinstance(planned, StoryboardError):
                continue
            has_begun = part.run.story_folder(story.story_id).exists()
            of_story = [
                shot
                for shot in planned
                if not has_begun
                or not (
                    lease_key(shot) in noted
                    or part.run.shot(shot.story_id, shot.shot_id).is_committed(shot.fingerprint)
                )
            ]
            if of_story:
                left.append(of_story)
    return left


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The ``WorldRank`` of the ranks of a replica."""

    rank: int
    world_size: int
