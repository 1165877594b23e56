"""The story that a valid storyboard becomes: shots, formats, style, reference images, story id."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from storymem_dist.errors import StoryboardError
from storymem_dist.story.images import open_reference_image
from storymem_dist.story.loading import load_storyboard, story_id_from

STORY = {
    "story_name": "The Lamp",
    "story_overview": "A keeper’s “last” night.",
    "scenes": [
        {"scene_num": 1, "video_prompts": ["She climbs.", "She lights it."], "cut": [False, False]},
        {"scene_num": 2, "video_prompts": ["The sea."], "first_frame_prompt": ["unused"], "cut": [True]},
    ],
}


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


def test_a_story_is_a_chain_of_shots_in_order(tmp_path: Path) -> None:
    story = load_storyboard(write(tmp_path / "lamp.json", STORY))

    assert (story.story_id, story.name, story.overview) == ("lamp", "The Lamp", "A keeper’s “last” night.")
    assert story.source == tmp_path / "lamp.json"
    assert [(s.index, s.index_in_scene, s.scene_num, s.prompt, s.shot_id) for s in story.shots] == [
        (0, 0, 1, "She climbs.", "shot_01"),
        (1, 1, 1, "She lights it.", "shot_02"),
        (2, 0, 2, "The sea.", "shot_03"),
    ]
    assert (story.seed, story.style, story.reference_images) == (None, "", ())


def test_the_first_shot_is_a_cut_by_position_whatever_the_file_says(tmp_path: Path) -> None:
    story = load_storyboard(write(tmp_path / "lamp.json", STORY))
    assert [shot.cut for shot in story.shots] == [True, False, True]


@pytest.mark.parametrize(("written", "meant"), [("true", True), ("True", True), (" FALSE ", False), ("false", False)])
def test_cut_may_be_written_as_text_in_any_case(tmp_path: Path, written: str, meant: bool) -> None:
    scenes = [{"scene_num": 1, "video_prompts": ["one", "two"], "cut": [True, written]}]
    assert load_storyboard(write(tmp_path / "a.json", STORY | {"scenes": scenes})).shots[1].cut is meant


JSON5 = """// A comment, then: "quoted" text, // and /* more */
{
  story_name: 'The Lamp',
  "story_overview": "A keeper\\
 waits. // not a comment, nor ,] a trailing comma",
  scenes: [{scene_num: 0x1, video_prompts: ["one",], cut: [true,],},],
}
"""
COMMENTED = """{ // the usual JSON5: comments and trailing commas
  "story_name": "The Lamp", /* a
  block */ "story_overview": "http://sea /* no comment */ ,]",
  "scenes": [{"scene_num": 1, "video_prompts": ["one", ], "cut": [true, /* last */ ],}, ],
}
"""
YAML = """
story_name: The Lamp
story_overview: ""
seed: 7
scenes:
  - scene_num: 1
    video_prompts:
      - >-
        one
        more
    cut: [yes]
"""


@pytest.mark.parametrize("name", ["a.json", "a.json5", "a.JSON5"])
def test_json5_is_read_whatever_the_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(JSON5)
    story = load_storyboard(path)
    assert story.overview == "A keeper waits. // not a comment, nor ,] a trailing comma"
    assert [shot.prompt for shot in story.shots] == ["one"]


def test_comments_and_trailing_commas_do_not_touch_texts_and_need_no_json5_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("json5.loads", None)
    path = tmp_path / "a.json"
    path.write_text(COMMENTED)
    story = load_storyboard(path)
    assert story.overview == "http://sea /* no comment */ ,]"
    assert [shot.prompt for shot in story.shots] == ["one"]


@pytest.mark.parametrize("name", ["a.yaml", "a.yml"])
def test_yaml_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(YAML)
    story = load_storyboard(path)
    assert (story.seed, story.shots[0].prompt) == (7, "one more")


def test_the_three_formats_of_one_story_load_to_the_same_shots(tmp_path: Path) -> None:
    as_json = write(tmp_path / "a.json", STORY)
    as_json5 = write(tmp_path / "b.json5", STORY)
    as_yaml = tmp_path / "c.yaml"
    as_yaml.write_text(yaml.safe_dump(STORY, allow_unicode=True), encoding="utf-8")
    assert load_storyboard(as_json).scenes == load_storyboard(as_json5).scenes == load_storyboard(as_yaml).scenes


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(STORY), encoding="utf-8-sig")
    assert load_storyboard(path).name == "The Lamp"


def test_the_style_is_put_before_every_prompt(tmp_path: Path) -> None:
    story = load_storyboard(write(tmp_path / "a.json", STORY | {"style": " Watercolor. "}))
    assert [shot.prompt for shot in story.shots] == [
        "Watercolor. She climbs.",
        "Watercolor. She lights it.",
        "Watercolor. The sea.",
    ]


def test_null_means_left_out_for_the_optional_keys(tmp_path: Path) -> None:
    extra = {"seed": None, "style": None, "reference_images": None}
    story = load_storyboard(write(tmp_path / "a.json", STORY | extra))
    assert (story.seed, story.style, story.reference_images) == (None, "", ())


def test_reference_images_are_found_next_to_the_storyboard_from_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    Image.new("RGB", (8, 6), "navy").save(tmp_path / "in/pictures/ship.jpg")
    write(tmp_path / "in/a.json", STORY | {"reference_images": ["pictures/ship.jpg"]})
    monkeypatch.chdir(tmp_path)
    assert load_storyboard("in/a.json").reference_images == (tmp_path / "in/pictures/ship.jpg",)


def test_a_reference_image_is_read_upright_with_white_behind_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    Image.new("RGB", (8, 6), "navy").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_reference_image(tmp_path / "turned.jpg").size == (6, 8)
    assert open_reference_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("stem", "story_id"),
    [
        ("robot", "robot"),
        ("The Robot's 1st/friend", "The_Robot_s_1st_friend"),
        ("../../etc", "_.._etc"),
        ("...", "story"),
        ("蒼い海", "蒼い海"),
        ("\udcff", "_"),
    ],
)
def test_a_story_id_is_safe_as_a_folder_name(stem: str, story_id: str) -> None:
    assert story_id_from(stem) == story_id


def test_long_stems_keep_distinct_short_ids() -> None:
    first, second = story_id_from("海" * 80 + "a"), story_id_from("海" * 80 + "b")
    assert first != second
    assert max(len(first.encode()), len(second.encode())) <= 96


def test_load_storyboard_refuses_a_folder(tmp_path: Path) -> None:
    (tmp_path / "stories.json").mkdir()
    with pytest.raises(StoryboardError, match=r"stories\.json: this is a folder; give one storyboard file"):
        load_storyboard(tmp_path / "stories.json")
