"""From stories and settings to planned shots: mode, seed, inputs and fingerprint of each. Pure, but for one helper.

A shot is planned without knowing what has been rendered; comparing its fingerprint with the records of the run folder
tells whether it is still to do. Knows nothing of replicas, leases or models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from storymem_dist.artifacts.fingerprint import fingerprint, reference_image_digest
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.diffusion.seeds import shot_seed
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.errors import StoryboardError
from storymem_dist.events import NullObserver, Observer
from storymem_dist.story.modes import M2V, NO_CONTINUATION
from storymem_dist.story.schema import Shot, Story


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """Stories that are rendered with the same settings into one run folder.

    A job usually has one part; a joined sweep has one for each point. ``inputs`` maps a kind (``t2v``, ``m2v``) to
    everything JSON-able that changes the pixels of its shots beyond prompt, seed and mode: sizes, sampler, weights
    identities, memory rules, video encoding. ``config_hash`` and ``config_text`` are the resolved configuration without
    what cannot change pixels (paths, replicas). ``observers`` hear what happens to these stories. ``host`` goes into
    the records' ``host`` part: versions, device, layout.
    """

    run: RunFolder
    stories: Sequence[Story]
    sampler: SamplerSettings
    inputs: Mapping[str, Mapping[str, Any]]
    video: VideoSettings
    cost: CostModel
    config_hash: str = ""
    config_text: str = ""
    observers: Observer = field(default_factory=NullObserver)
    host: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShot:
    """One shot of one part: what it needs and the name of its result.

    ``cost`` is its estimated TFLOP. ``predecessor`` is the fingerprint of the shot before it in its chain.
    """

    part: int
    story: Story
    shot: Shot
    kind: str
    mode: str
    seed: int
    inputs: Mapping[str, Any]
    fingerprint: str
    predecessor: str | None
    cost: float


def shot_mode(story: Story, shot: Shot, sampler: SamplerSettings) -> tuple[str, str]:
    """Return kind and mode of a shot.

    The first shot is T2V, unless reference images (MR2V) or ``first_shot=m2v`` make it M2V. A cut is M2V; a shot that
    continues the one before it has the job's continuation mode, plain M2V when that is ``none``.
    """
    if shot.index == 0:
        kind = M2V if story.reference_images else sampler.first_shot
        return kind, kind
    if shot.cut or sampler.continuation == NO_CONTINUATION:
        return M2V, M2V
    return M2V, sampler.continuation


def plan_story(
    part: int, batch: BatchPart, story: Story, generations: Mapping[tuple[str, str], int]
) -> tuple[PlannedShot, ...]:
    """Plan all shots of a story whose seeds are drawn. ``generations``: how often a shot was forced to be re-rendered.

    Raises ``StoryboardError`` when a reference image cannot be read.
    """
    references = [reference_image_digest(path) for path in story.reference_images]
    planned: list[PlannedShot] = []
    for shot in story.shots:
        kind, mode = shot_mode(story, shot, batch.sampler)
        seed = shot_seed(batch.sampler.seed, shot, story, batch.sampler.seed_rule)
        inputs: dict[str, Any] = {"prompt": shot.prompt, "seed": seed, "mode": mode, **batch.inputs[kind]}
        if shot.index == 0 and references:
            inputs["reference_images"] = references
        if generation := generations.get((story.story_id, shot.shot_id), 0):
            inputs["forced_rerenders"] = generation
        predecessor = planned[-1].fingerprint if planned else None
        keyframes = batch.cost.expected_keyframes(kind, shot.index, len(references))
        planned.append(
            PlannedShot(
                part=part,
                story=story,
                shot=shot,
                kind=kind,
                mode=mode,
                seed=seed,
                inputs=inputs,
                fingerprint=fingerprint(inputs, predecessor),
                predecessor=predecessor,
                cost=batch.cost.shot_tflop(keyframes),
            )
        )
    return tuple(planned)


def plan_part(part: int, batch: BatchPart) -> Iterator[tuple[Story, tuple[PlannedShot, ...] | StoryboardError]]:
    """Plan all stories of a part, drawing negative seeds once per run folder.

    Yields each story with its planned shots, or with the error that keeps it from being planned. Reads the run folder
    (drawn seeds, forced re-renders) and the reference images.
    """
    generations = batch.run.rerender_generations()
    for story in batch.stories:
        base = batch.sampler.seed if story.seed is None else story.seed
        if base < 0:
            name = "all_stories" if story.seed is None else f"story_{story.story_id}"
            story = replace(story, seed=batch.run.drawn_seed(name))
        try:
            yield story, plan_story(part, batch, story, generations)
        except StoryboardError as error:
            yield story, error
