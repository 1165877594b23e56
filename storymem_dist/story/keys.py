"""Reads the keys of an object in a storyboard: required, optional, ignored, unknown.

A key that differs from a required one in case, spaces or signs is read. An unknown key is ignored with a warning,
unless it is almost an optional key: nobody would notice that a seed or a style has no effect.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from storymem_dist.errors import StoryboardError
from storymem_dist.story.problems import Lined, at_line, describe, plain_key, short
from storymem_dist.story.values import names_picture
from storymem_dist.story.warnings import Warnings

_NEAR = 0.75
_WORDS = re.compile(r"[A-Z]*[^\W\d_A-Z]+|[A-Z]+|\d+")
_OTHER_WORDS = ("speed", "need", "feed", "weed", "send")
"""Words that are almost ``seed`` and mean something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """The keys of an object. ``expected`` are read (``required`` must be there), ``ignored`` are accepted.

    ``also`` are keys of other programs: theirs to ours, with one meaning. ``unlike`` are other programs' words for
    optional keys, which are refused with ours. ``pictured`` are texts for an image model: a warning names them.
    ``of_shots`` belong to shots and ``defaults``: a warning says so. ``instead`` says what may be written in place of
    the required keys.
    """

    what: str
    expected: tuple[str, ...]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("comment", "notes")
    also: Mapping[str, str] = field(default_factory=dict)
    unlike: Mapping[str, str] = field(default_factory=dict)
    pictured: tuple[str, ...] = ()
    of_shots: tuple[str, ...] = ()
    instead: str = ""


SCHEDULE_KEYS = ("entity_schedule", "entity_descriptions")
"""EntityBench's form of ``entities``."""

OPTIONAL_OF_SHOT = (
    *("name", "duration", "num_frames", "seed", "num_inference_steps", "guidance", "negative_prompt"),
    *("start_image", "references", "video", "loras", "remember", "entities", "recall"),
)

STORY = Keys(
    what="a storyboard",
    expected=("story_name", "story_overview", "scenes"),
    required=("scenes",),
    optional=("reference_images", "seed", "style", "defaults", "entities"),
    ignored=("$schema", "comment", "notes"),
    also={key: key for key in SCHEDULE_KEYS},
    of_shots=OPTIONAL_OF_SHOT,
)
SCENE = Keys(
    what="a scene",
    expected=("scene_num", "video_prompts", "cut"),
    also={"shots": "shots"},
    pictured=("first_frame_prompt", "first_frame"),
    of_shots=OPTIONAL_OF_SHOT,
    instead=", or shots in place of the last two",
)
"""``first_frame_prompt`` is ST-Bench's and ``first_frame`` ViMax's, for other methods; StoryMem does not use them."""

SHOT = Keys(
    what="a shot",
    expected=("prompt", "cut"),
    optional=OPTIONAL_OF_SHOT,
    also={"video_prompt": "prompt", "text": "prompt", "shot_id": "shot_id"},
    unlike={
        **dict.fromkeys(("seconds", "duration_seconds"), "duration"),
        **dict.fromkeys(("frames", "n_frames"), "num_frames"),
        **dict.fromkeys(("steps", "num_steps", "inference_steps"), "num_inference_steps"),
        **dict.fromkeys(
            ("guidance_scale", "guidance_scale_high", "guidance_scale_low", "cfg", "cfg_scale"), "guidance"
        ),
        **dict.fromkeys(("lora_path", "lora_paths"), "loras"),
        **dict.fromkeys(("start_frame", "first_frame_image", "init_image", "image_path"), "start_image"),
        **dict.fromkeys(("reference_images",), "references"),
        **dict.fromkeys(("video_path",), "video"),
        **dict.fromkeys(("entity",), "entities"),
    },
    pictured=("first_frame_prompt", "first_frame"),
)
"""``shot_id`` is ViMax's: a name like ``name``, but it may be that of several shots, such as 1 in each scene."""

DEFAULTS = replace(SHOT, what="defaults")
ENTITY = Keys(what="an entity", expected=("name", "description"), optional=("references",))
REFERENCE = Keys(what="a reference", expected=("path",), required=("path",), optional=("sink",))
LORA_KEYS = ("path", "scale_rule", "strength", "alpha", "expert", "unmatched")
"""The keys of a LoRA of a shot, those of ``weights.lora.settings.LoraSettings``."""


def read_keys(value: object, keys: Keys, where: str, warnings: Warnings, place: str = "") -> Lined:
    """Return the expected and optional keys of ``value``. Raises ``StoryboardError`` when it is no such object."""
    if not isinstance(value, Mapping):
        raise StoryboardError(f"{where}: {keys.what} is {describe(value)}; allowed: an object with {_listed(keys)}")
    meant = {plain_key(key): key for key in keys.expected}
    spelled: dict[str, str] = {}
    unknown: list[str] = []
    for key in map(str, value):
        if key in keys.ignored:
            continue
        if key in keys.pictured:
            _not_used(key, value[key], warnings, place)
            continue
        is_ours = key in keys.expected or key in keys.optional
        name = key if is_ours else keys.also.get(key) or meant.get(plain_key(key))
        if name is None:
            unknown.append(key)
        elif name in spelled:
            raise StoryboardError(
                f"{where}: the keys {spelled[name]!r} and {short(key)!r} are both {name!r}; keep one of them"
            )
        else:
            spelled[name] = key
    _refuse_near_misses(unknown, keys, where, value)
    missing = [name for name in keys.required if value.get(spelled.get(name, name)) is None]
    if missing:
        raise missing_key(missing[0], keys, where, unknown)
    for name, key in spelled.items():
        if name != key and key not in keys.also:
            warnings.add(f"the key {short(key)!r} is read as {name!r}", place)
    for key in unknown:
        if key in keys.of_shots:
            warnings.add(f"the key {key!r} belongs to a shot; write it in shots or in defaults, it is not used", place)
    warnings.add_unused(key for key in unknown if key not in keys.of_shots)
    lines = value.lines if isinstance(value, Lined) else {}
    return Lined(
        {name: value[key] for name, key in spelled.items()},
        {name: lines[key] for name, key in spelled.items() if key in lines},
    )


def missing_key(name: str, keys: Keys, where: str, written: Iterable[str]) -> StoryboardError:
    """The error for a required key that is not there; ``written`` are the unknown keys that are."""
    written = list(written)
    near = difflib.get_close_matches(name, map(short, written[:100]), n=1)
    hint = f"; did you mean it by {near[0]!r}?" if near else f"; {keys.what} needs {_listed(keys)}{keys.instead}"
    if keys is STORY and any(plain_key(key) == "videoprompts" for key in written):
        hint = "; this is a scene: write it in the list of a storyboard's scenes"
    elif keys is SCENE and (shots := [key for key in written if plain_key(key) in ("shot", "shots", "shotlist")]):
        hint = f"; did you mean 'shots' by {short(shots[0])!r}?"
    elif keys is STORY and "shots" in written:
        hint = "; write the shots in a scene: scenes: [{shots: [...]}]"
    return StoryboardError(f"{where}: {name!r} is missing{hint}")


def _not_used(key: str, value: object, warnings: Warnings, place: str) -> None:
    texts = value if isinstance(value, list) else [value]
    written = [text for text in texts if isinstance(text, str) and text.strip()]
    if any(map(names_picture, written)):
        warnings.add(f"{key} is a text for an image model; it is not used, for a picture write start_image", place)
    elif written:
        warnings.add(f"{key} is a text for an image model; it is not used", place)


def _refuse_near_misses(unknown: list[str], keys: Keys, where: str, value: object) -> None:
    plain = {plain_key(key): key for key in keys.optional}
    for key in unknown:
        candidate = plain_key(key)
        if candidate in _OTHER_WORDS:
            continue
        meant = keys.unlike.get(key)
        near = difflib.get_close_matches(candidate, plain, n=1, cutoff=_NEAR)
        if near and len(_WORDS.findall(key)) <= len(_WORDS.findall(plain[near[0]])):  # "art_style" is another key
            meant = meant or plain[near[0]]
        if meant:
            raise StoryboardError(
                f"{at_line(where, value, key)}: unknown key {short(key)!r} (did you mean {meant!r}?); correct or remove"
                f" it; {keys.what} has {_listed(keys)} and optionally {', '.join(keys.optional)}"
            )


def _listed(keys: Keys) -> str:
    return ", ".join(keys.expected)
