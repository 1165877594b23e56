"""The storyboard format as a JSON schema (draft 7), for editors: ``python -m storymem_dist.story.json_schema``.

Describes the format itself. What is read with a warning, such as a prompt as text in place of a list, and unknown keys,
are marked by an editor, too. What depends on other values or on files (the names in ``recall``, a missing picture) is
found when a storyboard is loaded.
"""

import json
from collections.abc import Mapping
from typing import Any

from storymem_dist.story.checking import MAX_REFERENCE_IMAGES, MAX_SCENE_NUM, MAX_SHOTS
from storymem_dist.story.entities import MAX_ENTITIES, MAX_REFERENCES
from storymem_dist.story.keys import ENTITY, LORA_KEYS, REFERENCE, SCENE, SHOT, STORY, Keys
from storymem_dist.story.shots import (
    MAX_ENTRIES,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_RECALLED,
    MAX_SECONDS,
    MAX_STEPS,
    OF_ONE_SHOT,
)
from storymem_dist.story.values import MAX_NAME_CHARACTERS, MAX_PROMPT_CHARACTERS, MAX_SEED
from storymem_dist.terminal.program import Parser
from storymem_dist.terminal.streams import print_text

Schema = dict[str, Any]

_VISIBLE = r"\S"
_ANYTHING: Schema = {}
_NOT_USED: Schema = {"description": "A text for an image model; it is not used."}
_WORD_OF_TRUTH = r"^\s*([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee])\s*$"


def storyboard_schema() -> Schema:
    """Return the schema of one storyboard."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Storyboard of storymem_dist",
        **_object(STORY, _story(), required=("story_name", "scenes")),
        "definitions": {
            "scene": _scene(),
            "shot": _object(SHOT, _shot()),
            "defaults": _object(SHOT, {key: value for key, value in _shot().items() if key not in OF_ONE_SHOT}),
            "entity": _object(ENTITY, _entity()),
            "lora": {
                "type": "object",
                "properties": _lora(),
                "required": ["path"],
                "additionalProperties": False,
            },
        },
    }


def as_text() -> str:
    """The schema as it is published, in ``docs/storyboard.schema.json``."""
    return json.dumps(storyboard_schema(), indent=1, ensure_ascii=False) + "\n"


def _object(keys: Keys, properties: Mapping[str, Schema], required: tuple[str, ...] | None = None) -> Schema:
    """An object with these keys; ``comment`` and the others that are ignored may be anything."""
    all_properties = {
        **properties,
        **dict.fromkeys(keys.pictured, _NOT_USED),
        **{theirs: properties[ours] for theirs, ours in keys.also.items() if theirs != ours and ours in properties},
        **dict.fromkeys(keys.ignored, _ANYTHING),
    }
    schema: Schema = {"type": "object", "properties": all_properties, "additionalProperties": False}
    needed = keys.required if required is None else required
    return schema | ({"required": list(needed)} if needed else {})


def _story() -> dict[str, Schema]:
    names = _list(_line("What is seen."), MAX_ENTITIES)
    return {
        "story_name": _line("The name of the story.", most=MAX_PROMPT_CHARACTERS),
        "story_overview": _or_null(_text("What the story is about; nothing is rendered from it.", may_be_empty=True)),
        "style": _or_null(_text("Put before every prompt.", may_be_empty=True)),
        "seed": _or_null(_integer("Over the job's seed.", 0, MAX_SEED)),
        "reference_images": _or_null(_list(_path("A picture."), MAX_REFERENCE_IMAGES, "The initial memory (MR2V).")),
        "defaults": _or_null({"$ref": "#/definitions/defaults"}, "Keys of a shot, for all shots of the story."),
        "entities": {
            "description": "Characters, places and objects that shots name.",
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": MAX_ENTITIES,
                    "additionalProperties": {
                        "anyOf": [
                            _or_null(_text("A description.", may_be_empty=True)),
                            {"$ref": "#/definitions/entity"},
                        ]
                    },
                },
                {
                    "type": "array",
                    "maxItems": MAX_ENTITIES,
                    "items": {
                        "anyOf": [
                            _line("A name."),
                            {"allOf": [{"$ref": "#/definitions/entity"}, {"required": ["name"]}]},
                        ]
                    },
                },
                {"type": "null"},
            ],
        },
        "entity_schedule": {
            "description": "EntityBench's form of entities: names for each scene_num:shot, such as 1:2.",
            "type": ["object", "null"],
            "additionalProperties": {"anyOf": [names, {"type": "object", "additionalProperties": names}]},
        },
        "entity_descriptions": {"description": "EntityBench's descriptions of the entities."},
        "scenes": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_SHOTS,
            "items": {"$ref": "#/definitions/scene"},
        },
    }


def _scene() -> Schema:
    properties: dict[str, Schema] = {
        "scene_num": _integer("A different number for each scene.", 0, MAX_SCENE_NUM),
        "video_prompts": _list(_text("A prompt."), MAX_SHOTS, "StoryMem's form: a prompt for each shot.", least=1),
        "cut": _list(_cut(), MAX_SHOTS, "One for each prompt.", least=1),
        "shots": {
            "description": "The shots, in place of video_prompts and cut.",
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_SHOTS,
            "items": {"$ref": "#/definitions/shot"},
        },
    }
    one_form = [
        {"required": ["video_prompts"], "not": {"required": ["shots"]}},
        {"required": ["shots"], "not": {"anyOf": [{"required": ["video_prompts"]}, {"required": ["cut"]}]}},
    ]
    return _object(SCENE, properties, required=("scene_num",)) | {"oneOf": one_form}


def _shot() -> dict[str, Schema]:
    guidance = {"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE}
    two = [{"required": list(pair)} for pair in (("high", "low"), ("high_noise", "low_noise"))]
    lora = {"anyOf": [_path("A file, or a folder."), {"$ref": "#/definitions/lora"}]}
    reference = {"anyOf": [_path("A picture."), _object(REFERENCE, _reference())]}
    return {
        "prompt": _or_null(_text("What the shot shows.")),
        "cut": _or_null(_cut()),
        "name": _or_null(_line("For recall; no other shot has it.")),
        "shot_id": _or_null(_line("Another program's name of the shot; read as name.")),
        "duration": _or_null(
            {
                "description": "Seconds of the clip; rounded to 4n+1 frames.",
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": MAX_SECONDS,
            }
        ),
        "num_frames": _or_null(_integer("Frames of the clip; rounded to 4n+1.", 1, MAX_FRAMES)),
        "seed": _or_null(_integer("Over the seed of story and job.", 0, MAX_SEED)),
        "num_inference_steps": _or_null(_integer("Over the job's.", 1, MAX_STEPS)),
        "guidance": {
            "description": "One number, or two: for the high-noise and the low-noise expert.",
            "anyOf": [
                guidance,
                {"type": "array", "minItems": 2, "maxItems": 2, "items": guidance},
                {
                    "type": "object",
                    "properties": dict.fromkeys(("high", "low", "high_noise", "low_noise"), guidance),
                    "additionalProperties": False,
                    "minProperties": 2,
                    "maxProperties": 2,
                    "anyOf": [*two, {"required": ["high", "low_noise"]}, {"required": ["high_noise", "low"]}],
                },
                {"type": "null"},
            ],
        },
        "negative_prompt": _or_null(_text("Over the job's.", may_be_empty=True)),
        "start_image": _or_null(_path("A picture that the clip begins with.")),
        "references": _or_null(_list(reference, MAX_ENTRIES, "Pictures that join the memory before this shot.")),
        "video": _or_null(_path("A given clip, which is used instead of rendering one.")),
        "loras": _or_null(_list(lora, MAX_ENTRIES, "LoRAs of this shot, over the job's.")),
        "remember": _or_null(
            _truth("false: its keyframes do not enter the memory."),
        ),
        "entities": _or_null(_list(_line("What is seen in the shot."), MAX_ENTRIES)),
        "recall": {
            "description": "Its memory comes from these alone: names of earlier shots, references, or none.",
            "anyOf": [
                _line("A name."),
                _list(_line("A name."), MAX_RECALLED),
                {"type": "null"},
            ],
        },
    }


def _entity() -> dict[str, Schema]:
    return {
        "name": _or_null(_line("Its name, in a list of entities.")),
        "description": _or_null(_text("What it looks like.", may_be_empty=True)),
        "references": _or_null(_list(_path("A picture of it."), MAX_REFERENCES)),
    }


def _reference() -> dict[str, Schema]:
    return {"path": _path("A picture."), "sink": _or_null(_truth("true: always shown after that."))}


def _lora() -> dict[str, Schema]:
    number = {"type": ["number", "null"]}
    text = _or_null(_text(""))
    kinds = {"path": _path("A file, or a folder with the files of both experts."), "strength": number, "alpha": number}
    return {key: kinds.get(key, text) for key in LORA_KEYS}


def _cut() -> Schema:
    return _truth("true: a cut; false: the shot continues the one before it.")


def _truth(description: str) -> Schema:
    return {"description": description, "type": ["boolean", "string"], "pattern": _WORD_OF_TRUTH}


def _text(description: str, *, may_be_empty: bool = False) -> Schema:
    schema: Schema = {"description": description} if description else {}
    schema |= {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS}
    return schema if may_be_empty else schema | {"pattern": _VISIBLE}


def _line(description: str, *, most: int = MAX_NAME_CHARACTERS) -> Schema:
    return _text(description) | {"maxLength": most}


def _path(description: str) -> Schema:
    return _text(f"{description} Relative to the storyboard.")


def _integer(description: str, minimum: int, maximum: int) -> Schema:
    return {"description": description, "type": "integer", "minimum": minimum, "maximum": maximum}


def _list(items: Schema, most: int, description: str = "", *, least: int = 0) -> Schema:
    schema: Schema = {"description": description} if description else {}
    return schema | {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _or_null(schema: Schema, description: str = "") -> Schema:
    """``schema``, or null, which is the same as leaving the key out."""
    if "type" not in schema:
        return {"description": description, "anyOf": [schema, {"type": "null"}]}
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return schema | {"type": [*kinds, "null"]}


if __name__ == "__main__":
    Parser(
        prog="python -m storymem_dist.story.json_schema", description="Print a storyboard's JSON schema."
    ).parse_args()
    print_text(as_text())
