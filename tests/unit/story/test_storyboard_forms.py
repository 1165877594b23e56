"""Storyboards as people and language models write them: read where they have one meaning, and never without a word."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboard, load_storyboards
from storymem_dist.story.schema import Entity, Story
from tests.helpers.benchmark_episodes import EPISODES, episode

GOOD: dict[str, Any] = {
    "story_name": "The Lamp",
    "story_overview": "A night.",
    "scenes": [
        {"scene_num": 1, "video_prompts": ["She climbs.", "She lights it."], "cut": [True, False]},
        {"scene_num": 2, "video_prompts": ["The sea."], "cut": [True]},
    ],
}
TRUTH = [("She climbs.", True, 1), ("She lights it.", False, 1), ("The sea.", True, 2)]


def shots(story: Story) -> list[tuple[str, bool, int]]:
    return [(shot.prompt, shot.cut, shot.scene_num) for shot in story.shots]


def changed(scene: int | None = None, remove: tuple[str, ...] = (), **values: object) -> dict[str, Any]:
    story = copy.deepcopy(GOOD)
    part = story if scene is None else story["scenes"][scene]
    part.update(values)
    for key in remove:
        del part[key]
    return story


SCENES = GOOD["scenes"]
FORMS: dict[str, tuple[object, tuple[str, ...]]] = {
    "keys of a planner": (
        changed(agentic_metadata={"fps": 16}, duration_seconds=5, **{"a\nb": 1}),
        (r"unknown keys are not used: 'agentic_metadata', 'duration_seconds', 'a\nb'",),
    ),
    "keys of a planner in scenes": (
        changed(scene=0, lyric_line="la", title="Up"),
        ("unknown keys are not used: 'lyric_line', 'title'",),
    ),
    "words that are almost a key": (changed(speed=1), ("unknown keys are not used: 'speed'",)),
    "other keys that hold a key": (
        changed(art_style="ink", styleId=7, reference_image_prompts=["a"]),
        ("unknown keys are not used: 'art_style', 'styleId', 'reference_image_prompts'",),
    ),
    "a summary with its number of scenes": (
        {"metadata": {"scenes": 2}, "storyboard": GOOD},
        ("the storyboard is the value of 'storyboard'", "unknown keys are not used: 'metadata'"),
    ),
    "a number of scenes next to it": (
        {"scenes": 2, "storyboard": GOOD},
        ("the storyboard is the value of 'storyboard'", "unknown keys are not used: 'scenes'"),
    ),
    "no name": (changed(remove=("story_name",)), ("story_name is missing; the name of the file is used",)),
    "no overview": (changed(remove=("story_overview",)), ()),
    "overview null": (changed(story_overview=None), ()),
    "no cut in a scene of one shot": (
        changed(scene=1, remove=("cut",)),
        ("scene 2: cut is missing; the only shot of a scene is a cut",),
    ),
    "cut as one value": (changed(scene=1, cut="True"), ("scene 2: cut is one value; read as a list of one",)),
    "cut as numbers": (
        changed(scene=0, cut=[1, 0]),
        (
            "scene 1, shot 1: cut is not written as true or false; 1 and yes are read as true, 0 and no as false"
            " (and 1 more)",
        ),
    ),
    "cut as letters": (
        changed(scene=0, cut=["y", "N"]),
        (
            "scene 1, shot 1: cut is not written as true or false; 1 and yes are read as true, 0 and no as false"
            " (and 1 more)",
        ),
    ),
    "cut as words": (
        changed(scene=0, cut=["yes", "No"]),
        (
            "scene 1, shot 1: cut is not written as true or false; 1 and yes are read as true, 0 and no as false"
            " (and 1 more)",
        ),
    ),
    "one prompt as text": (
        changed(scene=1, video_prompts="The sea."),
        ("scene 2: video_prompts is one text; read as a list of one",),
    ),
    "prompts as objects": (
        changed(scene=0, video_prompts=[{"prompt": "She climbs."}, {"prompt": "She lights it.", "seconds": 5}]),
        (
            "scene 1, shot 1: the prompt is an object; its 'prompt' is read (and 1 more)",
            "unknown keys are not used: 'seconds'",
        ),
    ),
    "prompts with their cuts": (
        changed(
            scene=0,
            remove=("cut",),
            video_prompts=[{"text": "She climbs.", "cut": True}, {"text": "She lights it.", "cut": False}],
        ),
        ("scene 1, shot 1: the prompt is an object; its 'text' is read (and 1 more)",),
    ),
    "scene_num as text": (
        changed(scene=1, scene_num=" 2 "),
        ("scene 2: scene_num is not written as a whole number; read as one",),
    ),
    "scene_num as a name": (
        changed(scene=1, scene_num="Scene 2"),
        ("scene 2: scene_num is not written as a whole number; read as one",),
    ),
    "scene_num as a float": (
        changed(scene=1, scene_num=2.0),
        ("scene 2: scene_num is not written as a whole number; read as one",),
    ),
    "no scene_num": (
        changed(scene=1, remove=("scene_num",)),
        ("scene 2: scene_num is missing; the position of the scene is used",),
    ),
    "scenes as an object": (
        changed(scenes={"scene_1": SCENES[0], "Scene 2": SCENES[1]}),
        ("scenes is an object; read as the list of its scenes",),
    ),
    "keys in other spellings": (
        {"storyName": "The Lamp", "Story Overview": "", "Scenes": SCENES},
        (
            "the key 'storyName' is read as 'story_name'",
            "the key 'Story Overview' is read as 'story_overview'",
            "the key 'Scenes' is read as 'scenes'",
        ),
    ),
    "a list of one": ([GOOD], ("the storyboard is in a list of one",)),
    "an object around it": ({"story": GOOD}, ("the storyboard is the value of 'story'",)),
    "objects around it": (
        {"data": {"version": 1, "storyboard": GOOD}},
        (
            "the storyboard is the value of 'storyboard'",
            "the storyboard is the value of 'data'",
            "unknown keys are not used: 'version'",
        ),
    ),
    "stories of one": (
        {"stories": [GOOD]},
        ("the storyboard is in a list of one", "the storyboard is the value of 'stories'"),
    ),
    "scenes alone": (
        SCENES,
        (
            "the file is a list of scenes; read as the scenes of one storyboard",
            "story_name is missing; the name of the file is used",
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_with_one_meaning_is_read_with_a_warning(tmp_path: Path, form: str) -> None:
    document, said = FORMS[form]
    path = tmp_path / "lamp.json"
    path.write_text(json.dumps(document))
    story = load_storyboard(path)
    assert shots(story) == TRUTH
    assert story.name == ("lamp" if any("story_name is missing" in one for one in said) else "The Lamp")
    assert [warning.removeprefix(f"{path}").lstrip(":, ") for warning in story.warnings] == list(said)


REFUSED: dict[str, tuple[str, str]] = {
    "a style outside": (
        json.dumps({"Style": "Ink.", "storyboard": GOOD}),
        "'Style' is next to the storyboard 'storyboard'; write it inside, or remove it",
    ),
    "two storyboards": (
        json.dumps({"a": GOOD, "b": GOOD}),
        "there are storyboards under 'a', 'b'; keep one, or write them as a list",
    ),
    "a scene": (
        json.dumps(SCENES[1]),
        "'scenes' is missing; this is a scene: write it in the list of a storyboard's scenes",
    ),
    "YAML": ("story_name: x", "not valid JSON, line 1: the file begins with 'story_name: x'; write JSON, or name"),
    "full-width signs": ('{"story_name"：7}', "not valid JSON, line 1: the full-width character ：; write :"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_without_one_meaning_is_refused_with_its_cure(tmp_path: Path, form: str) -> None:
    text, problem = REFUSED[form]
    path = tmp_path / "lamp.json"
    path.write_text(text)
    with pytest.raises(StoryboardError) as caught:
        load_storyboard(path)
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_a_story_in_the_format_has_no_warnings(tmp_path: Path) -> None:
    path = tmp_path / "lamp.json"
    path.write_text(json.dumps(GOOD | {"comment": "mine"}), encoding="utf-8-sig")
    assert load_storyboard(path).warnings == ()


def test_the_warning_of_unknown_keys_is_one_short_line_however_many_there_are(tmp_path: Path) -> None:
    path = tmp_path / "lamp.json"
    story = changed(**{f"key\u202e{number}" + "x" * 5000: 1 for number in range(100)})
    for number, scene in enumerate(story["scenes"]):
        scene[f"other_{number}"] = 1
    path.write_text(json.dumps(story))
    (warning,) = load_storyboard(path).warnings
    assert warning.isprintable() and len(warning.removeprefix(str(path))) <= 600
    assert "'key\\u202e0" in warning


FENCED: dict[str, tuple[str, Callable[[str], str]]] = {
    "json": ("a.json", lambda text: f"```json\n{text}\n```"),
    "a title": ("a.json", lambda text: f'```json title="a.json"\n{text}\n```'),
    "no language": ("a.json", lambda text: f"```\n{text}\n```\n"),
    "words around it": ("a.json", lambda text: f"Sure! Here it is:\n\n```json\n{text}\n```\n\nHope it helps.\n"),
    "not closed": ("a.json", lambda text: f"```json\n{text}\n"),
    "carriage returns": ("a.json", lambda text: f"```json\r\n{text}\r\n```\r\n"),
    "tildes in YAML": ("a.yaml", lambda text: f"~~~yaml\n{text}\n~~~"),
    "JSON in YAML, words around it": ("a.yaml", lambda text: f"Here is it: enjoy\n```json\n{text}\n```\nBye: now"),
}


@pytest.mark.parametrize("case", FENCED)
def test_one_markdown_fence_is_looked_into(tmp_path: Path, case: str) -> None:
    name, fenced = FENCED[case]
    path = tmp_path / name
    path.write_bytes(fenced(json.dumps(GOOD, indent=1)).encode())
    story = load_storyboard(path)
    assert shots(story) == TRUTH
    assert story.warnings == (f"{path}: read what is inside the Markdown fence (```); the rest of the file is ignored",)


SEVERAL: dict[str, tuple[str, str]] = {
    "a list": ("two.json", json.dumps([GOOD, GOOD | {"story_name": "The Sea"}])),
    "a list in an object": ("two.json", json.dumps({"stories": [GOOD, GOOD | {"story_name": "The Sea"}]})),
    "JSON Lines": ("two.jsonl", json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"story_name": "The Sea"}) + "\n"),
    "JSON Lines of another name": (
        "two.ndjson",
        json.dumps(GOOD) + "\r\n" + json.dumps({"s": GOOD | {"story_name": "The Sea"}}),
    ),
    "JSON Lines named .json": ("two.json", json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"story_name": "The Sea"})),
    "JSON after JSON": (
        "two.json",
        json.dumps(GOOD, indent=1) + json.dumps(GOOD | {"story_name": "The Sea"}, indent=1),
    ),
    "YAML documents": (
        "two.yaml",
        "---\n" + json.dumps(GOOD) + "\n---\n" + json.dumps(GOOD | {"story_name": "The Sea"}),
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_a_file_of_several_stories_is_one_story_each(tmp_path: Path, case: str) -> None:
    name, text = SEVERAL[case]
    (tmp_path / name).write_text(text)
    batch = load_storyboards(tmp_path)
    assert [(story.story_id, story.name) for story in batch.stories] == [("two-1", "The Lamp"), ("two-2", "The Sea")]
    assert [shots(story) for story in batch.stories] == [TRUTH, TRUTH] and not batch.rejected
    with pytest.raises(StoryboardError, match=r": 2 stories; load_storyboards reads them all"):
        load_storyboard(tmp_path / name)


@pytest.mark.parametrize("name", ["three.jsonl", "three.json"])
def test_a_bad_line_stops_no_other_and_changes_no_id(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n".join([json.dumps(GOOD), "", '{"story_name": “x”}', json.dumps(GOOD)]))
    batch = load_storyboards(tmp_path)
    assert [story.story_id for story in batch.stories] == ["three-1", "three-3"]
    (problem,) = batch.rejected
    assert problem.message == (
        f'{tmp_path / name}, story 2: line 3: the curly quote “; write straight quotes " around keys and texts'
    )


def test_a_story_of_a_list_that_is_wrong_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD, 7, changed(scenes=[])]))
    batch = load_storyboards(tmp_path)
    assert [story.story_id for story in batch.stories] == ["a-1"]
    assert [problem.message.removeprefix(str(tmp_path / "a.json")) for problem in batch.rejected] == [
        ", story 2: a storyboard is the number 7; allowed: an object with story_name, story_overview, scenes",
        ", story 3: scenes is empty; allowed: a list of scenes, at least one",
    ]


def test_a_story_of_a_list_may_not_take_the_id_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD, GOOD]))
    (tmp_path / "A-2.json").write_text(json.dumps(GOOD))
    batch = load_storyboards(tmp_path)
    assert [story.story_id for story in batch.stories] == ["a-1"]
    assert len(batch.rejected) == 2 and all("the story id" in problem.message for problem in batch.rejected)


def test_ids_that_one_file_system_takes_for_one_are_rejected(tmp_path: Path) -> None:
    for folder, name in (("one", "Straße é"), ("two", "STRASSE E\u0301")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(GOOD))
    batch = load_storyboards([tmp_path / "one", tmp_path / "two"])
    assert not batch.stories and len(batch.rejected) == 2


def test_more_stories_than_anybody_renders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps(GOOD) + "\n") * 1001)
    (problem,) = load_storyboards(tmp_path).rejected
    assert problem.message == f"{tmp_path}/a.jsonl: 1001 storyboards in one file; allowed: at most 1000"


def test_names_that_no_terminal_can_show_are_escaped_and_others_load(tmp_path: Path) -> None:
    bad = changed(remove=("story_name",), zzz=1)
    names = [b"not utf8 \xff.json", b"red \x1b[31m.json", b"turned \xe2\x80\xae.json", b"two\nlines\r.json"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text(json.dumps(bad))
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    batch = load_storyboards(tmp_path)
    assert len(batch.stories) == 5 and not batch.rejected
    for story in batch.stories:
        said = "".join([story.story_id, story.name, *story.warnings])
        assert said.isprintable() and said.encode()
    assert {story.name for story in batch.stories} >= {"not utf8 \\udcff", "red \\x1b[31m", "turned \\u202e"}


def test_storyboards_with_the_structure_of_a_published_benchmark_load(tmp_path: Path) -> None:
    assert len(EPISODES) == 20
    for number in range(20):
        (tmp_path / f"episode{number:02d}.json").write_text(json.dumps(episode(number), ensure_ascii=False))
    batch = load_storyboards(tmp_path)
    assert len(batch.stories) == 20 and not batch.rejected
    for number, story in enumerate(batch.stories):
        written = [
            (prompt.strip(), cut)
            for scene in episode(number)["scenes"]
            for prompt, cut in zip(scene["video_prompts"], scene["cut"], strict=True)
        ]
        assert [(shot.prompt, shot.cut) for shot in story.shots] == written
        assert all(shot.entities == ("Mara",) for shot in story.shots)
        assert story.entities == (Entity(name="Mara", description="Sailmaker."),)
        (warning,) = story.warnings
        assert "'entity_" not in warning and "'action_descriptions'" in warning
