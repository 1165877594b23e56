"""Checks a job before anything starts: settings, storyboards, weights, and the memory of one shot.

Knows nothing of ranks or run folders, and of devices only their memory.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from storymem_dist.config.points import Point
from storymem_dist.config.schema import RenderConfig
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.shot_check import check_shots
from storymem_dist.dispatch.shot_loras import OpenedLoras, check_loras
from storymem_dist.errors import LayoutError, StoryboardError
from storymem_dist.observe.wandb.process import check_settings
from storymem_dist.parallel.clip_memory import check_clip_memory
from storymem_dist.parallel.layout import axes_that_fit, check_guidance
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.inputs import choose_stories, kinds_of, most_tokens
from storymem_dist.render.scoring import OpenedScorers, open_scorers
from storymem_dist.story.loading import StoryBatch, load_storyboards
from storymem_dist.story.modes import KINDS
from storymem_dist.weights.bundle import Weights, open_weights, with_generated_weights
from storymem_dist.weights.prompt_lengths import check_prompt_lengths, cut_text_of
from storymem_dist.weights.prompt_words import check_prompt_words
from storymem_dist.weights.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A job whose storyboards are read and whose weights are found, not loaded. ``batches`` has one for each point.

    ``loras`` are those of single shots. ``num_tokens``: of a forward of the longest shot, with a full memory.
    ``scorers``: those of keyframes that have large weights.
    """

    batches: Sequence[StoryBatch]
    model: ModelSettings
    weights: Weights
    loras: OpenedLoras
    num_tokens: int
    scorers: OpenedScorers

    @property
    def scorer_bytes(self) -> int:
        """Weights of the scorers of keyframes."""
        return sum(files.num_bytes() for files in self.scorers.values())


def check_job(points: Sequence[Point]) -> CheckedJob:
    """Check settings, storyboards and weights of a job without starting anything. Reads only headers of weights.

    A storyboard that cannot be read, with a shot that cannot be rendered with its own settings, or whose prompts are
    too long for ``stories.long_prompts=refuse``, is listed in ``rejected`` of its batch. Raises ``StoryMemError`` for
    the first other error, and when no storyboard is left.
    """
    batches = []
    for point in points:
        check_settings(point.settings.tracking.wandb)
        batch = choose_stories(load_storyboards(point.settings.stories.paths()), point.settings.stories)
        _require_stories(batch)
        check_guidance(point.settings.parallel, point.settings.sampler)
        batches.append(batch)
    settings = points[0].settings
    needed = {
        kind for point, batch in zip(points, batches, strict=True) for kind in kinds_of(batch.stories, point.settings)
    }
    model = with_generated_weights(settings.model)
    kinds = [kind for kind in KINDS if kind in needed]
    weights = open_weights(model, kinds, settings.sampler.continuation)
    scorers = open_scorers([point.settings.memory for point in points])
    for point in points:
        _check_memory(point.settings, weights, point.settings.sampler)
    batches = [
        check_shots(
            batch, point.settings.sampler, point.settings.memory, partial(_check_sampler, point.settings, weights)
        )
        for point, batch in zip(points, batches, strict=True)
    ]
    loras = OpenedLoras(weights, getattr(torch, model.dtype))
    batches = [
        check_loras(batch, point.settings.sampler, point.settings.memory, loras)
        for point, batch in zip(points, batches, strict=True)
    ]
    for batch in batches:
        _require_stories(batch)
    cut_text = cut_text_of(weights.any_checkpoint)
    batches = [
        check_prompt_lengths(
            batch,
            cut_text,
            negative_prompt=point.settings.sampler.needed_negative_prompt,
            refuse=point.settings.stories.long_prompts == "refuse",
        )
        for point, batch in zip(points, batches, strict=True)
    ]
    for batch in batches:
        _require_stories(batch)
    batches = [check_prompt_words(batch, weights.any_checkpoint) for batch in batches]
    num_tokens = max(
        most_tokens(point.settings, batch.stories, weights) for point, batch in zip(points, batches, strict=True)
    )
    return CheckedJob(
        batches=batches, model=model, weights=weights, loras=loras, num_tokens=num_tokens, scorers=scorers
    )


def _check_sampler(settings: RenderConfig, weights: Weights, sampler: SamplerSettings) -> None:
    check_guidance(settings.parallel, sampler)
    _check_memory(settings, weights, sampler)


def _check_memory(settings: RenderConfig, weights: Weights, sampler: SamplerSettings) -> None:
    if settings.launch.mode == "slurm":  # the memory of this machine says nothing about a cluster's
        return
    on_gpu = settings.parallel.device != "cpu" and torch.cuda.is_available()
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    per_node = started or settings.launch.processes_per_node or (torch.cuda.device_count() if on_gpu else 1)
    check_clip_memory(
        sampler,
        _least_demanding(settings, per_node, weights),
        weights.any_checkpoint.dit_config,
        getattr(torch, settings.model.dtype),
        device=torch.device("cuda" if on_gpu else "cpu"),
        ranks_per_node=per_node,
    )


def _least_demanding(settings: RenderConfig, ranks_per_node: int, weights: Weights) -> ParallelSettings:
    """The layout that needs the least memory for a shot, of those that the settings leave to the job."""
    parallel, launch = settings.parallel, settings.launch
    if not parallel.free:
        return parallel
    num_nodes = launch.num_nodes if parallel.across_nodes else 1
    try:
        choices = axes_that_fit(
            parallel,
            world_size=int(os.environ.get("WORLD_SIZE", "0")) or ranks_per_node * num_nodes,
            ranks_per_node=ranks_per_node,
            num_heads=weights.any_checkpoint.dit_config.num_heads,
        )
    except LayoutError:  # the session refuses it; a dry run may plan it for another machine
        pinned = replace(parallel)
        for name in parallel.free:
            setattr(pinned, name, "replicated" if name == "weights" else 1)
        return pinned
    return max(choices, key=lambda one: (one.sequence, one.ranks_per_replica))


def _require_stories(batch: StoryBatch) -> None:
    if not batch.stories:
        raise StoryboardError("no storyboard can be rendered: " + "; ".join(one.message for one in batch.rejected))
