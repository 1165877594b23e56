"""What YAML would take out of a prompt, or take for something else than text, is refused with its line and the cure."""

import json
from pathlib import Path

import pytest

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboard

FILE = """story_name: The Lamp
# a comment on its own line is fine
style: Warm film.   # and so is one after the style
scenes:
  - scene_num: 1          # after a number
    video_prompts:        # after a key
      - {prompt}
      - A sea.
    cut: [true, false]    # after a list
"""
LINE = 7
QUOTES = "put the prompt in quotes"
IF_PROMPT = f"if this is a prompt, {QUOTES}"


def load(tmp_path: Path, prompt: str) -> tuple[str, tuple[str, ...]]:
    path = tmp_path / "lamp.yaml"
    path.write_text(FILE.replace("{prompt}", prompt), encoding="utf-8")
    story = load_storyboard(path)
    return story.shots[0].prompt.removeprefix("Warm film. "), story.warnings


REFUSED = {
    "She climbs # slowly": "YAML takes '# slowly' for a comment, not for a part of the prompt",
    "She climbs\t#slowly": "YAML takes '#slowly' for a comment, not for a part of the prompt",
    "🎬 é # 海": "YAML takes '# 海' for a comment, not for a part of the prompt",
    "A keeper: he climbs": "the prompt is an object with 'A keeper'",
    "[wide shot] A man": "the prompt is a list",
    "[wide shot]": "the prompt is a list",
    "{wide} A man": "the prompt is an object with 'wide'",
    "- A man": "the prompt is a list",
    "? A man": "the prompt is an object with 'A man'",
    "&hero walks": "YAML takes &hero out of the prompt",
    "!wow A man": "YAML takes !wow out of the prompt",
    "! A man": "YAML takes ! out of the prompt",
    "!!int 7": "YAML takes tag:yaml.org,2002:int out of the prompt",
    "yes": "the prompt is true",
    "No": "the prompt is false",
    "null": "the prompt is empty (null)",
    "~": "the prompt is empty (null)",
    "#hashtag": "the prompt is empty (null)",
    "42": "the prompt is the number 42",
    "1_000.5": "the prompt is the number 1000.5",
    "12:30:00": "the prompt is the number 45000",
    "2024-01-01": "the prompt is the date '2024-01-01'",
    "2024-13-45": "the prompt is the date '2024-13-45'",
    "prompt: A man # slowly": "YAML takes '# slowly' for a comment, not for a part of the prompt",
    "{prompt: A man, walking slowly}": "YAML takes 'walking slowly' out of the prompt",
    "text:": "the prompt is empty (null)",
}


@pytest.mark.parametrize("prompt", REFUSED)
def test_what_yaml_takes_for_something_else_is_refused(tmp_path: Path, prompt: str) -> None:
    with pytest.raises(StoryboardError) as caught:
        load(tmp_path, prompt)
    assert str(caught.value) == f"{tmp_path}/lamp.yaml: line {LINE}: {REFUSED[prompt]}; {QUOTES}"


@pytest.mark.parametrize(
    "prompt",
    [
        "*star",
        '"Run" she says',
        "@home",
        "`tick`",
        "%percent",
        "| text",
        "> text",
        "'don't'",
        "a\n      b: c: d",
    ],
)
def test_what_yaml_cannot_read_is_refused_with_the_line_and_the_cure(tmp_path: Path, prompt: str) -> None:
    with pytest.raises(StoryboardError) as caught:
        load(tmp_path, prompt)
    message = str(caught.value)
    assert message.endswith(IF_PROMPT) and message.isprintable() and len(message) < 400
    assert f"line {LINE}" in message or f"line {LINE + 1}" in message, message


@pytest.mark.parametrize("prompt", ['"a\\qb"', '"a \\ud83c\\udfac"'])
def test_an_escape_that_yaml_does_not_know_has_its_own_cure(tmp_path: Path, prompt: str) -> None:
    with pytest.raises(StoryboardError) as caught:
        load(tmp_path, prompt)
    assert str(caught.value).endswith(
        "; between double quotes, write \\\\ for a backslash, and characters themselves instead of codes"
    )


def test_json_that_yaml_does_not_read_is_read_in_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "lamp.yaml"
    scenes = [{"scene_num": 1, "video_prompts": ["The film \N{CLAPPER BOARD} rolls."], "cut": [True]}]
    path.write_text(json.dumps({"story_name": "x", "scenes": scenes}))
    story = load_storyboard(path)
    assert (story.shots[0].prompt, story.warnings) == ("The film \N{CLAPPER BOARD} rolls.", ())


@pytest.mark.parametrize(("written", "number"), [("010", 8), ("0x1F", 31), ("1:30", 90), ("1_0", 10)])
def test_a_number_that_yaml_reads_as_another_one_has_a_warning(tmp_path: Path, written: str, number: int) -> None:
    path = tmp_path / "lamp.yaml"
    path.write_text(f"story_name: x\nscenes:\n- scene_num: {written}\n  video_prompts: [a]\n  cut: [true]\n")
    story = load_storyboard(path)
    assert story.scenes[0].scene_num == number
    assert story.warnings == (f"{path}: line 3: YAML reads {written!r} as the number {number}",)


@pytest.mark.parametrize("written", ["1", "01", "+7", "0"])
def test_a_number_with_one_meaning_has_none(tmp_path: Path, written: str) -> None:
    path = tmp_path / "lamp.yaml"
    path.write_text(f"story_name: x\nscenes: [{{scene_num: {written}, video_prompts: [a], cut: [true]}}]\n")
    assert load_storyboard(path).warnings == ()


def test_one_prompt_as_text_is_guarded_too(tmp_path: Path) -> None:
    path = tmp_path / "lamp.yaml"
    path.write_text("scenes:\n- video_prompts: She climbs # slowly\n")
    with pytest.raises(StoryboardError, match=f"line 2: YAML takes '# slowly' for a comment.*; {QUOTES}"):
        load_storyboard(path)
    path.write_text("scenes:\n- Video Prompts: [She climbs, yes]\n")
    with pytest.raises(StoryboardError, match=f"line 2: the prompt is true; {QUOTES}"):
        load_storyboard(path)


READ = {
    "She climbs.": "She climbs.",
    "'She climbs # slowly'   # in one go": "She climbs # slowly",
    '"A keeper: he climbs"': "A keeper: he climbs",
    "C# and a#b": "C# and a#b",
    "|\n        She climbs # slowly": "She climbs # slowly",
    "She climbs\n        slowly": "She climbs slowly",
    "!!str 42": "42",
    "<<": "<<",
    "=": "=",
    "08:15 in the morning": "08:15 in the morning",
    "1:2:" + "3:" * 30 + "x": "1:2:" + "3:" * 30 + "x",
}


@pytest.mark.parametrize("prompt", READ)
def test_what_yaml_takes_for_text_is_read(tmp_path: Path, prompt: str) -> None:
    assert load(tmp_path, prompt) == (READ[prompt], ())


def test_a_text_that_ends_before_a_hash_tag_has_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "lamp.yaml"
    path.write_text(
        "story_name: x\nstyle: Neon #cyberpunk\nscenes: [{scene_num: 1, video_prompts: [a], cut: [true]}]\n"
    )
    story = load_storyboard(path)
    assert story.style == "Neon"
    assert story.warnings == (
        f"{path}: line 2: YAML takes '#cyberpunk' for a comment; put the text of style in quotes",
    )


def test_values_that_no_storyboard_uses_do_not_refuse_it(tmp_path: Path) -> None:
    path = tmp_path / "lamp.yaml"
    path.write_text(
        "story_name: x\ncreated: 2024-13-45\nnumber: " + "9" * 400 + "\ntime: 1:2:3.5\n2024-01-01: a date\n"
        "scenes: [{scene_num: 1, video_prompts: [a], cut: [true]}]\n"
    )
    (warning,) = load_storyboard(path).warnings
    assert warning == f"{path}: unknown keys are not used: 'created', 'number', 'time', '2024-01-01'"
