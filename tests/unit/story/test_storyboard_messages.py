"""Every mistake in a storyboard gives one message that names file, scene, shot and what is allowed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboard

GOOD: dict[str, Any] = {
    "story_name": "The Lamp",
    "story_overview": "A night.",
    "scenes": [
        {"scene_num": 1, "video_prompts": ["She climbs.", "She lights it."], "cut": [True, False]},
        {"scene_num": 2, "video_prompts": ["The sea.", "The boat.", "Dawn."], "cut": [True, False, True]},
    ],
}


def message_for(path: Path) -> str:
    with pytest.raises(StoryboardError) as caught:
        load_storyboard(path)
    message = str(caught.value)
    assert message.startswith(f"{path}") and "\n" not in message and len(message) < 600, message
    return message.removeprefix(str(path))


def change(**keys: object) -> Callable[[dict[str, Any]], object]:
    return lambda story: story.update(keys)


def change_scene(**keys: object) -> Callable[[dict[str, Any]], object]:
    return lambda story: story["scenes"][1].update(keys)


def remove(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda story: story.pop(key)


def remove_from_scene(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda story: story["scenes"][1].pop(key)


CUT_RULE = "allowed: true (a cut) or false (continues the shot before it)"
STORY_RULE = "story_name, story_overview, scenes"
OPTIONAL = "reference_images, seed, style, defaults, entities"
SCENE_RULE = "scene_num, video_prompts, cut"
NAME_RULE = "allowed: one line of text without control characters and characters that change its direction"

CONTENT = {
    "missing scenes": (remove("scenes"), f": 'scenes' is missing; a storyboard needs {STORY_RULE}"),
    "missing prompts": (
        remove_from_scene("video_prompts"),
        f", scene 2: 'video_prompts' is missing; a scene needs {SCENE_RULE}, or shots in place of the last two",
    ),
    "missing cut of several shots": (
        remove_from_scene("cut"),
        ", scene 2: cut is missing, so nothing says which of the 3 shots continue the one before them;"
        ' write for example "cut": [true, false, false], one for each prompt',
    ),
    "missing cut of several shots, and a key that is almost cut": (
        lambda story: story["scenes"][1].update(cutt=story["scenes"][1].pop("cut")),
        ", scene 2: cut is missing, so nothing says which of the 3 shots continue the one before them;"
        ' write for example "cut": [true, false, false], one for each prompt',
    ),
    "a required key that is almost there": (
        lambda story: story["scenes"][1].update(video_prompt=story["scenes"][1].pop("video_prompts")),
        ", scene 2: 'video_prompts' is missing; did you mean it by 'video_prompt'?",
    ),
    "one key in two spellings": (
        change(Scenes=[]),
        ": the keys 'scenes' and 'Scenes' are both 'scenes'; keep one of them",
    ),
    "unknown key near a known one": (
        change(refrence_images=[]),
        ": unknown key 'refrence_images' (did you mean 'reference_images'?);"
        f" correct or remove it; a storyboard has {STORY_RULE} and optionally {OPTIONAL}",
    ),
    "an optional key in another spelling": (
        change(Seed=7),
        ": unknown key 'Seed' (did you mean 'seed'?); correct or remove it; a storyboard has"
        f" {STORY_RULE} and optionally {OPTIONAL}",
    ),
    "a name of two lines": (change(story_name="The\nLamp"), f": story_name holds the character U+000A; {NAME_RULE}"),
    "a name that turns around": (
        change(story_name="a\u202egpj.exe"),
        f": story_name holds the character U+202E; {NAME_RULE}",
    ),
    "a name that hides a line": (
        change(story_name="a\u2028b"),
        f": story_name holds the character U+2028; {NAME_RULE}",
    ),
    "a name with an escape character": (
        change(story_name="a\x1b[2Jb"),
        ": story_name holds the control character U+001B; allowed: printable text",
    ),
    "story_name a number": (change(story_name=7), ": story_name is the number 7; allowed: text"),
    "story_name blank": (
        change(story_name=" \u200b"),
        ": story_name is empty; allowed: text with at least one visible character",
    ),
    "overview a list": (change(story_overview=["a"]), ": story_overview is a list of 1; allowed: text"),
    "style a truth value": (change(style=True), ": style is true; allowed: text"),
    "scenes an object": (
        change(scenes={"first": {}, "second": {}}),
        ": scenes is an object with the keys 'first', 'second'; allowed: a list of scenes, or an object whose keys"
        " are their numbers in rising order (scene_1, scene_2, ...)",
    ),
    "scenes an object in another order": (
        change(scenes={"scene_2": {}, "scene_1": {}}),
        ": scenes is an object with the keys 'scene_2', 'scene_1'; allowed: a list of scenes, or an object whose keys"
        " are their numbers in rising order (scene_1, scene_2, ...)",
    ),
    "scenes empty": (change(scenes=[]), ": scenes is empty; allowed: a list of scenes, at least one"),
    "scene a text": (
        lambda story: story["scenes"].append("third"),
        f", scene 3: a scene is the text 'third'; allowed: an object with {SCENE_RULE}",
    ),
    "scene_num true": (
        change_scene(scene_num=True),
        ", scene 2: scene_num is true; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num NaN": (
        change_scene(scene_num=float("nan")),
        ", scene 2: scene_num is the number nan; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num huge": (
        change_scene(scene_num=10**400),
        ", scene 2: scene_num is a number of 401 digits; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num twice": (
        change_scene(scene_num=1),
        ", scene 2: scene_num 1 is taken by scene 1; allowed: a different number for each scene",
    ),
    "prompts a text": (
        change_scene(video_prompts="The sea."),
        ", scene 2: video_prompts has 1 entries and cut has 3; allowed: exactly one cut for each prompt",
    ),
    "prompts empty": (
        change_scene(video_prompts=[], cut=[]),
        ", scene 2: video_prompts is empty; allowed: a list of texts, one prompt a shot, at least one",
    ),
    "cut not a list": (
        change_scene(cut=True),
        ", scene 2: cut is true; allowed: a list of true or false, one a shot",
    ),
    "different lengths": (
        change_scene(cut=[True]),
        ", scene 2: video_prompts has 3 entries and cut has 1; allowed: exactly one cut for each prompt",
    ),
    "a scene number that is not the position": (
        change_scene(scene_num=40, cut=[True]),
        ", scene 2 (scene_num 40): video_prompts has 3 entries and cut has 1; allowed: exactly one cut for each prompt",
    ),
    "prompt empty": (
        change_scene(video_prompts=["The sea.", "The boat.", "  \n"]),
        ", scene 2, shot 3: the prompt is empty; allowed: text with at least one visible character",
    ),
    "prompt null": (
        change_scene(video_prompts=["The sea.", None, "Dawn."]),
        ", scene 2, shot 2: the prompt is empty (null); allowed: text",
    ),
    "prompt too long": (
        change_scene(video_prompts=["The sea.", "x" * 10_001, "Dawn."]),
        ", scene 2, shot 2: the prompt has 10001 characters; allowed: at most 10000",
    ),
    "prompt with a NUL": (
        change_scene(video_prompts=["The sea.", "a\0b", "Dawn."]),
        ", scene 2, shot 2: the prompt holds the control character U+0000; allowed: printable text",
    ),
    "prompt with half a surrogate pair": (
        change_scene(video_prompts=["The sea.", "a\ud83d", "Dawn."]),
        ", scene 2, shot 2: the prompt holds the control character U+D83D; allowed: printable text",
    ),
    "cut a word": (
        change_scene(cut=[True, "maybe", True]),
        f", scene 2, shot 2: cut is the text 'maybe'; {CUT_RULE}",
    ),
    "cut null": (change_scene(cut=[None, True, True]), f", scene 2, shot 1: cut is empty (null); {CUT_RULE}"),
    "seed a text": (
        change(seed="7"),
        ": seed is the text '7'; allowed: a whole number from 0 to 9223372036854775807",
    ),
    "seed negative": (
        change(seed=-1),
        ": seed is the number -1; allowed: a whole number from 0 to 9223372036854775807",
    ),
    "seed too large": (
        change(seed=2**63),
        ": seed is the number 9223372036854775808; allowed: a whole number from 0 to 9223372036854775807",
    ),
    "reference_images a text": (
        change(reference_images="a.png"),
        ": reference_images is the text 'a.png'; allowed: a list of paths, relative to the storyboard",
    ),
    "reference image a number": (
        change(reference_images=[1]),
        ": reference_images, entry 1, is the number 1; allowed: text",
    ),
    "reference images without end": (
        change(reference_images=["a.png"] * 65),
        ": reference_images has 65 entries; allowed: at most 64",
    ),
}


@pytest.mark.parametrize("case", CONTENT)
def test_wrong_content_is_explained(tmp_path: Path, case: str) -> None:
    spoil, expected = CONTENT[case]
    story = copy.deepcopy(GOOD)
    spoil(story)
    path = tmp_path / "lamp.json"
    path.write_text(json.dumps(story))
    assert message_for(path) == expected
