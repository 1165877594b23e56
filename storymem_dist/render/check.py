"""Checks a job before anything starts: settings, storyboards, weights, and the memory of one shot.

Knows nothing of ranks or run folders, and of devices only their memory.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from storymem_dist.artifacts.requests import QueueState, RequestLog
from storymem_dist.artifacts.run_folder import RunFolder
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
from storymem_dist.story.loading import RejectedStoryboard, StoryBatch, load_storyboards
from storymem_dist.story.modes import KINDS
from storymem_dist.story.schema import Story
from storymem_dist.weights.bundle import Weights, open_weights, with_generated_weights
from storymem_dist.weights.prompt_lengths import check_prompt_lengths, cut_text_of
from storymem_dist.weights.prompt_words import check_prompt_words
from storymem_dist.weights.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A job whose storyboards are read and whose weights are found, not loaded. ``batches`` has one for each point.

    ``requests_before``: for each point, the number of the last request to its queue that was made before the job began.
    ``loras`` are those of single shots. ``num_tokens``: of a forward of the longest shot, with a full memory.
    ``scorers``: those of keyframes that have large weights.
    """

    batches: Sequence[StoryBatch]
    requests_before: Sequence[int]
    model: ModelSettings
    weights: Weights
    loras: OpenedLoras
    num_tokens: int
    scorers: OpenedScorers

    @property
    def scorer_bytes(self) -> int:
        """Weights of the scorers of keyframes."""
        return sum(files.num_bytes() for files in self.scorers.values())


def check_job(points: Sequence[Point], *, job: str = "") -> CheckedJob:
    """Check settings, storyboards and weights of a job without starting anything. Reads only headers of weights.

    The stories are those of the settings and those that were added to the queues of the run folders before ``job``
    began. Without a name of the job, nothing is written.

    A storyboard that cannot be read, with a shot that cannot be rendered with its own settings, or whose prompts are
    too long for ``stories.long_prompts=refuse``, is listed in ``rejected`` of its batch. Raises ``StoryMemError`` for
    the first other error, and when no storyboard is left.
    """
    batches, requests_before = [], []
    for point in points:
        check_settings(point.settings.tracking.wandb)
        _check_textfile(point.settings)
        batch, before = _stories_of(point.settings, job)
        _require_stories(batch)
        check_guidance(point.settings.parallel, point.settings.sampler)
        batches.append(batch)
        requests_before.append(before)
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
    loras = OpenedLoras(weights, getattr(torch, model.dtype))
    batches = _check_batches(points, batches, weights, loras)
    for batch in batches:
        _require_stories(batch)
    num_tokens = max(
        most_tokens(point.settings, batch.stories, weights) for point, batch in zip(points, batches, strict=True)
    )
    return CheckedJob(
        batches=batches,
        requests_before=requests_before,
        model=model,
        weights=weights,
        loras=loras,
        num_tokens=num_tokens,
        scorers=scorers,
    )


def admission(point: Point, checked: CheckedJob) -> Callable[[Story], Story]:
    """Return what checks a story that is added to the queue while the job runs, and returns it as it is rendered.

    It raises ``StoryboardError`` for a story that cannot be rendered, or not by this job: one that needs experts that
    the job has not opened, or more memory than it was planned with.
    """
    weights, reserved = checked.weights, checked.loras.most_bytes()
    dtype = getattr(torch, checked.model.dtype)

    def admit(story: Story) -> Story:
        batch = _chosen(StoryBatch(stories=(story,), rejected=()), point.settings)
        missing = set(kinds_of(batch.stories, point.settings)) - set(weights.checkpoints)
        if missing:
            raise StoryboardError(
                f"it needs the {' and '.join(sorted(missing))} experts, which this job has not opened"
            )
        loras = OpenedLoras(weights, dtype)
        [batch] = _check_batches([point], [batch], weights, loras)
        _require_stories(batch)
        longer, needed = most_tokens(point.settings, batch.stories, weights) > checked.num_tokens, loras.most_bytes()
        if longer or needed.on_device > reserved.on_device or needed.on_host > reserved.on_host:
            what = "longer shots" if longer else "larger LoRAs"
            raise StoryboardError(f"it has {what} than those that this job was planned for; the next job renders it")
        return batch.stories[0]

    return admit


def _stories_of(settings: RenderConfig, job: str) -> tuple[StoryBatch, int]:
    """The stories of a point, and the number of the last request before the job began."""
    run, state = RunFolder(settings.output), QueueState()
    before = run.requests_before(job)
    for request in RequestLog(run.root).read_new() if before else ():
        if request.number <= before:
            state.apply(request)
    unusable = _unusable(state)
    if settings.stories.path is None and (state.added or unusable):
        batch = StoryBatch(stories=(), rejected=())
    else:
        batch = choose_stories(load_storyboards(settings.stories.paths()), settings.stories)
    taken = {story.story_id for story in batch.stories}
    added = _chosen(
        StoryBatch(stories=tuple(story for name, story in state.added.items() if name not in taken), rejected=()),
        settings,
    )
    rejected = tuple(one for one in unusable if one.source not in taken)
    return replace(batch, stories=(*batch.stories, *added.stories), rejected=(*batch.rejected, *rejected)), before


def _unusable(state: QueueState) -> list[RejectedStoryboard]:
    """The added stories that cannot be rendered any more: a picture is gone. Those that are skipped are not missed."""
    return [
        RejectedStoryboard(source=one.story_id, message=one.problem)
        for one in state.requests
        if one.action == "add" and one.problem and one.story_id not in {*state.added, *state.skipped}
    ]


def _chosen(added: StoryBatch, settings: RenderConfig) -> StoryBatch:
    """Stories that were added to the queue, as this job renders them: ``max_stories`` does not count them."""
    return choose_stories(added, replace(settings.stories, max_stories=None))


def _check_batches(
    points: Sequence[Point], batches: Sequence[StoryBatch], weights: Weights, loras: OpenedLoras
) -> list[StoryBatch]:
    """Check the stories of each point against its settings and the weights; reject those that cannot be rendered."""
    cut_text, checked = cut_text_of(weights.any_checkpoint), []
    for point, batch in zip(points, batches, strict=True):
        settings = point.settings
        batch = check_shots(batch, settings.sampler, settings.memory, partial(_check_sampler, settings, weights))
        batch = check_loras(batch, settings.sampler, settings.memory, loras)
        batch = check_prompt_lengths(
            batch,
            cut_text,
            negative_prompt=settings.sampler.needed_negative_prompt,
            refuse=settings.stories.long_prompts == "refuse",
        )
        checked.append(check_prompt_words(batch, weights.any_checkpoint))
    return checked


def _check_textfile(settings: RenderConfig) -> None:
    """Refuse a file for Prometheus that cannot be written, where ranks run on this machine and before they do."""
    textfile = settings.tracking.prometheus.textfile
    if textfile is not None and not settings.launch.submits and "RANK" not in os.environ:
        from storymem_dist.observe.prometheus import check_textfile  # others do without its library

        check_textfile(textfile)


def _check_sampler(settings: RenderConfig, weights: Weights, sampler: SamplerSettings) -> None:
    check_guidance(settings.parallel, sampler)
    _check_memory(settings, weights, sampler)


def _check_memory(settings: RenderConfig, weights: Weights, sampler: SamplerSettings) -> None:
    if settings.launch.submits:  # the memory of this machine says nothing about a cluster's
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
