"""Checks a job before anything starts: settings, storyboards, weights.

Knows nothing of ranks, run folders or devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from storymem_dist.config.points import Point
from storymem_dist.errors import StoryboardError
from storymem_dist.parallel.layout import check_guidance
from storymem_dist.render.inputs import choose_stories, kinds_of
from storymem_dist.story.loading import StoryBatch, load_storyboards
from storymem_dist.story.modes import KINDS
from storymem_dist.weights.bundle import Weights, open_weights, with_generated_weights
from storymem_dist.weights.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A job whose storyboards are read and whose weights are found, not loaded. ``batches`` has one for each point."""

    batches: Sequence[StoryBatch]
    model: ModelSettings
    weights: Weights


def check_job(points: Sequence[Point]) -> CheckedJob:
    """Check settings, storyboards and weights of a job without starting anything. Reads only headers of weights.

    A storyboard that cannot be read is listed in ``rejected`` of its batch. Raises ``StoryMemError`` for the first
    other error, and when no storyboard can be read.
    """
    batches = []
    for point in points:
        batch = choose_stories(load_storyboards(point.settings.stories.paths()), point.settings.stories)
        if not batch.stories:
            raise StoryboardError("no storyboard can be rendered: " + "; ".join(one.message for one in batch.rejected))
        sampler = point.settings.sampler
        check_guidance(
            point.settings.parallel,
            guidance_scale_high=sampler.guidance_scale_high,
            guidance_scale_low=sampler.guidance_scale_low,
        )
        batches.append(batch)
    settings = points[0].settings
    needed = {
        kind for point, batch in zip(points, batches, strict=True) for kind in kinds_of(batch.stories, point.settings)
    }
    model = with_generated_weights(settings.model)
    kinds = [kind for kind in KINDS if kind in needed]
    weights = open_weights(model, kinds, settings.sampler.continuation)
    return CheckedJob(batches=batches, model=model, weights=weights)
