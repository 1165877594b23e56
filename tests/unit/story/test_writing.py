"""A story as a document for another process: reading it gives the same story."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from storymem_dist.artifacts.video import write_png
from storymem_dist.resources import assets_folder
from storymem_dist.story.loading import load_storyboard, load_storyboards
from storymem_dist.story.schema import Story
from storymem_dist.story.writing import story_document


def read_again(story: Story, folder: Path) -> Story:
    path = folder / f"{story.story_id}.json"
    path.write_text(json.dumps(story_document(story)))
    return load_storyboard(path)


def without_place(story: Story) -> Story:
    return replace(story, source=None, warnings=(), style="", priority=0)


EXAMPLES = [
    story for folder in ("", "nano") for story in load_storyboards(str(assets_folder("examples") / folder)).stories
]


@pytest.mark.parametrize("story", EXAMPLES, ids=lambda story: story.story_id)
def test_examples_are_read_as_they_were(story: Story, tmp_path: Path) -> None:
    assert without_place(read_again(story, tmp_path)) == without_place(story)


def test_every_key_of_a_shot_survives(tmp_path: Path) -> None:
    import torch

    for name in ("a", "b", "c"):
        write_png(tmp_path / f"{name}.png", torch.zeros(3, 16, 16, dtype=torch.uint8))
    (tmp_path / "l.safetensors").write_bytes(b"")
    shots = [
        {"prompt": "one", "name": "den", "seed": 0, "num_frames": 17, "guidance": [4, 3], "negative_prompt": ""},
        {"prompt": "two", "cut": False, "duration": 2.5, "num_inference_steps": 7, "remember": False},
        {"prompt": "three", "start_image": "a.png", "references": ["b.png", {"path": "c.png", "sink": True}]},
        {"prompt": "four", "entities": ["fox", "crow"], "recall": ["den", "references"]},
        {"prompt": "five", "recall": "none", "loras": [{"path": "l.safetensors", "strength": 0.5}]},
        {"prompt": "six", "shot_id": 1},
        {"prompt": "seven", "shot_id": 1},
    ]
    entities = [{"name": "fox", "description": "red", "references": ["a.png"]}]
    document = {
        "story_name": "All",
        "story_overview": "of it",
        "style": "oil painting.",
        "seed": 5,
        "reference_images": ["a.png", "b.png"],
        "entities": entities,
        "defaults": {"num_inference_steps": 9},
        "scenes": [{"scene_num": 3, "shots": shots[:4]}, {"scene_num": 7, "shots": shots[4:]}],
    }
    (tmp_path / "all.json").write_text(json.dumps(document))
    story = load_storyboard(tmp_path / "all.json")
    (tmp_path / "elsewhere").mkdir()
    assert without_place(read_again(story, tmp_path / "elsewhere")) == without_place(story)
