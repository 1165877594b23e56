"""Which earlier shots each shot needs, and what that means for its mode and fingerprint."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storymem_dist.dispatch.needs import Needs, memory_warnings, story_needs, waits_for
from storymem_dist.dispatch.plan import PlannedShot, plan_story
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.story.schema import REFERENCES, Entity, ShotOptions, ShotReference, Story
from tests.helpers.fake_renderer import make_part, make_story
from tests.helpers.story_graphs import shot_of, stories, story_of


def needs_of(story: Story, recall: str = "window", num_fixed: int = 3, **sampler: object) -> tuple[Needs, ...]:
    part = make_part(Path("unused"), [], **sampler)
    return story_needs(story, part.sampler, MemorySettings(recall=recall, num_fixed=num_fixed))


def memories(story: Story, recall: str = "window", **settings: int) -> list[list[int]]:
    return [list(needs.memory) for needs in needs_of(story, recall, **settings)]


def planned(story: Story, recall: str = "window", **changes: object) -> tuple[PlannedShot, ...]:
    return plan_story(0, make_part(Path("unused"), [], recall=recall, **changes), story, {})


def fingerprints(story: Story, recall: str = "window", **changes: object) -> list[str]:
    return [shot.fingerprint for shot in planned(story, recall, **changes)]


def differing(one: list[str], two: list[str]) -> list[int]:
    return [index for index, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def test_a_shot_remembers_all_before_it_and_waits_for_the_one_before_it() -> None:
    story = make_story("s", 5)
    assert memories(story) == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert waits_for(needs_of(story)) == [(), (0,), (1,), (2,), (3,)]
    assert [needs.continues for needs in needs_of(story)] == [False, False, True, False, False]


def test_anchored_shots_need_the_first_remembered_shot_and_what_they_continue() -> None:
    story = make_story("s", 4)
    assert memories(story, "anchored") == [[], [0], [0], [0]]
    assert waits_for(needs_of(story, "anchored")) == [(), (0,), (1,), (0,)]
    forgotten = story_of("s", shot_of(0, remember=False), shot_of(1), shot_of(2), shot_of(3, cut=False))
    assert memories(forgotten, "anchored") == [[], [], [1], [1]]
    assert [needs.mode for needs in needs_of(forgotten, "anchored")] == ["t2v", "t2v", "m2v", "mi2v"]
    assert waits_for(needs_of(forgotten, "anchored"))[3] == (2,)


def test_a_shot_that_is_not_remembered_is_needed_by_its_continuation_alone() -> None:
    story = story_of("s", shot_of(0), shot_of(1, remember=False), shot_of(2, cut=False), shot_of(3))
    assert memories(story) == [[], [0], [0], [0, 2]]
    assert waits_for(needs_of(story)) == [(), (0,), (1,), (2,)]


def test_what_a_shot_recalls_by_name_goes_before_the_jobs_rule() -> None:
    story = story_of("s", shot_of(0), shot_of(1, recall=()), shot_of(2, recall=(0,)), shot_of(3, recall=(0, 1)))
    for rule in ("window", "anchored", "entities"):
        assert memories(story, rule) == [[], [], [0], [0, 1]]
    assert [needs.mode for needs in needs_of(story)] == ["t2v", "t2v", "m2v", "m2v"]
    assert needs_of(story, first_shot="m2v")[1].mode == "m2v"


def test_a_given_clip_needs_nothing_and_can_be_remembered_and_continued(tmp_path: Path) -> None:
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"a clip")
    story = story_of("s", shot_of(0), shot_of(1, video=clip, cut=False), shot_of(2, cut=False))
    needs = needs_of(story)
    assert (needs[1].mode, list(needs[1].memory), needs[1].continues) == ("given", [], False)
    assert (needs[2].mode, list(needs[2].memory), needs[2].continues) == ("mi2v", [0, 1], True)
    assert planned(story)[1].predecessor is None
    still = story_of("s", shot_of(0, start_image=clip), shot_of(1, start_image=clip))
    assert [one.mode for one in needs_of(still)] == ["mi2v", "mi2v"] and not needs_of(still)[1].continues


CAST = story_of(
    "s",
    shot_of(0, entities=("Mira",)),
    shot_of(1, entities=("Tom",)),
    shot_of(2, entities=("Mira", "Tom")),
    shot_of(3),
    shot_of(4, entities=("the harbour",)),
    shot_of(5, entities=("Tom", "the harbour")),
    shot_of(6, entities=("Mira",)),
)


def test_entities_need_first_appearances_and_the_latest_unless_the_first_have_all_places() -> None:
    assert memories(CAST, "entities") == [[], [0], [0, 1], [0], [0], [1, 2, 4], [0, 2]]
    assert memories(CAST, "entities", num_fixed=10) == [[], [0], [0, 1], [0], [0], [1, 4], [0]]
    assert [place.name for place in needs_of(CAST, "entities")[5].entities] == ["Tom", "the harbour"]
    assert memories(make_story("s", 3), "entities") == memories(make_story("s", 3)), "no schedule: as the paper"


def test_references_of_an_entity_make_its_first_shot_m2v_by_entity_only(tmp_path: Path) -> None:
    image = tmp_path / "mira.png"
    Image.new("RGB", (8, 8)).save(image)
    shots = (shot_of(0, entities=("Mira",)), shot_of(1, entities=("Tom",)))
    story = dataclasses.replace(
        story_of("s", *shots), entities=(Entity(name="Mira", references=(image, image)), Entity(name="Tom"))
    )
    assert needs_of(story, "entities")[0].mode == "m2v" and needs_of(story)[0].mode == "t2v"
    assert needs_of(story, "entities")[0].entities[0].references == (0, 1)
    assert "entities" in planned(story, "entities")[0].inputs["recall"]


def test_references_of_a_shot_stay_in_the_memory_and_only_sinks_where_the_rule_is_not_the_papers(
    tmp_path: Path,
) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    references = (ShotReference(path=image, is_sink=True), ShotReference(path=image))
    story = story_of("s", shot_of(0), shot_of(1, references=references), shot_of(2), shot_of(3, recall=(0,)))
    assert [needs.given for needs in needs_of(story)] == [(), (), ((1, 0), (1, 1)), ()]
    assert needs_of(story, "anchored")[2].given == ((1, 0),)
    recalled = story_of("s", *story.shots[:3], shot_of(3, recall=(REFERENCES, 0)))
    assert needs_of(recalled)[3].given == ((1, 0),)
    assert needs_of(story)[1].num_references(story, story.shots[1]) == 2


@pytest.mark.parametrize("rule", ["anchored", "entities"])
def test_a_fingerprint_covers_what_the_shot_needs_and_nothing_else(rule: str) -> None:
    before = fingerprints(CAST, rule)
    for edited in range(len(CAST.shots)):
        shots = list(CAST.shots)
        shots[edited] = dataclasses.replace(shots[edited], prompt="new")
        after = fingerprints(dataclasses.replace(CAST, scenes=story_of("s", *shots).scenes), rule)
        assert differing(before, after) == sorted(needing(planned(CAST, rule), edited))


def needing(shots: tuple[PlannedShot, ...], wanted: int) -> set[int]:
    """The shot and all that need it, also through others."""
    found = {wanted}
    for shot in shots:
        needed = {*shot.needs.memory, *([shot.index - 1] if shot.needs.continues else [])}
        if needed & found:
            found.add(shot.index)
    return found


@settings(max_examples=60, deadline=None)
@given(stories(), st.sampled_from(["window", "anchored", "entities"]), st.data())
def test_an_edited_shot_changes_those_that_need_it_and_no_other(story: Story, rule: str, data: st.DataObject) -> None:
    before, shots = planned(story, rule), list(story.shots)
    edited = data.draw(st.integers(0, len(shots) - 1))
    shots[edited] = dataclasses.replace(shots[edited], prompt="another prompt")
    after = planned(dataclasses.replace(story, scenes=story_of("s", *shots).scenes), rule)
    changed = differing([shot.fingerprint for shot in before], [shot.fingerprint for shot in after])
    assert changed == sorted(needing(before, edited))


@settings(max_examples=60, deadline=None)
@given(stories(), st.sampled_from(["window", "anchored", "entities"]))
def test_what_a_shot_waits_for_leads_to_all_that_it_needs_and_has_no_detour(story: Story, rule: str) -> None:
    needs = needs_of(story, rule)
    waits = waits_for(needs)
    reached: list[set[int]] = []
    for index, need in enumerate(needs):
        reached.append(set().union(*({one, *reached[one]} for one in waits[index])))
        assert {*need.memory, *([index - 1] if need.continues else [])} <= reached[index]
        assert not any(one in reached[other] for one in waits[index] for other in waits[index])


def test_other_rules_and_recalls_are_other_fingerprints_where_the_memory_differs() -> None:
    story = make_story("s", 4)
    assert differing(fingerprints(story), fingerprints(story, "anchored")) == [2, 3]
    named = story_of("s", shot_of(0), shot_of(1, recall=(0,)))
    assert fingerprints(named) == fingerprints(story_of("s", *named.shots[:1], shot_of(1))), "it is what the paper does"
    shots = planned(story, "anchored")
    assert shots[3].inputs["recall"] == {"shots": ["shot_01"]} and "recall" not in shots[1].inputs


def test_what_the_memory_does_not_use_of_the_entities_is_said() -> None:
    by_entity = MemorySettings(recall="entities")
    assert memory_warnings(CAST, MemorySettings()) == memory_warnings(CAST, by_entity) == []
    (nothing,) = memory_warnings(make_story("s", 2), by_entity)
    assert "memory.recall=entities recalls as window" in nothing
    pictured = dataclasses.replace(CAST, entities=(Entity(name="Mira", references=(Path("a.png"),)),))
    (unused,) = memory_warnings(pictured, MemorySettings(recall="anchored"))
    assert "memory.recall=entities only, not with anchored" in unused


def test_the_seed_of_a_shot_goes_before_the_rule() -> None:
    story = story_of("s", shot_of(0), shot_of(1, options=ShotOptions(seed=99)))
    assert [shot.seed for shot in planned(story, seed=5)] == [5, 99]


def test_a_shot_that_another_names_leaves_a_keyframe_and_the_first_one_does_so_anyway() -> None:
    story = story_of("s", shot_of(0), shot_of(1), shot_of(2, recall=(0, 1)))
    assert [needs.keeps_first for needs in needs_of(story)] == [False, True, False]


def test_a_story_of_thousands_of_shots_is_planned_in_seconds() -> None:
    story = story_of("s", *(shot_of(index, remember=index != 3) for index in range(4000)))
    waits = waits_for(needs_of(story))
    assert waits[-1] == (3998,) and waits[4] == (2,) and waits[5] == (4,)
