"""A shot that a later one names leaves a keyframe, whatever its own memory shows; other stories keep fingerprints."""

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.needs import story_needs
from storymem_dist.memory.settings import ENTITIES, MemorySettings
from tests.helpers.story_graphs import shot_of, story_of


def named(recall: str, *shots: object) -> list[bool]:
    story = story_of("s", *shots)  # type: ignore[arg-type]
    return [needs.keeps_first for needs in story_needs(story, SamplerSettings(), MemorySettings(recall=recall))]


def test_a_shot_that_another_recalls_by_name_keeps_its_first_keyframe() -> None:
    shots = [shot_of(0), shot_of(1), shot_of(2, recall=(-1, 1)), shot_of(3, recall=())]
    assert named("window", *shots) == [False, True, False, False]


def test_the_first_appearance_of_an_entity_keeps_its_first_keyframe() -> None:
    shots = [shot_of(index, entities=names) for index, names in enumerate([("Tom",), ("Mira",), ("Mira",), ("Tom",)])]
    assert named(ENTITIES, *shots) == [False, True, False, False], "the first shot of a story does so anyway"
    assert named(ENTITIES, *shots[:2]) == [False, True], "a shot that is added later does not change it"
    assert named("window", *shots) == [False] * 4


def test_a_story_that_names_nothing_is_as_before() -> None:
    assert named("window", *(shot_of(index, cut=index != 2) for index in range(4))) == [False] * 4
    assert named("anchored", *(shot_of(index) for index in range(4))) == [False] * 4
