"""The published JSON schema is what the code makes; it refuses what the code refuses by type, and what it warns of."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from storymem_dist.errors import StoryboardError
from storymem_dist.story import json_schema
from storymem_dist.story.keys import ENTITY, LORA_KEYS, REFERENCE, SCENE, SHOT, STORY, Keys
from storymem_dist.story.loading import load_storyboard
from storymem_dist.weights.lora.settings import LoraSettings
from tests.helpers.benchmark_episodes import episode
from tests.helpers.shot_story import STORY as FULL_STORY
from tests.helpers.shot_story import write_files

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT / "docs" / "storyboard.schema.json"
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
SCHEMA = json_schema.storyboard_schema()
VALIDATOR = Draft7Validator(SCHEMA)

FULL = yaml.safe_load(FULL_STORY.replace(", sky]", "]").replace("The sea.\n        shot_id", "The sea.\n        name"))


def test_the_published_schema_is_what_the_code_makes() -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert PUBLISHED.read_text(encoding="utf-8") == json_schema.as_text(), (
        "python -m storymem_dist.story.json_schema > docs/storyboard.schema.json"
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


def test_a_storyboard_of_all_keys_and_one_of_a_benchmark_are_valid() -> None:
    VALIDATOR.validate(FULL)
    further = ("_window_shot_ids", "_num_scenes", "_name_map")
    document = {key: value for key, value in episode(4).items() if key not in further}
    for scene in document["scenes"]:
        del scene["action_descriptions"]
    VALIDATOR.validate(document)


def definition(*path: str) -> dict[str, Any]:
    part: Any = SCHEMA
    for key in path:
        part = part[key]
    return part


REFERENCE_SCHEMA = definition("definitions", "shot", "properties", "references", "items", "anyOf")[1]


@pytest.mark.parametrize(
    ("keys", "schema"),
    [
        (STORY, SCHEMA),
        (SCENE, definition("definitions", "scene")),
        (SHOT, definition("definitions", "shot")),
        (ENTITY, definition("definitions", "entity")),
        (REFERENCE, REFERENCE_SCHEMA),
    ],
    ids=["story", "scene", "shot", "entity", "reference"],
)
def test_the_schema_has_the_keys_that_are_read(keys: Keys, schema: dict[str, Any]) -> None:
    read = {*keys.expected, *keys.optional, *keys.ignored, *keys.pictured, *keys.also}
    assert set(schema["properties"]) == read


def test_the_keys_of_a_lora_are_those_of_its_settings() -> None:
    fields = {field.name for field in dataclasses.fields(LoraSettings)}
    assert set(LORA_KEYS) == fields == set(definition("definitions", "lora", "properties"))


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 7, 7.0, 2.5, 1e9, "", " ", "text", "True", "a\nb"),
    *([], [7], [True], [None], ["text", 7], [[]], [{}], {}, {"a": 1}, {"a": "b"}, {"path": 7}, {"high": 1}),
]
PLACES: list[tuple[Any, ...]] = [
    *((key,) for key in FULL),
    ("defaults", "num_inference_steps"),
    ("defaults", "guidance"),
    ("defaults", "negative_prompt"),
    ("entities", "Mira"),
    ("entities", "Mira", "description"),
    ("entities", "Mira", "references"),
    ("entities", "Mira", "references", 0),
    ("scenes", 0),
    ("scenes", 0, "scene_num"),
    ("scenes", 0, "shots"),
    ("scenes", 0, "shots", 0),
    *(("scenes", 0, "shots", 0, key) for key in FULL["scenes"][0]["shots"][0]),
    *(("scenes", 0, "shots", 1, key) for key in FULL["scenes"][0]["shots"][1]),
    *(("scenes", 1, "shots", 0, key) for key in FULL["scenes"][1]["shots"][0]),
    *(("scenes", 1, "shots", 1, key) for key in FULL["scenes"][1]["shots"][1]),
    ("scenes", 1, "shots", 1, "references", 0),
    ("scenes", 1, "shots", 1, "references", 1, "path"),
    ("scenes", 1, "shots", 1, "references", 1, "sink"),
    *(("scenes", 1, "shots", 1, "loras", 1, key) for key in ("path", "expert", "strength")),
]

NOT_BY_TYPE = (
    *(
        "is no shot",
        "does not exist",
        "is not a file",
        "is missing; a shot needs",
        "holds the character",
        "a later shot",
    ),
    *("says how a shot is rendered", "names references, and", "is not in the story's entities", "is read as"),
    *("cannot be read", "are both given", "is the id of", "start_image is given for", "keyframes do not enter"),
)
"""What depends on other values, on files or on single characters."""


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_what_the_code_refuses_by_type_the_schema_refuses_and_what_it_reads_is_valid(
    tmp_path: Path, place: tuple[Any, ...]
) -> None:
    folder = write_files(tmp_path)
    for value in VALUES:
        document = copy.deepcopy(FULL)
        part = document
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
        (folder / "a.json").write_text(json.dumps(document))
        errors = [error.message for error in VALIDATOR.iter_errors(document)]
        try:
            story = load_storyboard(folder / "a.json")
        except StoryboardError as error:
            if not any(words in str(error) for words in NOT_BY_TYPE):
                assert errors, f"{value!r} is refused by the code alone: {error}"
        else:
            if not story.warnings:
                assert not errors, f"{value!r} is refused by the schema alone: {errors}"


@pytest.mark.parametrize(
    "change",
    [
        lambda story: story.update(refrence_images=[]),
        lambda story: story["scenes"][0]["shots"][0].update(seconds=3),
        lambda story: story["scenes"][0].update(video_prompts=["a"]),
        lambda story: story["scenes"][0].update(cut=[True]),
        lambda story: story["scenes"][1]["shots"][1]["loras"][1].update(weight=1),
        lambda story: story["defaults"].update(name="x"),
        lambda story: story["entities"]["Mira"].update(look="x"),
    ],
    ids=["story", "shot", "both forms", "cut and shots", "LoRA", "defaults", "entity"],
)
def test_a_key_that_has_no_place_is_marked(change: Any) -> None:
    document = copy.deepcopy(FULL)
    change(document)
    assert list(VALIDATOR.iter_errors(document))
