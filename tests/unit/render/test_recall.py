"""The memory of a shot holds what is planned for it, in the order of the story."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from storymem_dist.dispatch.plan import plan_story
from storymem_dist.dispatch.protocol import ShotHistory, ShotJob
from storymem_dist.memory.bank import Keyframe
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.render.recall import memory_bank, recall
from storymem_dist.story.schema import Entity, ShotReference
from tests.helpers.fake_renderer import make_part
from tests.helpers.story_graphs import shot_of, story_of


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Five pictures of one grey each: 10, 20, 30, 40, 50."""
    paths = []
    for grey in range(10, 60, 10):
        paths.append(tmp_path / f"{grey}.png")
        Image.new("RGB", (48, 32), (grey,) * 3).save(paths[-1])
    return paths


def job_of(pictures: list[Path], index: int, rule: str) -> ShotJob:
    """A shot of a story with a reference image, one of an entity, and three of its second shot (the first a sink)."""
    references = tuple(ShotReference(path=path, is_sink=number == 0) for number, path in enumerate(pictures[2:]))
    shots = (
        shot_of(0, entities=("Tom",)),
        shot_of(1, references=references),
        shot_of(2, entities=("Mira", "Tom")),
        shot_of(3, recall=(0,)),
    )
    story = story_of("s", *shots, reference_images=(pictures[0],))
    mira = Entity(name="Mira", references=(pictures[1],))
    story = dataclasses.replace(story, entities=(Entity(name="Tom"), mira))
    return plan_story(0, make_part(Path("unused"), [], recall=rule), story, {})[index].job("attempt", "")


def keyframes_of(*shots: int) -> ShotHistory:
    images = [torch.full((3, 32, 48), 100 + index, dtype=torch.uint8) for index in shots]
    kept = [
        Keyframe(image=image, shot_index=index, slot=0, frame_index=0)
        for image, index in zip(images, shots, strict=True)
    ]
    return ShotHistory(keyframes=tuple(kept), tail=None)


def greys(job: ShotJob, history: ShotHistory) -> list[int]:
    return [int(keyframe.image[0, 0, 0]) for keyframe in memory_bank(job, history).keyframes]


def test_under_the_papers_rule_all_given_images_stay_where_they_joined(pictures: list[Path]) -> None:
    assert greys(job_of(pictures, 0, "window"), keyframes_of()) == [10]
    assert greys(job_of(pictures, 1, "window"), keyframes_of(0)) == [10, 100, 30, 40, 50]
    assert greys(job_of(pictures, 2, "window"), keyframes_of(0, 1)) == [10, 100, 30, 40, 50, 101]


def test_other_rules_keep_the_sink_and_a_shot_that_names_its_memory_has_nothing_else(pictures: list[Path]) -> None:
    assert greys(job_of(pictures, 2, "anchored"), keyframes_of(0)) == [10, 100, 30]
    assert greys(job_of(pictures, 3, "window"), keyframes_of(0)) == [100]


def test_by_entity_the_memory_has_the_entitys_own_references_and_says_whose_they_are(pictures: list[Path]) -> None:
    job = job_of(pictures, 2, "entities")
    bank = memory_bank(job, keyframes_of(0))
    assert [int(keyframe.image[0, 0, 0]) for keyframe in bank.keyframes] == [10, 20, 100, 30]
    decisions = recall(bank, job, MemorySettings(recall="entities")).decisions
    assert [decision.why for decision in decisions] == [
        "a reference image",
        "a reference image of Mira",
        "the first of Tom",
        "a reference image",
    ]


def test_a_shot_from_text_alone_recalls_nothing_and_a_given_clip_has_no_references(pictures: list[Path]) -> None:
    story = story_of("s", shot_of(0), shot_of(1, video=pictures[0], references=(ShotReference(path=pictures[1]),)))
    for planned in plan_story(0, make_part(Path("unused"), []), story, {}):
        job = planned.job("attempt", "")
        assert recall(memory_bank(job, keyframes_of()), job, MemorySettings()).keyframes == ()
