"""What ``docs/storyboards.md`` shows can be loaded, and it names every key of a shot."""

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from PIL import Image

from storymem_dist.story.json_schema import storyboard_schema
from storymem_dist.story.keys import SHOT
from storymem_dist.story.loading import load_storyboard, load_storyboards
from tests.unit.docs.markdown import ROOT, blocks_of, table_of

PAGE = ROOT / "docs" / "storyboards.md"
KEYS = ROOT / "examples" / "keys"
BLOCKS = blocks_of(PAGE, "yaml")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_storyboard_of_the_page_loads_without_warnings(tmp_path: Path, number: int) -> None:
    text = BLOCKS[number].text
    for name in re.findall(r"\w+\.png", text):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "story.yaml").write_text(text)
    assert load_storyboard(tmp_path / "story.yaml").warnings == ()


def test_the_list_of_the_page_loads(tmp_path: Path) -> None:
    (block,) = blocks_of(PAGE, "json")
    (tmp_path / "urgent").mkdir()
    for name in ("night.yaml", "urgent/now.json"):
        (tmp_path / name).write_text(
            json.dumps({"story_name": name, "scenes": [{"scene_num": 1, "shots": ["The sea."]}]})
        )
    (tmp_path / "list.jsonl").write_text(block.text)
    batch = load_storyboards(tmp_path / "list.jsonl")
    assert [(story.story_id, story.priority) for story in batch.stories] == [
        ("night", 0),
        ("night_again", 0),
        ("now", -1),
        ("list-4", 2),
    ] and not batch.rejected


def test_the_table_has_every_key_of_a_shot() -> None:
    listed = {name for keys, _ in table_of(PAGE, "key") for name in re.findall(r"`(\w+)`", keys)}
    assert listed == {*SHOT.expected, *SHOT.optional}


def test_the_examples_of_the_page_load_and_use_every_key() -> None:
    story = load_storyboard(KEYS / "two_friends.yaml")
    assert story.warnings == () and len(story.shots) == 7
    text = (KEYS / "two_friends.yaml").read_text()
    assert all(re.search(rf"\b{key}:", text) for key in (*SHOT.expected, *SHOT.optional))
    assert [one.story_id for one in load_storyboards(KEYS / "list.jsonl").stories] == ["red_ball", "friends_first"]
    assert len(load_storyboards(KEYS / "prompts.txt").stories) == 2
    Draft7Validator.check_schema(storyboard_schema())
