"""Every mistake in a storyboard gives one message that names file, scene, shot and what is allowed."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
SCENE_RULE = "scene_num, video_prompts, cut"
IGNORED = "first_frame_prompt, comment, notes"

CONTENT = {
    "missing story_name": (remove("story_name"), f": 'story_name' is missing; a storyboard needs {STORY_RULE}"),
    "missing story_overview": (
        remove("story_overview"),
        f": 'story_overview' is missing; a storyboard needs {STORY_RULE}",
    ),
    "missing scenes": (remove("scenes"), f": 'scenes' is missing; a storyboard needs {STORY_RULE}"),
    "missing scene_num": (
        remove_from_scene("scene_num"),
        f", scene 2: 'scene_num' is missing; a scene needs {SCENE_RULE}",
    ),
    "missing prompts": (
        remove_from_scene("video_prompts"),
        f", scene 2: 'video_prompts' is missing; a scene needs {SCENE_RULE}",
    ),
    "missing cut": (remove_from_scene("cut"), f", scene 2: 'cut' is missing; a scene needs {SCENE_RULE}"),
    "unknown key near a known one": (
        change(refrence_images=[]),
        ": unknown key 'refrence_images' (did you mean 'reference_images'?);"
        f" allowed in a storyboard: {STORY_RULE}, reference_images, seed, style, $schema, comment, notes",
    ),
    "unknown keys near none": (
        change(zzz=1, qqq=2),
        f": unknown key 'zzz' and 1 more; allowed in a storyboard: {STORY_RULE}, reference_images, seed, style,"
        " $schema, comment, notes",
    ),
    "unknown scene key": (
        change_scene(Cuts=[True]),
        f", scene 2: unknown key 'Cuts' (did you mean 'cut'?); allowed in a scene: {SCENE_RULE}, {IGNORED}",
    ),
    "story_name a number": (change(story_name=7), ": story_name is the number 7; allowed: text"),
    "story_name blank": (
        change(story_name=" \u200b"),
        ": story_name is empty; allowed: text with at least one visible character",
    ),
    "overview a list": (change(story_overview=["a"]), ": story_overview is a list of 1; allowed: text"),
    "style a truth value": (change(style=True), ": style is true; allowed: text"),
    "scenes an object": (
        change(scenes={"1": {}}),
        ": scenes is an object with '1'; allowed: a list of scenes",
    ),
    "scenes empty": (change(scenes=[]), ": scenes is empty; allowed: a list of scenes, at least one"),
    "scene a text": (
        lambda story: story["scenes"].append("third"),
        f", scene 3: a scene is the text 'third'; allowed: an object with {SCENE_RULE}",
    ),
    "scene_num a text": (
        change_scene(scene_num="2"),
        ", scene 2: scene_num is the text '2'; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num true": (
        change_scene(scene_num=True),
        ", scene 2: scene_num is true; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num NaN": (
        change_scene(scene_num=float("nan")),
        ", scene 2: scene_num is the number nan; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num a fraction": (
        change_scene(scene_num=2.0),
        ", scene 2: scene_num is the number 2.0; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num huge": (
        change_scene(scene_num=10**400),
        ", scene 2: scene_num is a number of more than 64 bits; allowed: a whole number from 0 to 1000000",
    ),
    "scene_num twice": (
        change_scene(scene_num=1),
        ", scene 2: scene_num 1 is taken by scene 1; allowed: a different number for each scene",
    ),
    "prompts a text": (
        change_scene(video_prompts="The sea."),
        ", scene 2: video_prompts is the text 'The sea.'; allowed: a list of texts, one prompt a shot",
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
    "cut a number": (change_scene(cut=[True, True, 1]), f", scene 2, shot 3: cut is the number 1; {CUT_RULE}"),
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


EMPTY = ": the file is empty; a storyboard holds story_name, story_overview and scenes"
DEEP = ": nested too deeply; a storyboard nests 4 levels"
TOO_LARGE = ": larger than 1 MiB, the most a storyboard may have"

FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.json", b"", EMPTY),
    "only white space": ("a.yaml", b" \n\t\n", EMPTY),
    "only a byte order mark": ("a.json", b"\xef\xbb\xbf", EMPTY),
    "another suffix": ("a.txt", b"{}", ": the suffix .txt is not a storyboard's; allowed: .json, .json5, .yaml, .yml"),
    "no suffix": ("a", b"{}", ": the suffix (none) is not a storyboard's; allowed: .json, .json5, .yaml, .yml"),
    "Windows-1252": (
        "a.json",
        b'{\n"story_name": "\x93quoted\x94"}',
        ": not UTF-8: byte 0x93 in line 2 (offset 17); save the file as UTF-8",
    ),
    "UTF-16": ("a.json", "{}".encode("utf-16"), ": this is UTF-16; save the file as UTF-8"),
    "a NUL byte": ("a.yaml", b"a: 1\nb: \0", ": a NUL byte in line 2; this is not a text file in UTF-8"),
    "a list": ("a.json", b"[1, 2]", f": a storyboard is a list of 2; allowed: an object with {STORY_RULE}"),
    "a number": ("a.json", b"NaN", f": a storyboard is the number nan; allowed: an object with {STORY_RULE}"),
    "broken JSON": (
        "a.json",
        b'{\n "story_name": "x"\n "scenes": []}',
        ": not valid JSON or JSON5, line 3, column 2: Expecting ',' delimiter",
    ),
    "JSON cut short": (
        "a.json",
        b'{"story_name": "x',
        ": not valid JSON or JSON5, line 1, column 18: Unexpected end of input",
    ),
    "broken JSON5": (
        "a.json5",
        b"{story_name: 'x',\n scenes: }",
        ': not valid JSON or JSON5, line 2, column 10: Unexpected "}"',
    ),
    "long JSON5": (
        "a.json5",
        b"{story_name: '" + b"x" * 40_000 + b"'}",
        ": not valid JSON, line 1, column 2: Expecting property name enclosed in double quotes (comments and trailing"
        " commas are allowed; the rest of JSON5, such as keys without quotes, only in files of up to 32 KiB)",
    ),
    "a key twice in JSON": ("a.json", b'{"seed": 1, "seed": 2}', ": the key 'seed' is written twice in one object"),
    "a key twice in JSON5": ("a.json5", b"{seed: 1, seed: 2}", ": the key 'seed' is written twice in one object"),
    "a key twice in YAML": (
        "a.yaml",
        b"style: a\nseed: 1\nseed: 2",
        ": line 3: the key 'seed' is written twice in one mapping",
    ),
    "deep JSON": ("a.json", b"[" * 200_000, DEEP),
    "deep JSON5": ("a.json5", b"/**/" + b"[" * 15_000 + b"x", DEEP),
    "deep YAML": ("a.yaml", b"[" * 1_000_000, ": line 1: nested too deeply; a storyboard nests 4 levels"),
    "deep block YAML": ("a.yaml", b"- " * 100_000, ": line 1: nested too deeply; a storyboard nests 4 levels"),
    "a YAML bomb": (
        "a.yaml",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        ": line 2: YAML aliases (*a) are not allowed; write the value out",
    ),
    "a YAML object": (
        "a.yaml",
        b"a: !!python/object/apply:os.system ['true']",
        ": not valid YAML, line 1, column 4: could not determine a constructor for the tag"
        " 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "two YAML documents": (
        "a.yaml",
        b"a: 1\n---\nb: 2",
        ": not valid YAML, line 2, column 1: but found another document",
    ),
    "broken YAML": ("a.yaml", b"a: [1, 2\n", ": not valid YAML, line 2, column 1: did not find expected ',' or ']'"),
    "an impossible YAML date": ("a.yaml", b"story_name: 2024-13-45", ": not valid YAML: month must be in 1..12"),
    "a YAML key that is no text": (
        "a.yaml",
        b"2024-01-01: x",
        f": unknown key 'a date'; allowed in a storyboard: {STORY_RULE}, reference_images, seed, style, $schema,"
        " comment, notes",
    ),
    "a number of 5000 digits": (
        "a.json",
        b'{"seed": ' + b"1" * 5000 + b"}",
        ": a number is too long: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits;"
        " use sys.set_int_max_str_digits() to increase the limit",
    ),
    "ten megabytes of letters": ("a.json", b"x" * 10_000_000, TOO_LARGE),
    "ten megabytes of noise": ("a.yaml", bytes(range(256)) * 40_000, TOO_LARGE),
}


@pytest.mark.parametrize("case", FILES)
def test_an_unreadable_file_is_explained(tmp_path: Path, case: str) -> None:
    name, raw, expected = FILES[case]
    path = tmp_path / name
    path.write_bytes(raw)
    assert message_for(path) == expected


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["a.json5", "a.yaml"])
@pytest.mark.parametrize(
    "unit", [b"/*", b'"', b"'", b",", b"a:", b"[]", b'{"a":', b"//\n", b"\\", b"\xe2\x80\x9c", b"- ", b"? ", b"&a "]
)
def test_just_under_the_size_limit_any_repetition_is_refused_without_hanging(
    tmp_path: Path, name: str, unit: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(unit * (2**20 // len(unit)))
    message_for(path)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    assert message_for(tmp_path / "a.json") == ": no such file"


def test_a_path_that_no_file_system_takes_is_explained(tmp_path: Path) -> None:
    assert message_for(tmp_path / ("x" * 300 + ".json")) == ": cannot be read: File name too long"
    with pytest.raises(StoryboardError) as caught:
        load_storyboard(tmp_path / "a\0.json")
    assert str(caught.value) == f"{tmp_path}/a\\x00.json: cannot be read: embedded null byte"


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert message_for(tmp_path / "a.json") == ": this is not a regular file"


IMAGE_RULE = "allowed: a readable PNG, JPEG, WEBP, BMP, TIFF file of at most 64 megapixels"


def truncated_png(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "a folder": (Path.mkdir, "is not a file"),
    "text": (lambda path: path.write_text("not an image"), "cannot be read (cannot identify image file"),
    "empty": (Path.touch, "cannot be read (cannot identify image file"),
    "truncated": (truncated_png, "cannot be read (image file is truncated"),
    "a format that runs programs": (
        lambda path: Image.new("RGB", (8, 8)).save(path, format="EPS"),
        "cannot be read (cannot identify image file",
    ),
    "too large": (
        lambda path: Image.new("1", (9000, 8000)).save(path),
        "has 9000 x 8000 pixels",
    ),
    "a decompression bomb": (
        lambda path: Image.new("1", (20000, 20000)).save(path),
        "cannot be read (Image size (400000000 pixels) exceeds limit",
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_unreadable_reference_image_is_explained(tmp_path: Path, case: str) -> None:
    make, problem = IMAGES[case]
    image = tmp_path / "face.png"
    make(image)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    path = tmp_path / "lamp.json"
    path.write_text(json.dumps(GOOD | {"reference_images": ["good.png", "face.png"]}))
    message = message_for(path)
    assert message.startswith(f": reference_images, entry 2: the image {image} {problem}")
    assert message.endswith(IMAGE_RULE)
