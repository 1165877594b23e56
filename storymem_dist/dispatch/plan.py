"""Plans the shots of stories: mode, seed, inputs and fingerprint of each.

A plan does not depend on what has been rendered: a shot is done when the run folder has a record of its fingerprint.
Reads reference images; only ``plan_part`` reads the run folder. Knows nothing of replicas, leases or models.
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
from storymem_dist.dispatch.protocol import OfOneShot
from storymem_dist.errors import StoryboardError
from storymem_dist.events import NullObserver, Observer
from storymem_dist.story.images import pixel_rule
from storymem_dist.story.modes import M2V, NO_CONTINUATION
from storymem_dist.story.schema import Shot, Story


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """Stories that are rendered with the same settings into one run folder.

    A job usually has one part; a joined sweep has one for each point. ``inputs`` maps a kind (``t2v``, ``m2v``) to the
    JSON values that change the pixels of its shots, except prompt, seed and mode: sizes, sampler, weights identities,
    memory rules, video encoding. ``config_text`` is the resolved configuration; ``config_hash`` covers only what can
    change pixels (no paths, no replicas). ``observers`` receive the events of these stories. ``host`` goes into the
    records' ``host`` part: versions, device, layout. ``num_refused`` storyboards are no stories: they cannot be read.
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
    num_refused: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShot(OfOneShot):
    """One shot of one part: its inputs, and the fingerprint that names its result.

    ``part`` is the index of its part. ``cost`` is its estimated TFLOP. ``predecessor`` is the fingerprint of the shot
    before it in its story, None for the first.
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
    part_index: int, part: BatchPart, story: Story, generations: Mapping[tuple[str, str], int]
) -> tuple[PlannedShot, ...]:
    """Plan all shots of a story. Its seed must not be negative: ``plan_part`` draws one in that case.

    ``generations``: number of forced re-renders by (story id, shot id). Raises ``StoryboardError`` when a reference
    image cannot be read.
    """
    references = [reference_image_digest(path) + pixel_rule(path) for path in story.reference_images]
    planned: list[PlannedShot] = []
    for shot in story.shots:
        kind, mode = shot_mode(story, shot, part.sampler)
        seed = shot_seed(part.sampler.seed, shot, story, part.sampler.seed_rule)
        inputs: dict[str, Any] = {"prompt": shot.prompt, "seed": seed, "mode": mode, **part.inputs[kind]}
        if shot.index == 0 and references:
            inputs["reference_images"] = references
        if generation := generations.get((story.story_id, shot.shot_id), 0):
            inputs["forced_rerenders"] = generation
        predecessor = planned[-1].fingerprint if planned else None
        keyframes = part.cost.expected_keyframes(kind, shot.index, len(references))
        planned.append(
            PlannedShot(
                part=part_index,
                story=story,
                shot=shot,
                kind=kind,
                mode=mode,
                seed=seed,
                inputs=inputs,
                fingerprint=fingerprint(inputs, predecessor),
                predecessor=predecessor,
                cost=part.cost.shot_tflop(keyframes),
            )
        )
    return tuple(planned)


def plan_part(part_index: int, part: BatchPart) -> Iterator[tuple[Story, tuple[PlannedShot, ...] | StoryboardError]]:
    """Plan all stories of a part. A negative seed is drawn once per run folder.

    Yields each story with its planned shots, or with the error that prevents its plan. Reads the run folder (drawn
    seeds, forced re-renders) and the reference images.
    """
    generations = part.run.rerender_generations()
    for story in part.stories:
        base = part.sampler.seed if story.seed is None else story.seed
        if base < 0:
            name = "all_stories" if story.seed is None else f"story_{story.story_id}"
            story = replace(story, seed=part.run.drawn_seed(name))
        try:
            yield story, plan_story(part_index, part, story, generations)
        except StoryboardError as error:
            yield story, error
