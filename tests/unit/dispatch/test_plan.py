import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storymem_dist.artifacts.fingerprint import reference_image_digest
from storymem_dist.dispatch.needs import story_needs
from storymem_dist.dispatch.plan import plan_part, plan_story
from storymem_dist.errors import StoryboardError
from storymem_dist.story.schema import Scene, Story
from tests.helpers.fake_renderer import make_part, make_story


def fingerprints(story: Story, generations: dict[tuple[str, str], int] | None = None, **changes: object) -> list[str]:
    return [
        shot.fingerprint for shot in plan_story(0, make_part(Path("unused"), [], **changes), story, generations or {})
    ]


def changed(one: list[str], two: list[str]) -> list[bool]:
    return [a != b for a, b in zip(one, two, strict=True)]


@pytest.mark.parametrize(
    ("continuation", "modes"),
    [
        ("mi2v", ["t2v", "m2v", "mi2v", "m2v"]),
        ("mm2v", ["t2v", "m2v", "mm2v", "m2v"]),
        ("none", ["t2v", "m2v", "m2v", "m2v"]),
    ],
)
def test_modes_follow_cuts_and_the_jobs_continuation(continuation: str, modes: list[str]) -> None:
    story, part = make_story("ocean", 4), make_part(Path("unused"), [], continuation=continuation)
    assert [needs.mode for needs in story_needs(story, part.sampler, part.memory)] == modes
    assert [shot.kind for shot in plan_story(0, part, story, {})] == ["t2v", "m2v", "m2v", "m2v"]


def test_the_first_shot_is_m2v_with_reference_images_or_by_setting_even_when_it_says_no_cut(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"pixels")
    with_images = make_story("ocean", 2, reference_images=(image,))
    part = make_part(Path("unused"), [])
    assert story_needs(with_images, part.sampler, part.memory)[0].mode == "m2v"
    m2v_first = make_part(Path("unused"), [], first_shot="m2v").sampler
    first = dataclasses.replace(make_story("ocean", 1).shots[0], cut=False)
    story = make_story("ocean", 1, scenes=(Scene(scene_num=1, shots=(first,)),))
    assert story_needs(story, m2v_first, part.memory)[0].mode == "m2v"


def test_an_edited_prompt_changes_that_shot_and_all_after_it_and_nothing_else() -> None:
    before, after = fingerprints(make_story("ocean", 4)), fingerprints(make_story("ocean", 4, changed={2: "new"}))
    assert changed(before, after) == [False, False, True, True]


def test_a_setting_of_one_kind_changes_the_first_shot_of_that_kind_and_all_after_it() -> None:
    before = fingerprints(make_story("ocean", 3))
    assert changed(before, fingerprints(make_story("ocean", 3), flow_shift_m2v=5.0)) == [False, True, True]
    assert changed(before, fingerprints(make_story("ocean", 3), flow_shift_t2v=5.0)) == [True, True, True]


def test_seeds_are_inputs_and_a_storys_seed_overrides_the_jobs() -> None:
    before = fingerprints(make_story("ocean", 2))
    assert changed(before, fingerprints(make_story("ocean", 2), seed=1)) == [True, True]
    assert changed(before, fingerprints(make_story("ocean", 2, seed=0), seed=1)) == [False, False]


def test_names_and_places_of_a_story_change_nothing() -> None:
    assert fingerprints(make_story("ocean", 2)) == fingerprints(
        dataclasses.replace(make_story("ocean", 2), story_id="sea", name="The sea", source=Path("/x.json"))
    )


def test_a_forced_rerender_changes_that_shot_and_all_after_it() -> None:
    before = fingerprints(make_story("ocean", 3))
    once = fingerprints(make_story("ocean", 3), {("ocean", "shot_02"): 1})
    twice = fingerprints(make_story("ocean", 3), {("ocean", "shot_02"): 2, ("sea", "shot_01"): 1})
    assert changed(before, once) == [False, True, True]
    assert changed(once, twice) == [False, True, True]


def test_the_contents_of_reference_images_are_inputs_and_their_paths_are_not(tmp_path: Path) -> None:
    for name, content in (("a.png", b"1"), ("b.png", b"1"), ("c.png", b"2")):
        (tmp_path / name).write_bytes(content)
    plans = [
        fingerprints(make_story("ocean", 2, reference_images=(tmp_path / name,)))
        for name in ("a.png", "b.png", "c.png")
    ]
    assert changed(plans[0], plans[1]) == [False, False]
    assert changed(plans[0], plans[2]) == [True, True]


def test_a_picture_that_is_converted_has_another_fingerprint_than_its_numbers_had(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    (plain,) = plan_story(0, make_part(Path("unused"), []), make_story("ocean", 1, reference_images=(path,)), {})
    assert plain.inputs["reference_images"] == [reference_image_digest(path)]
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    (scaled,) = plan_story(0, make_part(Path("unused"), []), make_story("ocean", 1, reference_images=(path,)), {})
    assert scaled.inputs["reference_images"] == [reference_image_digest(path) + "scaled"]


def test_an_unreadable_reference_image_rejects_its_story_and_no_other(tmp_path: Path) -> None:
    stories = [make_story("bad", 2, reference_images=(tmp_path / "absent.png",)), make_story("good", 2)]
    part = make_part(tmp_path / "run", stories)
    part.run.open()
    (bad, error), (good, planned) = plan_part(0, part)
    assert isinstance(error, StoryboardError) and "absent.png" in str(error) and bad.story_id == "bad"
    assert isinstance(planned, tuple) and len(planned) == 2 and good.story_id == "good"


def test_a_negative_seed_is_drawn_once_per_run_folder(tmp_path: Path) -> None:
    stories = [make_story("a", 1), make_story("b", 1), make_story("c", 1, seed=-1), make_story("d", 1, seed=5)]
    part = make_part(tmp_path / "run", stories, seed=-1)
    part.run.open()
    first = [planned[0].seed for _, planned in plan_part(0, part) if isinstance(planned, tuple)]
    again = [planned[0].seed for _, planned in plan_part(0, part) if isinstance(planned, tuple)]
    other = make_part(tmp_path / "other", stories, seed=-1)
    other.run.open()
    elsewhere = [planned[0].seed for _, planned in plan_part(0, other) if isinstance(planned, tuple)]
    assert first == again and first != elsewhere
    assert first[0] == first[1] != first[2] and first[3] == 5 and min(first) >= 0


def test_costs_grow_with_the_number_of_keyframes_and_stop_growing_at_the_window() -> None:
    costs = [shot.cost for shot in plan_story(0, make_part(Path("unused"), []), make_story("ocean", 8), {})]
    assert costs[0] < costs[1] < costs[2] < costs[3] < costs[4] == costs[5] == costs[7]
