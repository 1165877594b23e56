"""What is left of a job, for plans that are made before it begins: nothing is written, started or loaded.

A plan reads the run folders as the render does; what the job will decide there is assumed (seeds, forced renders).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.shot_names import shot_ids
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.config.points import Point
from storymem_dist.dispatch.plan import BatchPart, PlannedShot
from storymem_dist.planner.plan import PlanJob
from storymem_dist.render.check import CheckedJob
from storymem_dist.render.inputs import cost_model, most_tokens, pixel_inputs
from storymem_dist.render.loras import adapter_memory
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.modes import KINDS, M2V
from storymem_dist.weights.bundle import Weights
from storymem_dist.weights.sizes import text_encoder_sizes, vae_sizes

_NOT_DRAWN = 2**63
"""Replaces a seed that the render will draw. No drawn seed is that large, so no shot is found rendered with it."""


class UntouchedFolder(RunFolder):
    """A run folder as a plan reads it before the job has begun: what the job will decide there is not written."""

    def __init__(self, root: str | Path, *, rerender: Sequence[tuple[str, str]]) -> None:
        super().__init__(root)
        self._rerender = frozenset(rerender)

    def drawn_seed(self, name: str) -> int:
        """The seed that an earlier job drew, or one that no job draws."""
        seed = self.known_seed(name)
        return _NOT_DRAWN if seed is None else seed

    def rerender_generations(self) -> dict[tuple[str, str], int]:
        """Those of earlier jobs, and one more of the shots that this one renders again."""
        generations = super().rerender_generations()
        return generations | {shot: generations.get(shot, 0) + 1 for shot in self._rerender}


def untouched_part(point: Point, batch: StoryBatch, weights: Weights, rerender: Sequence[str]) -> BatchPart:
    """Return a point's part of the job for planning. Raises ``RunFolderError`` for an unknown name in ``rerender``."""
    known = [(story.story_id, {shot.shot_id: shot.name for shot in story.shots}) for story in batch.stories]
    settings = point.settings
    return BatchPart(
        run=UntouchedFolder(settings.output, rerender=shot_ids(rerender, known)),
        stories=batch.stories,
        sampler=settings.sampler,
        inputs={kind: pixel_inputs(kind, settings, weights) for kind in weights.checkpoints},
        video=VideoSettings(),
        cost=cost_model(settings, weights),
        memory=settings.memory,
    )


def plan_job(
    points: Sequence[Point],
    checked: CheckedJob,
    left: Sequence[Sequence[PlannedShot]],
    *,
    compiled_before: bool = False,
) -> PlanJob:
    """Return what the planner needs to know of a job whose shots in ``left`` are to be done.

    ``compiled_before``: the cache holds compiled code. Raises ``CheckpointError`` for a text encoder or a VAE that is
    something else.

    Clips that a storyboard gives are no work, and left out. Of several points, the one with the most tokens stands for
    the sizes and the memory.
    """
    weights, parallel = checked.weights, points[0].settings.parallel
    largest = max((point.settings for point in points), key=partial(most_tokens, stories=(), weights=weights))
    rendered = [[shot for shot in shots if shot.kind in KINDS] for shots in left]
    checkpoint = weights.checkpoints.get(M2V, weights.any_checkpoint)
    return PlanJob(
        stories=[shots for shots in rendered if shots],
        sampler=largest.sampler,
        model=checked.model,
        dit_config=checkpoint.dit_config,
        memory=largest.memory,
        dispatch=largest.dispatch,
        adapters=adapter_memory(checked.loras, compiled=parallel.may_compile),
        compiled_before=compiled_before,
        scorer_bytes=checked.scorer_bytes,
        text_encoder=text_encoder_sizes(checkpoint.text_encoder_path),
        vae=vae_sizes(checkpoint.vae_path),
    )
