"""Reads the keys of an object in a storyboard: required, optional, ignored, unknown.

A key that differs from a required one in case, spaces or signs is read. An unknown key is ignored with a warning,
unless it is almost an optional key: nobody would notice that a seed or a style has no effect.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from storymem_dist.errors import StoryboardError
from storymem_dist.story.problems import describe, plain_key, short
from storymem_dist.story.warnings import Warnings

_NEAR = 0.75
_WORDS = re.compile(r"[A-Z]*[^\W\d_A-Z]+|[A-Z]+|\d+")
_OTHER_WORDS = ("speed", "need", "feed", "weed", "send")
"""Words that are almost ``seed`` and mean something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """The keys of an object. ``expected`` are read (``required`` must be there), ``ignored`` are accepted."""

    what: str
    expected: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    ignored: tuple[str, ...]


STORY = Keys(
    what="a storyboard",
    expected=("story_name", "story_overview", "scenes"),
    required=("scenes",),
    optional=("reference_images", "seed", "style"),
    ignored=("$schema", "comment", "notes"),
)
SCENE = Keys(
    what="a scene",
    expected=("scene_num", "video_prompts", "cut"),
    required=("video_prompts",),
    optional=(),
    ignored=("first_frame_prompt", "comment", "notes"),
)
"""``first_frame_prompt`` is ST-Bench's, for other methods; StoryMem does not use it."""


def read_keys(value: object, keys: Keys, where: str, warnings: Warnings, place: str = "") -> dict[str, object]:
    """Return the expected and optional keys of ``value``. Raises ``StoryboardError`` when it is no such object."""
    if not isinstance(value, Mapping):
        raise StoryboardError(f"{where}: {keys.what} is {describe(value)}; allowed: an object with {_listed(keys)}")
    meant = {plain_key(key): key for key in keys.expected}
    spelled: dict[str, str] = {}
    unknown: list[str] = []
    for key in map(str, value):
        if key in keys.ignored or key in keys.optional:
            continue
        name = key if key in keys.expected else meant.get(plain_key(key))
        if name is None:
            unknown.append(key)
        elif name in spelled:
            raise StoryboardError(
                f"{where}: the keys {spelled[name]!r} and {short(key)!r} are both {name!r}; keep one of them"
            )
        else:
            spelled[name] = key
    _refuse_near_misses(unknown, keys, where)
    missing = [name for name in keys.required if value.get(spelled.get(name, name)) is None]
    if missing:
        near = difflib.get_close_matches(missing[0], map(short, unknown[:100]), n=1)
        hint = f"; did you mean it by {near[0]!r}?" if near else f"; {keys.what} needs {_listed(keys)}"
        if keys is STORY and any(plain_key(key) == "videoprompts" for key in unknown):
            hint = "; this is a scene: write it in the list of a storyboard's scenes"
        raise StoryboardError(f"{where}: {missing[0]!r} is missing{hint}")
    for name, key in spelled.items():
        if name != key:
            warnings.add(f"the key {short(key)!r} is read as {name!r}", place)
    warnings.add_unused(unknown)
    read = {name: value[key] for name, key in spelled.items()}
    return read | {name: value[name] for name in keys.optional if name in value}


def _refuse_near_misses(unknown: list[str], keys: Keys, where: str) -> None:
    plain = {plain_key(key): key for key in keys.optional}
    for key in unknown:
        candidate = plain_key(key)
        if candidate in _OTHER_WORDS:
            continue
        near = difflib.get_close_matches(candidate, plain, n=1, cutoff=_NEAR)
        if near and len(_WORDS.findall(key)) <= len(_WORDS.findall(plain[near[0]])):  # "art_style" is another key
            raise StoryboardError(
                f"{where}: unknown key {short(key)!r} (did you mean {plain[near[0]]!r}?); correct or remove it;"
                f" {keys.what} has {_listed(keys)} and optionally {', '.join(keys.optional)}"
            )


def _listed(keys: Keys) -> str:
    return ", ".join(keys.expected)
