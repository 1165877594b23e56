"""Stories for ``benchmarks.dispatch``: chains of ST-Bench's lengths, one story, mixed stories, EntityBench's structure.

Made from a seed, planned as a job plans them. No prompt of another data set is used: structure only.
"""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_story
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.story.schema import Entity, Scene, Shot, Story

# 30 stories, 300 shots, 7 to 12 a story, as ST-Bench has.
SHOT_COUNTS = [7] * 3 + [8] * 4 + [9] * 5 + [10] * 4 + [11] * 6 + [12] * 8

# EntityBench: 140 stories, 2,491 shots, of 15 mostly and 50 at most. How many entities a shot shows was counted in 20
# of them. The last three make the longest paths of all stories about as long as those of the data set: 1,053 shots in
# sum with memory=anchored, 1,297 with first appearances.
ENTITYBENCH_COUNTS = [50] * 11 + [16] * 6 + [15] * 123
CHARACTERS_OF_A_SHOT = {0: 4, 1: 224, 2: 266, 3: 111, 4: 32, 5: 8, 6: 4}
PLACES_OF_A_SHOT = {0: 22, 1: 621, 2: 6}
OBJECTS_OF_A_SHOT = {0: 142, 1: 238, 2: 167, 3: 70, 4: 25, 5: 6, 6: 1}
MOST_CUTS = 0.7  # share of cuts of a story: between none and this
SEEN_AGAIN = 0.2  # chance that what a shot shows is in the next one, too
PROMINENCE = 2.0  # the n-th of a cast is chosen as often as 1 / n to this power


def make_part(root: Path, memory: MemorySettings | None = None) -> BatchPart:
    """A batch part with A14B's cost model."""
    return BatchPart(
        run=RunFolder(root),
        stories=[],
        sampler=SamplerSettings(),
        inputs={"t2v": {}, "m2v": {}},
        video=VideoSettings(),
        cost=CostModel(),
        memory=memory or MemorySettings(),
    )


def planned(stories: Sequence[Story], memory: MemorySettings | None = None) -> list[tuple[PlannedShot, ...]]:
    """The shots of ``stories``, planned as a job plans them."""
    part = make_part(Path("unused"), memory)
    return [plan_story(0, part, story, {}) for story in stories]


def make_chains(num_stories: int) -> list[tuple[PlannedShot, ...]]:
    """Stories of cuts that remember all before them, with the lengths of ``SHOT_COUNTS``, repeated."""
    return planned([make_story(n, SHOT_COUNTS[n % len(SHOT_COUNTS)]) for n in range(num_stories)])


def make_story(number: int, num_shots: int) -> Story:
    """A story of ``num_shots`` cuts."""
    return _story(number, [_shot(index) for index in range(num_shots)])


def mixed_stories(num_stories: int, *, seed: int = 0) -> list[Story]:
    """Stories of 5 to 15 shots. A third remember all before them; the shots of the others name what they recall."""
    rng = random.Random(seed)
    stories = []
    for number in range(num_stories):
        shots = []
        for index in range(rng.randint(5, 15)):
            recall: tuple[int, ...] | None = None
            if number % 3 and index:
                recall = tuple(sorted(rng.sample(range(index), min(index, rng.randint(number % 3 - 1, 3)))))
            shots.append(_shot(index, cut=rng.random() < 0.7, recall=recall))
        stories.append(_story(number, shots))
    return stories


def entitybench_stories(*, seed: int = 0) -> list[Story]:
    """Stories with EntityBench's structure: lengths, cuts, and how many entities a shot shows and how often."""
    rng = random.Random(seed)
    stories = []
    for number, num_shots in enumerate(ENTITYBENCH_COUNTS):
        casts = {
            "character": (CHARACTERS_OF_A_SHOT, 5 + num_shots // 9),
            "place": (PLACES_OF_A_SHOT, 2 + num_shots // 8),
            "object": (OBJECTS_OF_A_SHOT, num_shots // 2 + 4),
        }
        shots: list[Shot] = []
        cut_ratio = rng.uniform(0.0, MOST_CUTS)
        for index in range(num_shots):
            seen: list[str] = []
            before = shots[-1].entities if shots else ()
            for kind, (counts, size) in casts.items():
                want = rng.choices(list(counts), list(counts.values()))[0]
                names = [f"{kind} {one}" for one in range(size)]
                again = [name for name in before if name.startswith(kind) and rng.random() < SEEN_AGAIN]
                often = [1 / (rank + 1) ** PROMINENCE for rank in range(size)]
                chosen = [*again[:want], *rng.choices(names, often, k=want)]
                seen += list(dict.fromkeys(chosen))[:want]
            shots.append(_shot(index, cut=index == 0 or rng.random() < cut_ratio, entities=tuple(seen)))
        stories.append(_story(number, shots))
    return stories


def _shot(index: int, **fields: object) -> Shot:
    shot = Shot(index=index, index_in_scene=index, scene_num=1, prompt=f"shot {index}", cut=True)
    return dataclasses.replace(shot, **fields)  # type: ignore[arg-type]


def _story(number: int, shots: Sequence[Shot]) -> Story:
    names = dict.fromkeys(name for shot in shots for name in shot.entities)
    return Story(
        story_id=f"story_{number:04d}",
        name="",
        overview="",
        scenes=(Scene(scene_num=1, shots=tuple(shots)),),
        entities=tuple(Entity(name=name) for name in names),
    )
