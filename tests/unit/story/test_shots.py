"""A scene's ``shots``: every key, the story's ``defaults``, and what is read with a warning."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboard
from storymem_dist.story.schema import REFERENCES, Entity, Scene, Shot, ShotOptions, ShotReference
from tests.helpers.benchmark_episodes import EPISODES, episode
from tests.helpers.shot_story import STORY, load, write_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def test_every_key_becomes_a_value(folder: Path) -> None:
    story = load(folder, STORY)
    defaults = ShotOptions(num_inference_steps=20, guidance_scale=(4.0, 4.0), negative_prompt="blurry # and dull")
    first, second, third, fourth = story.shots
    assert first == Shot(
        index=0,
        index_in_scene=0,
        scene_num=1,
        prompt="Ink. She climbs.",
        cut=True,
        name="climb",
        options=ShotOptions(
            duration=2.5, num_inference_steps=20, guidance_scale=(4.0, 4.0), negative_prompt="blurry # and dull"
        ),
        start_image=folder / "still.png",
        entities=("Mira",),
    )
    assert second.options == ShotOptions(seed=7, num_inference_steps=20, guidance_scale=(3.0, 2.0))
    assert (second.cut, second.recall) == (False, (REFERENCES, 0))
    assert (third.video, third.prompt, third.cut, third.remember) == (folder / "filmed.mp4", "", True, False)
    assert third.options == ShotOptions(), "what says how shots are rendered does not concern a given clip"
    assert fourth.options == ShotOptions(
        num_frames=33,
        num_inference_steps=20,
        guidance_scale=defaults.guidance_scale,
        negative_prompt=defaults.negative_prompt,
        loras=(
            {"path": str(folder / "push.safetensors")},
            {"path": str(folder / "motion"), "strength": 0.5, "expert": "high_noise"},
        ),
    )
    assert (fourth.name, fourth.recall) == ("sea", ())
    assert fourth.references == (
        ShotReference(path=folder / "mira.png"),
        ShotReference(path=folder / "keeper.png", is_sink=True),
    )
    assert [len(scene.shots) for scene in story.scenes] == [2, 2]
    assert story.entities == (
        Entity(name="Mira", description="A woman in red.", references=(folder / "mira.png",)),
        Entity(name="harbour", description="A harbour at night."),
        Entity(name="sky"),
    )
    assert [warning.removeprefix(f"{folder}/lamp.yaml") for warning in story.warnings] == [
        ": the story's entities do not describe 'sky'",
    ]


def test_the_format_in_full_has_no_warnings_and_json_and_yaml_are_equal(folder: Path) -> None:
    text = STORY.replace("remember: no", "remember: false").replace(", sky]", "]")
    story = load(folder, text)
    (folder / "lamp.json").write_text(json.dumps(yaml.safe_load(text)))
    as_json = load_storyboard(folder / "lamp.json")
    assert story.warnings == as_json.warnings == ()
    assert (story.scenes, story.entities) == (as_json.scenes, as_json.entities)


def test_a_story_without_further_keys_is_the_same_in_both_forms(tmp_path: Path) -> None:
    lists = {"scene_num": 1, "video_prompts": ["A.", "B."], "cut": [True, False]}
    shots = {"scene_num": 1, "shots": [{"prompt": "A."}, {"prompt": "B.", "cut": False}]}
    path, stories = tmp_path / "a.json", []
    for scene in (lists, shots):
        path.write_text(json.dumps({"story_name": "x", "seed": 2, "style": "Ink.", "scenes": [scene]}))
        stories.append(load_storyboard(path))
    assert stories[0] == stories[1]
    assert stories[0].scenes == (
        Scene(
            scene_num=1,
            shots=(
                Shot(index=0, index_in_scene=0, scene_num=1, prompt="Ink. A.", cut=True),
                Shot(index=1, index_in_scene=1, scene_num=1, prompt="Ink. B.", cut=False),
            ),
        ),
    )


def test_defaults_hold_for_scenes_with_lists_too_and_a_shot_may_take_them_back(tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "story_name": "x",
        "defaults": {"cut": False, "num_frames": 17, "remember": False},
        "scenes": [
            {"scene_num": 1, "video_prompts": ["A.", "B."]},
            {"scene_num": 2, "shots": [{"prompt": "C.", "duration": 1, "cut": None, "remember": True}]},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    story = load_storyboard(tmp_path / "a.json")
    assert [shot.cut for shot in story.shots] == [True, False, True]
    assert [(shot.options.num_frames, shot.options.duration) for shot in story.shots] == [
        (17, None),
        (17, None),
        (None, 1.0),
    ]
    assert [shot.remember for shot in story.shots] == [False, False, True]


READ: dict[str, tuple[str, str, str]] = {
    "a shot as text": (
        "- video_prompt: The sea.\n        shot_id: sea",
        "- The sea.\n      - prompt: x",
        "shot is a text",
    ),
    "a text for an image model": (
        "name: climb",
        "name: climb\n        first_frame: Her.",
        "first_frame is a text for an",
    ),
    "a clip that would continue": ("remember: no", "cut: false", "a given clip continues no other"),
    "one entity": ("entities: [Mira]", "entities: Mira", "entities is one value; read as a list of one"),
    "an unknown key": ("name: climb", "lens: 35 mm", "unknown keys are not used: 'lens'"),
    "a number that YAML reads otherwise": ("num_frames: 33", "num_frames: 033", "YAML reads '033' as the number 27"),
}


@pytest.mark.parametrize("case", READ)
def test_what_has_one_meaning_is_read_with_a_warning(folder: Path, case: str) -> None:
    old, new, said = READ[case]
    text = STORY.replace("[climb, references]", "none").replace(old, new, 1)
    assert any(said in warning for warning in load(folder, text).warnings)


def test_a_number_of_shots_next_to_the_lists_is_an_unknown_key(tmp_path: Path) -> None:
    scene = {"scene_num": 1, "shots": 1, "video_prompts": ["A."], "cut": [True]}
    (tmp_path / "a.json").write_text(json.dumps({"story_name": "x", "scenes": [scene]}))
    assert load_storyboard(tmp_path / "a.json").warnings == (f"{tmp_path}/a.json: unknown keys are not used: 'shots'",)


def test_shots_outside_of_scenes_are_sent_there(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"story_name": "x", "shots": [{"prompt": "A."}]}))
    with pytest.raises(StoryboardError, match=r"'scenes' is missing; write the shots in a scene: scenes: \[\{shots:"):
        load_storyboard(tmp_path / "a.json")


def test_pictures_of_shots_are_read_as_all_pictures_are(folder: Path) -> None:
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(folder / "still.png")
    Image.new("I;16", (8, 6), 900).save(folder / "mira.png")
    story = load(folder, STORY)
    assert any("16-bit numbers up to 900 only" in warning for warning in story.warnings)


def test_the_schedule_of_a_published_benchmark_is_read_as_entities(tmp_path: Path) -> None:
    document = episode(4)
    path, stories = tmp_path / "a.json", []
    path.write_text(json.dumps(document))
    stories.append(load_storyboard(path))
    schedule = document.pop("entity_schedule")
    document["entities"] = {"Mara": document.pop("entity_descriptions")["Character 1"]["description"]}
    for scene in document["scenes"]:
        prompts, cuts = scene.pop("video_prompts"), scene.pop("cut")
        scene["shots"] = [
            {"prompt": prompt, "cut": cut, "entities": schedule[f"{scene['scene_num']}:{number}"]["characters"]}
            for number, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True), start=1)
        ]
    path.write_text(json.dumps(document))
    stories.append(load_storyboard(path))
    assert len(stories[0].shots) == len(EPISODES[4].replace(" ", ""))
    assert (stories[0].scenes, stories[0].entities) == (stories[1].scenes, stories[1].entities)


def test_a_schedule_that_does_not_fit_is_said(tmp_path: Path) -> None:
    document = episode(4)
    document["entity_schedule"] |= {"1:99": {}, "later": {}}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    assert any(
        "names shots that the story does not have: '1:99', 'later'" in said for said in load_storyboard(path).warnings
    )
    document["entity_schedule"]["1:1"] = {"characters": "Mara"}
    path.write_text(json.dumps(document))
    with pytest.raises(StoryboardError, match="entity_schedule, '1:1' holds the text 'Mara'; allowed: lists of names"):
        load_storyboard(path)


def test_a_sink_of_an_earlier_shot_is_one_of_the_references(folder: Path) -> None:
    text = STORY.replace("reference_images: [keeper.png]\n", "")
    text = text.replace("duration: 2.5", "references: [{path: keeper.png, sink: yes}]")
    assert load(folder, text).shots[1].recall == (REFERENCES, 0)


def test_defaults_give_way_where_they_have_no_place(folder: Path) -> None:
    shots = [
        {"prompt": "A.", "name": "first"},
        {"prompt": "B.", "cut": False},
        {"video": "filmed.mp4"},
        {"prompt": "D.", "recall": None},
        {"prompt": "E.", "start_image": None},
    ]
    defaults = {"recall": "first", "start_image": "still.png", "seed": 3, "remember": True}
    document = {"story_name": "x", "defaults": defaults, "scenes": [{"scene_num": 1, "shots": shots}]}
    (folder / "a.json").write_text(json.dumps(document))
    story = load_storyboard(folder / "a.json")
    assert [shot.recall for shot in story.shots] == [None, (0,), None, None, (0,)]
    assert [shot.start_image is not None for shot in story.shots] == [True, False, False, True, False]
    assert [shot.options.seed for shot in story.shots] == [3, 3, None, 3, 3]
    document["defaults"] = {"recall": "frist"}
    (folder / "a.json").write_text(json.dumps(document))
    with pytest.raises(StoryboardError, match=r"shot 1: the recall of defaults names 'frist', which.* 'first'"):
        load_storyboard(folder / "a.json")


def test_more_entities_than_a_story_has_are_refused(tmp_path: Path) -> None:
    shots = [{"prompt": "A.", "entities": [f"{number} {name}" for name in range(60)]} for number in range(20)]
    (tmp_path / "a.json").write_text(json.dumps({"story_name": "x", "scenes": [{"scene_num": 1, "shots": shots}]}))
    with pytest.raises(StoryboardError, match="more than 1000 entities; allowed: at most 1000"):
        load_storyboard(tmp_path / "a.json")
