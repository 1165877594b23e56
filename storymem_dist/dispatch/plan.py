"""Plans the shots of stories: mode, seed, inputs and fingerprint of each.

A plan does not depend on what has been rendered: a shot is done when the run folder has a record of its fingerprint.
Reads pictures, given clips and LoRAs for their digests; only ``plan_part`` reads the run folder. Knows nothing of
replicas, leases or models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.fingerprint import fingerprint, joint_fingerprint, reference_image_digest
from storymem_dist.artifacts.requests import Again, QueueState, RequestLog
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.diffusion.seeds import shot_seed
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.needs import Needs, story_needs, waits_for
from storymem_dist.dispatch.protocol import OfOneShot, ShotJob
from storymem_dist.dispatch.shot_settings import shot_cost, shot_inputs, shot_sampler
from storymem_dist.errors import StoryboardError
from storymem_dist.events import NullObserver, Observer
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.story.images import pixel_rule
from storymem_dist.story.modes import GIVEN
from storymem_dist.story.schema import Shot, Story
from storymem_dist.weights.lora import lora_key


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """Stories that are rendered with the same settings into one run folder.

    A job usually has one part; a joined sweep has one for each point. ``inputs`` maps a kind (``t2v``, ``m2v``) to the
    JSON values that change the pixels of its shots, except prompt, seed and mode: sizes, sampler, weights identities,
    memory rules, video encoding. ``memory`` says which shots a shot recalls. ``config_text`` is the resolved
    configuration; ``config_hash`` covers only what can change pixels (no paths, no replicas). ``observers`` receive the
    events of these stories. ``host`` goes into the records' ``host`` part: versions, device, layout. ``num_refused``
    storyboards are no stories: they cannot be read.

    ``requests_before``: number of the last request to the queue that was made before the job began; its stories are
    among ``stories``, if they can be rendered. None: when the batch opens, and they are added then. ``admit`` checks a
    story that is added later and returns it as the job renders it; it raises ``StoryboardError``.
    """

    run: RunFolder
    stories: Sequence[Story]
    sampler: SamplerSettings
    inputs: Mapping[str, Mapping[str, Any]]
    video: VideoSettings
    cost: CostModel
    memory: MemorySettings = field(default_factory=MemorySettings)
    config_hash: str = ""
    config_text: str = ""
    observers: Observer = field(default_factory=NullObserver)
    host: Mapping[str, Any] = field(default_factory=dict)
    num_refused: int = 0
    requests_before: int | None = None
    admit: Callable[[Story], Story] = lambda story: story


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShot(OfOneShot):
    """One shot of one part: its inputs, and the fingerprint that names its result.

    ``part`` is the index of its part. ``sampler`` has the shot's own settings over the job's. ``needs`` says what it
    uses of the shots before it, ``waits_for`` which of these it waits for (they wait for the others). ``predecessor``
    covers the fingerprints of all that it needs: it is that of the shot before it in a story whose shots remember all
    before them, else one of all; None where it needs nothing. ``cost`` is its estimated TFLOP.
    """

    part: int
    story: Story
    shot: Shot
    kind: str
    mode: str
    seed: int
    sampler: SamplerSettings
    needs: Needs
    waits_for: tuple[int, ...]
    inputs: Mapping[str, Any]
    fingerprint: str
    predecessor: str | None
    cost: float
    lora_key: str = ""

    def job(self, attempt_id: str, why: str) -> ShotJob:
        """Return the shot as a renderer gets it, for one attempt."""
        return ShotJob(
            part=self.part,
            story=self.story,
            shot=self.shot,
            kind=self.kind,
            mode=self.mode,
            seed=self.seed,
            sampler=self.sampler,
            needs=self.needs,
            fingerprint=self.fingerprint,
            attempt_id=attempt_id,
            why=why,
            lora_key=self.lora_key,
        )


def plan_story(
    part_index: int,
    part: BatchPart,
    story: Story,
    generations: Mapping[tuple[str, str], int],
    requests: QueueState | None = None,
) -> tuple[PlannedShot, ...]:
    """Plan all shots of a story. Its seed must not be negative: ``plan_part`` draws one in that case.

    ``generations``: number of forced re-renders by (story id, shot id), to which those in ``requests`` are added.
    Raises ``StoryboardError`` when a reference image cannot be read.
    """
    digest = cache(_image_digest)  # many shots may recall one image
    references = [digest(path) for path in story.reference_images]
    planned: list[PlannedShot] = []
    seen_by_others: list[str] = []  # fingerprints, by what others follow of a shot: not a render of it alone
    all_needs, num_given = story_needs(story, part.sampler, part.memory), 0
    shots = story.shots
    for shot, needs, waits in zip(shots, all_needs, waits_for(all_needs), strict=True):
        kind, mode = needs.kind, needs.mode
        given = shot.options.seed
        seed = shot_seed(part.sampler.seed, shot, story, part.sampler.seed_rule) if given is None else given
        sampler = shot_sampler(shot, part.sampler)
        inputs = shot_inputs(
            shot,
            kind=kind,
            mode=mode,
            seed=seed,
            sampler=sampler,
            job_sampler=part.sampler,
            job_inputs=part.inputs,
        )
        if shot.index == 0 and needs.references:
            inputs["reference_images"] = references
        if needs.keeps_first:
            inputs["keeps_first"] = True
        before = generations.get((story.story_id, shot.shot_id), 0)
        asked, for_others = (requests or QueueState()).again(story.story_id, shot.shot_id)
        predecessor = seen_by_others[-1] if planned else None
        if kind == GIVEN:
            predecessor = None
        elif not _is_chained(story, needs, waits, planned[-1].needs if planned else None, shot.index, num_given):
            inputs["recall"] = _recall_inputs(story, shots, needs, digest)
            needed = {*needs.memory, *([shot.index - 1] if needs.continues else [])}
            predecessor = joint_fingerprint([seen_by_others[index] for index in sorted(needed)])
        num_given += len(shot.references)
        cost = shot_cost(part.cost, sampler, part.sampler)
        keyframes = cost.expected_keyframes(kind, len(needs.memory), needs.num_references(story, shot))
        as_seen = _again(inputs, before, for_others, shot, story, part.sampler.seed_rule)
        seen_by_others.append(fingerprint(as_seen, predecessor))
        inputs = _again(inputs, before, asked, shot, story, part.sampler.seed_rule)
        own = seen_by_others[-1] if asked == for_others else fingerprint(inputs, predecessor)
        planned.append(
            PlannedShot(
                part=part_index,
                story=story,
                shot=shot,
                kind=kind,
                mode=mode,
                seed=inputs.get("seed", seed),
                sampler=sampler,
                needs=needs,
                waits_for=waits,
                inputs=inputs,
                fingerprint=own,
                predecessor=predecessor,
                cost=cost.given_tflop() if kind == GIVEN else cost.shot_tflop(keyframes),
                lora_key=lora_key(inputs.get("loras", ())),
            )
        )
    return tuple(planned)


def _again(
    inputs: Mapping[str, Any], before: int, again: Again, shot: Shot, story: Story, seed_rule: str
) -> dict[str, Any]:
    """The inputs of a shot that was forced to be rendered again: ``before`` that often by jobs, then by requests."""
    values = dict(inputs)
    if again.seed is not None and "seed" in values:  # a given clip has none
        of_story = shot_seed(again.seed, shot, replace(story, seed=again.seed), seed_rule)
        values["seed"] = of_story if again.of_story else again.seed
    if generation := before + again.generation:
        values["forced_rerenders"] = generation
    return values


def _is_chained(
    story: Story, needs: Needs, waits: tuple[int, ...], before: Needs | None, index: int, num_given: int
) -> bool:
    """Whether a shot remembers all before it, and waits for the one before it alone: as every shot of StoryMem.

    ``before``: what the shot before it needs, None for the first. ``num_given``: references of the shots before it.
    Then the fingerprint of the shot before covers all, and nothing needs to be said of what it recalls.
    """
    if needs.references != bool(story.reference_images) or needs.entities:
        return False
    if before is None:
        return True
    if before.references != needs.references:  # a given clip, or a T2V shot: it does not cover the story's images
        return False
    return waits == (index - 1,) and len(needs.memory) == index and len(needs.given) == num_given


def _recall_inputs(story: Story, shots: Sequence[Shot], needs: Needs, digest: Callable[[Path], str]) -> dict[str, Any]:
    """What the memory of a shot has, where it is not everything before it: ``shots`` by name, images by ``digest``."""
    inputs: dict[str, Any] = {"shots": [shots[index].shot_id for index in needs.memory]}
    if needs.references:
        inputs["references"] = [digest(path) for path in story.reference_images]
    if needs.given:
        inputs["given"] = [
            [shots[index].shot_id, digest(reference.path), "sink" if reference.is_sink else "window"]
            for index, position in needs.given
            for reference in [shots[index].references[position]]
        ]
    if needs.entities:
        images = {entity.name: entity.references for entity in story.entities}
        order = sorted(slot for entity in needs.entities for slot in entity.references)  # as the memory has them
        inputs["entities"] = [
            {
                "references": [
                    [order.index(slot), digest(path)]
                    for slot, path in zip(entity.references, images.get(entity.name, ()), strict=True)
                ],
                "first": None if entity.first is None else shots[entity.first].shot_id,
                "latest": [shots[index].shot_id for index in entity.latest],
            }
            for entity in needs.entities
        ]
    return inputs


def _image_digest(path: Path) -> str:
    return reference_image_digest(path) + pixel_rule(path)


def plan_part(
    part_index: int, part: BatchPart, requests: QueueState | None = None
) -> Iterator[tuple[Story, tuple[PlannedShot, ...] | StoryboardError]]:
    """Plan all stories of a part; see ``plan_stories``. ``requests``: to its queue; read here where they are None."""
    if requests is None:
        requests = QueueState()
        for request in RequestLog(part.run.root).read_new():
            requests.apply(request)
    return plan_stories(part_index, part, part.stories, requests)


def plan_stories(
    part_index: int, part: BatchPart, stories: Iterable[Story], requests: QueueState
) -> Iterator[tuple[Story, tuple[PlannedShot, ...] | StoryboardError]]:
    """Plan stories of a part. A negative seed is drawn once per run folder.

    Yields each story with its planned shots, or with the error that prevents its plan. Reads the run folder (drawn
    seeds, forced re-renders) and the reference images.
    """
    generations = part.run.rerender_generations()
    for story in stories:
        base = part.sampler.seed if story.seed is None else story.seed
        if base < 0:
            name = "all_stories" if story.seed is None else f"story_{story.story_id}"
            story = replace(story, seed=part.run.drawn_seed(name))
        try:
            yield story, plan_story(part_index, part, story, generations, requests)
        except StoryboardError as error:
            yield story, error
