"""Checks plain data against the storyboard format and builds a ``Story`` from it.

The format is ST-Bench's: ``{story_name, story_overview, scenes: [{scene_num, video_prompts, cut}]}``, and optionally
``reference_images``, ``seed`` and ``style``. The first problem is raised as one message that names the file, the scene,
the shot and what is allowed. What differs from the format but has one meaning is read, with a warning of the story.
Reads no file but the reference images; knows nothing about file formats.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.images import open_reference_image
from storymem_dist.story.keys import SCENE, STORY, read_keys
from storymem_dist.story.problems import bad_character, describe, named, one_line
from storymem_dist.story.schema import PROMPT_TEXT_KEYS, Scene, Shot, Story
from storymem_dist.story.warnings import Warnings

MAX_PROMPT_CHARACTERS = 10_000
"""The text encoder reads 512 tokens, about 2,500 characters; far more than that is not a prompt."""

MAX_SHOTS = 10_000
MAX_REFERENCE_IMAGES = 64
MAX_SCENE_NUM = 10**6
MAX_SEED = 2**63 - 1

_TRUTHS = {"true": True, "false": False, "yes": True, "no": False, "y": True, "n": False, "1": True, "0": False}
_SCENE_NUM = re.compile(r"(?:scene)?[ _#-]*+(\d{1,7})", re.IGNORECASE)


def build_story(document: object, *, story_id: str, name: str, source: Path, where: str, warnings: Warnings) -> Story:
    """Check ``document`` (parsed JSON or YAML) and return the story.

    ``name`` is its name if it has none of its own. ``source`` is its file, for images; ``where`` names it in messages.
    Relative ``reference_images`` are searched in the folder of ``source``. ``style`` is put before every prompt. The
    first shot of the chain continues no other, so its ``cut`` is always True. ``warnings`` may hold some already.
    Raises ``StoryboardError``.
    """
    story = read_keys(document, STORY, where, warnings)
    style = _text(story.get("style") or "", where, "style", warnings, may_be_empty=True)
    written = story.get("story_name")
    if written is None:
        warnings.add("story_name is missing; the name of the file is used")
    return Story(
        story_id=story_id,
        name=one_line(name) if written is None else _name(written, where, warnings),
        overview=_text(_or_empty(story.get("story_overview")), where, "story_overview", warnings, may_be_empty=True),
        scenes=_scenes(story["scenes"], where, style, warnings),
        reference_images=_reference_images(story.get("reference_images"), where, source.parent, warnings),
        seed=_seed(story.get("seed"), where),
        style=style,
        source=source,
        warnings=warnings.sentences(where),
    )


def _name(value: object, where: str, warnings: Warnings) -> str:
    name = _text(value, where, "story_name", warnings)
    if (character := bad_character(name, also_lines=True)) is not None:
        raise StoryboardError(
            f"{where}: story_name holds the character U+{ord(character):04X}; allowed: one line of text without"
            " control characters and characters that change its direction"
        )
    return name


def _scenes(value: object, where: str, style: str, warnings: Warnings) -> tuple[Scene, ...]:
    entries = _list(_in_order(value, where, warnings), where, "scenes", "scenes")
    positions: dict[int, int] = {}
    scenes: list[Scene] = []
    num_shots = 0
    for position, entry in enumerate(entries, start=1):
        scene = _scene(entry, where, position, first_index=num_shots, style=style, warnings=warnings)
        if scene.scene_num in positions:
            raise StoryboardError(
                f"{where}, scene {position}: scene_num {scene.scene_num} is taken by scene"
                f" {positions[scene.scene_num]}; allowed: a different number for each scene"
            )
        positions[scene.scene_num] = position
        num_shots += len(scene.shots)
        if num_shots > MAX_SHOTS:
            raise StoryboardError(
                f"{where}, scene {position}: more than {MAX_SHOTS} shots; allowed: at most {MAX_SHOTS}"
            )
        scenes.append(scene)
    return tuple(scenes)


def _in_order(value: object, where: str, warnings: Warnings) -> object:
    """``scenes`` that is written as an object as the list of its scenes: one scene, or one for each key."""
    if not isinstance(value, Mapping) or not value:
        return value
    if any("prompt" in str(key).lower() for key in value):
        warnings.add("scenes is one scene; read as a list of one")
        return [value]
    if not all(isinstance(entry, Mapping) for entry in value.values()):
        return value
    numbers = [int(match[1]) for key in value if (match := _SCENE_NUM.fullmatch(str(key)))]
    if len(numbers) != len(value) or numbers != sorted(set(numbers)):
        raise StoryboardError(
            f"{where}: scenes is an object with the keys {named([str(key) for key in value])}; allowed: a list of"
            " scenes, or an object whose keys are their numbers in rising order (scene_1, scene_2, ...)"
        )
    warnings.add("scenes is an object; read as the list of its scenes")
    return [{"scene_num": number, **entry} for number, entry in zip(numbers, value.values(), strict=True)]


def _scene(value: object, where: str, position: int, *, first_index: int, style: str, warnings: Warnings) -> Scene:
    where, place = f"{where}, scene {position}", f"scene {position}"
    scene = read_keys(value, SCENE, where, warnings, place)
    scene_num = _scene_num(scene.get("scene_num"), where, position, warnings)
    if scene_num != position:
        where = f"{where} (scene_num {scene_num})"
    texts, own_cuts = _prompts(scene["video_prompts"], where, place, warnings)
    cuts = _cuts(scene.get("cut"), own_cuts, len(texts), where, place, warnings)
    shots = []
    for index, (prompt, cut) in enumerate(zip(texts, cuts, strict=True)):
        shot_where, shot_place = f"{where}, shot {index + 1}", f"{place}, shot {index + 1}"
        text = _text(prompt, shot_where, "the prompt", warnings)
        is_cut = _truth(cut, shot_where, shot_place, "cut", warnings)
        shots.append(
            Shot(
                index=first_index + index,
                index_in_scene=index,
                scene_num=scene_num,
                prompt=f"{style} {text}" if style else text,
                cut=is_cut or first_index + index == 0,
            )
        )
    return Scene(scene_num=scene_num, shots=tuple(shots))


def _scene_num(value: object, where: str, position: int, warnings: Warnings) -> int:
    place = f"scene {position}"
    number = value
    if value is None:
        warnings.add("scene_num is missing; the position of the scene is used", place)
        number = position
    elif isinstance(value, float) and value.is_integer() and math.isfinite(value):
        number = int(value)
    elif isinstance(value, str) and (match := _SCENE_NUM.fullmatch(value.strip())):
        number = int(match[1])
    if number is not value and value is not None:
        warnings.add("scene_num is not written as a whole number; read as one", place)
    return _whole_number(number, where, "scene_num", 0, MAX_SCENE_NUM)


def _prompts(value: object, where: str, place: str, warnings: Warnings) -> tuple[list[object], list[object] | None]:
    """The prompts of a scene, and the cuts that are written with them, if they are written as objects with cuts."""
    if isinstance(value, str):
        warnings.add("video_prompts is one text; read as a list of one", place)
        value = [value]
    entries = _list(value, where, "video_prompts", "texts, one prompt a shot")
    texts: list[object] = []
    cuts: list[object] = []
    for index, entry in enumerate(entries, start=1):
        if not isinstance(entry, Mapping):
            texts.append(entry)
            continue
        keys = [key for key in PROMPT_TEXT_KEYS if key in entry]
        if len(keys) != 1:
            raise StoryboardError(
                f"{where}, shot {index}: the prompt is {describe(entry)}; allowed: text"
                + (warnings.quotes or f", or an object with one of {', '.join(PROMPT_TEXT_KEYS)}")
            )
        warnings.add(f"the prompt is an object; its {keys[0]!r} is read", f"{place}, shot {index}")
        warnings.add_unused(str(key) for key in entry if key not in (keys[0], "cut"))
        texts.append(entry[keys[0]])
        if "cut" in entry:
            cuts.append(entry["cut"])
    if cuts and len(cuts) != len(texts):
        raise StoryboardError(
            f"{where}: {len(cuts)} of {len(texts)} prompts have a cut; allowed: exactly one cut for each prompt"
        )
    return texts, cuts or None


def _cuts(
    value: object, own_cuts: list[object] | None, num_prompts: int, where: str, place: str, warnings: Warnings
) -> list[object]:
    """The cuts of a scene, one for each prompt. A scene of one shot without any begins with a cut."""
    if own_cuts is not None:
        if value is not None:
            raise StoryboardError(f"{where}: cut is written in the scene and with each prompt; keep one of them")
        return own_cuts
    if value is None:
        if num_prompts > 1:
            example = ", ".join(["true"] + ["false"] * min(num_prompts - 1, 2)) + (", ..." if num_prompts > 3 else "")
            raise StoryboardError(
                f"{where}: cut is missing, so nothing says which of the {num_prompts} shots continue the one before"
                f' them; write for example "cut": [{example}], one for each prompt'
            )
        warnings.add("cut is missing; the only shot of a scene is a cut", place)
        return [True]
    if num_prompts == 1 and not isinstance(value, (list, Mapping)):
        warnings.add("cut is one value; read as a list of one", place)
        return [value]
    cuts = _list(value, where, "cut", "true or false, one a shot")
    if num_prompts != len(cuts):
        raise StoryboardError(
            f"{where}: video_prompts has {num_prompts} entries and cut has {len(cuts)};"
            " allowed: exactly one cut for each prompt"
        )
    return cuts


def _reference_images(value: object, where: str, folder: Path, warnings: Warnings) -> tuple[Path, ...]:
    if value is None or value == []:
        return ()
    entries = _list(value, where, "reference_images", "paths, relative to the storyboard")
    if len(entries) > MAX_REFERENCE_IMAGES:
        raise StoryboardError(
            f"{where}: reference_images has {len(entries)} entries; allowed: at most {MAX_REFERENCE_IMAGES}"
        )
    paths = []
    for position, entry in enumerate(entries, start=1):
        path = (folder / _text(entry, where, f"reference_images, entry {position},", warnings)).absolute()
        try:
            open_reference_image(path, partial(warnings.add, place=f"reference image {position}"))
        except StoryboardError as error:
            raise StoryboardError(f"{where}: reference_images, entry {position}: {error}") from None
        paths.append(path)
    return tuple(paths)


def _seed(value: object, where: str) -> int | None:
    return None if value is None else _whole_number(value, where, "seed", 0, MAX_SEED)


def _or_empty(value: object) -> object:
    return "" if value is None else value


def _list(value: object, where: str, key: str, of_what: str) -> list[object]:
    if not isinstance(value, list):
        raise StoryboardError(f"{where}: {key} is {describe(value)}; allowed: a list of {of_what}")
    if not value:
        raise StoryboardError(f"{where}: {key} is empty; allowed: a list of {of_what}, at least one")
    return value


def _text(value: object, where: str, key: str, warnings: Warnings, *, may_be_empty: bool = False) -> str:
    """``value`` as text without surrounding white space; rejects control characters."""
    if not isinstance(value, str):
        raise StoryboardError(f"{where}: {key} is {describe(value)}; allowed: text{warnings.quotes}")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise StoryboardError(f"{where}: {key} has {len(value)} characters; allowed: at most {MAX_PROMPT_CHARACTERS}")
    if (character := bad_character(value)) is not None:
        raise StoryboardError(
            f"{where}: {key} holds the control character U+{ord(character):04X}; allowed: printable text"
        )
    if not may_be_empty and all(unicodedata.category(character)[0] in "ZC" for character in value):
        raise StoryboardError(f"{where}: {key} is empty; allowed: text with at least one visible character")
    return value.strip()


def _truth(value: object, where: str, place: str, key: str, warnings: Warnings) -> bool:
    if isinstance(value, bool):
        return value
    word = str(int(value)) if isinstance(value, (int, float)) and value in (0, 1) else value
    if not isinstance(word, str) or word.strip().lower() not in _TRUTHS:
        raise StoryboardError(
            f"{where}: {key} is {describe(value)}; allowed: true (a cut) or false (continues the shot before it)"
        )
    if word.strip().lower() not in ("true", "false"):
        warnings.add(f"{key} is not written as true or false; 1 and yes are read as true, 0 and no as false", place)
    return _TRUTHS[word.strip().lower()]


def _whole_number(value: object, where: str, key: str, minimum: int, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise StoryboardError(
            f"{where}: {key} is {describe(value)}; allowed: a whole number from {minimum} to {maximum}"
        )
    return value
