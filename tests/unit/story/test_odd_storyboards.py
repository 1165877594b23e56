"""What people write that is almost the format: read with one meaning and a warning, or refused with the cure."""

import json
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboard, load_storyboards
from storymem_dist.story.schema import Story


def load(folder: Path, *shots: dict[str, Any], **story: Any) -> Story:
    document = {"story_name": "x", "scenes": [{"scene_num": 1, "shots": list(shots)}], **story}
    (folder / "a.json").write_text(json.dumps(document))
    return load_storyboard(folder / "a.json")


def test_a_shot_id_of_another_program_may_be_that_of_several_shots(tmp_path: Path) -> None:
    restarting = [{"scene_num": n, "shots": [{"prompt": "A.", "shot_id": "1"}]} for n in (1, 2)]
    story = load(tmp_path, scenes=restarting)
    assert [shot.name for shot in story.shots] == ["1", "1"]
    assert story.warnings[0].endswith(": shot_id is that of several shots, so recall cannot name them by it: '1'")
    from_zero = [{"prompt": "A.", "shot_id": "shot_00"}, {"prompt": "B.", "shot_id": "shot_01"}]
    assert "'shot_01'" in load(tmp_path, *from_zero).warnings[0]
    assert load(tmp_path, *from_zero, {"prompt": "C.", "recall": "shot_00"}).shots[2].recall == (0,)
    with pytest.raises(StoryboardError, match="shot 3: recall names 'shot_01', which may be one of several shots"):
        load(tmp_path, *from_zero, {"prompt": "C.", "recall": "shot_01"})


def test_a_name_of_its_own_goes_before_the_shot_id(tmp_path: Path) -> None:
    story = load(tmp_path, {"prompt": "A.", "shot_id": "1", "name": "attic"}, {"prompt": "B.", "recall": "attic"})
    assert story.shots[0].name == "attic" and story.shots[1].recall == (0,)
    assert story.warnings == (
        f"{tmp_path}/a.json, scene 1, shot 1: shot_id is written next to name; recall knows the name",
    )


def test_names_that_look_the_same_are_the_same(tmp_path: Path) -> None:
    shots: list[dict[str, Any]] = [
        {"prompt": "A.", "name": "Zoe\u0308", "entities": ["Zoe\u0308"]},
        {"prompt": "B.", "recall": "Zo\u00eb"},
    ]
    story = load(tmp_path, *shots, entities={"Zo\u00eb": "A girl."})
    assert story.shots[1].recall == (0,) and [entity.description for entity in story.entities] == ["A girl."]
    assert not story.warnings


def test_entities_that_differ_in_case_are_named(tmp_path: Path) -> None:
    story = load(tmp_path, {"prompt": "A.", "entities": ["Mira"]}, {"prompt": "B.", "entities": ["mira"]})
    assert len(story.entities) == 2
    assert story.warnings == (
        f"{tmp_path}/a.json: 'Mira', 'mira' differ in case or spaces alone; they are different entities",
    )


def test_names_with_commas_are_no_list(tmp_path: Path) -> None:
    with pytest.raises(StoryboardError, match="entities is the text 'Mira, Bo'; allowed: a list"):
        load(tmp_path, {"prompt": "A.", "entities": "Mira, Bo"})
    with pytest.raises(StoryboardError, match=r"which is no shot; write a list: \[shot_01, references\]"):
        load(tmp_path, {"prompt": "A."}, {"prompt": "B.", "recall": "shot_01, references"})
    assert load(tmp_path, {"prompt": "A.", "entities": ["Mira, the girl"]}).shots[0].entities == ("Mira, the girl",)


def test_a_picture_as_description_is_named(tmp_path: Path) -> None:
    story = load(tmp_path, {"prompt": "A.", "entities": ["Mira"]}, entities={"Mira": "mira.png"})
    assert "a picture is written as references: [mira.png]" in story.warnings[0]


def test_a_picture_under_the_key_of_a_text_is_named(tmp_path: Path) -> None:
    story = load(tmp_path, {"prompt": "A.", "first_frame": "a.png"}, {"prompt": "A.", "first_frame": "A man."})
    assert [warning.endswith("for a picture write start_image") for warning in story.warnings] == [True, False]


def test_an_entity_has_one_name(tmp_path: Path) -> None:
    with pytest.raises(StoryboardError, match="the entity 'Mira' has another name, 'Bo'; keep one of them"):
        load(tmp_path, {"prompt": "A.", "entities": ["Mira"]}, entities={"Mira": {"name": "Bo"}})
    load(tmp_path, {"prompt": "A.", "entities": ["Mira"]}, entities={"Mira": {"name": "Mira"}})


def test_keys_of_a_shot_in_scene_or_story_have_a_warning_with_the_cure(tmp_path: Path) -> None:
    scene = {"scene_num": 1, "duration": 4, "shots": [{"prompt": "A."}]}
    story = load(tmp_path, scenes=[scene], negative_prompt="blurry")
    words = "belongs to a shot; write it in shots or in defaults, it is not used"
    assert story.warnings == (
        f"{tmp_path}/a.json: the key 'negative_prompt' {words}",
        f"{tmp_path}/a.json, scene 1: the key 'duration' {words}",
    )


def test_a_schedule_goes_before_the_entities_of_defaults(tmp_path: Path) -> None:
    shots = [{"prompt": "A."}, {"prompt": "B."}]
    story = load(tmp_path, *shots, defaults={"entities": ["Mira"]}, entity_schedule={"1:1": ["Bo"]})
    assert [shot.entities for shot in story.shots] == [("Bo",), ("Mira",)]


@pytest.mark.parametrize("text", ["entities: {Mira: a #1 fan}", "story_overview: a #1 hit"])
def test_what_yaml_takes_for_a_comment_has_a_warning(tmp_path: Path, text: str) -> None:
    shots = "scenes:\n- scene_num: 1\n  shots:\n  - prompt: A.\n    entities: [Mira]\n"
    text = text.replace("{Mira: ", "\n  Mira: ").replace("}", "")
    (tmp_path / "a.yaml").write_text(f"story_name: x\n{text}\n{shots}")
    assert any("YAML takes '#1" in warning for warning in load_storyboard(tmp_path / "a.yaml").warnings)


def test_a_bad_file_in_the_folder_of_a_row_stops_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    load(folder, {"prompt": "A."})
    (folder / "bad.json").write_text("{")
    (folder / "list.jsonl").write_text('"a.json"\n')
    (tmp_path / "all.jsonl").write_text('"more"\n')
    batch = load_storyboards(tmp_path / "all.jsonl")
    assert [story.story_id for story in batch.stories] == ["a"]
    messages = [one.message.replace(f"{tmp_path}/", "") for one in batch.rejected]
    assert messages[0].startswith("all.jsonl, line 1: more/bad.json: not valid JSON, line 1")
    assert messages[1] == "all.jsonl, line 1: more/list.jsonl: a list cannot be a row of a list; write its rows there"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A cat.\nnight.yaml\n", "line 2: 'night.yaml' is a storyboard's file, and each line of a .txt file is read"),
        ('["A cat.", "A dog."]\n', "this looks like a storyboard"),
    ],
)
def test_a_text_file_of_something_else_holds_no_prompts(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    (rejected,) = load_storyboards(tmp_path / "a.txt").rejected
    assert rejected.message.startswith(f"{tmp_path}/a.txt: {said}")
