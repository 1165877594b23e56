"""Checks plain data against the storyboard format and builds a ``Story`` from it.

The format is ST-Bench's, ``{story_name, story_overview, scenes: [{scene_num, video_prompts, cut}]}``, optionally with
``reference_images``, ``seed`` and ``style``; or, in place of a scene's two lists, ``shots`` with keys of their own over
the story's ``defaults``. The first problem is raised as one message that names the file, the scene, the shot and what
is allowed. What differs from the format but has one meaning is read, with a warning of the story. Opens the pictures
and clips that it names, and looks for its LoRAs; knows nothing about the formats of storyboards.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.entities import entities_of, read_descriptions, read_schedule, read_table
from storymem_dist.story.given_files import GivenFiles
from storymem_dist.story.keys import SCENE, SHOT, STORY, missing_key, read_keys
from storymem_dist.story.problems import Lined, at_line, describe, named, one_line, plain_key
from storymem_dist.story.recall import name_shots, recalled
from storymem_dist.story.schema import PROMPT_TEXT_KEYS, Entity, Scene, Shot, Story
from storymem_dist.story.shots import Draft, ShotReader
from storymem_dist.story.values import (
    LIST_OF_PATHS,
    MAX_SEED,
    read_line,
    read_list,
    read_text,
    read_truth,
    read_whole_number,
)
from storymem_dist.story.warnings import Warnings

MAX_SHOTS = 10_000
MAX_REFERENCE_IMAGES = 64
MAX_SCENE_NUM = 10**6

_KEYS_OF_A_SHOT = {plain_key(key) for key in (*SHOT.also, "prompt", "video")}
"""Those of which a shot has at least one."""

_SCENE_NUM = re.compile(r"(?:scene)?[ _#-]*+(\d{1,7})", re.IGNORECASE)


def build_story(document: object, *, story_id: str, name: str, source: Path, where: str, warnings: Warnings) -> Story:
    """Check ``document`` (parsed JSON or YAML) and return the story.

    ``name`` is its name if it has none of its own. ``source`` is its file, for images; ``where`` names it in messages.
    Relative ``reference_images`` are searched in the folder of ``source``. ``style`` is put before every prompt. The
    first shot continues no other, so its ``cut`` is always True. ``warnings`` may hold some already.
    Raises ``StoryboardError``.
    """
    story = read_keys(document, STORY, where, warnings)
    style = read_text(_or_empty(story.get("style")), where, "style", warnings, may_be_empty=True)
    written = story.get("story_name")
    if written is None:
        warnings.add("story_name is missing; the name of the file is used")
    name = one_line(name) if written is None else read_line(written, where, "story_name", warnings)
    overview = read_text(_or_empty(story.get("story_overview")), where, "story_overview", warnings, may_be_empty=True)
    files = GivenFiles(source.parent, warnings)
    reader = ShotReader(story.get("defaults"), style, files, where, warnings)
    drafts = _drafts(story["scenes"], where, reader, warnings)
    reference_images = _reference_images(story.get("reference_images"), where, files, warnings)
    entities = _entities(story, drafts, files, where, warnings)
    return Story(
        story_id=story_id,
        name=name,
        overview=overview,
        scenes=_scenes(drafts, warnings, has_references=bool(reference_images)),
        reference_images=reference_images,
        seed=None if story.get("seed") is None else read_whole_number(story["seed"], where, "seed", 0, MAX_SEED),
        style=style,
        source=source,
        warnings=warnings.sentences(where),
        entities=entities,
    )


def _entities(
    story: Lined, drafts: list[Draft], files: GivenFiles, where: str, warnings: Warnings
) -> tuple[Entity, ...]:
    table: dict[str, Entity] = {}
    if (written := story.get("entities")) is not None:
        table = read_table(written, files, at_line(where, story, "entities"), warnings)
    if (schedule := story.get("entity_schedule")) is not None:
        read_schedule(schedule, drafts, where, warnings)
    return entities_of(drafts, table, read_descriptions(story.get("entity_descriptions")), warnings)


def _scenes(drafts: list[Draft], warnings: Warnings, *, has_references: bool) -> tuple[Scene, ...]:
    """The scenes of all shots, whose recalls and entities are resolved."""
    indices = name_shots(drafts, warnings)
    scenes: dict[int, list[Shot]] = {}
    for draft in drafts:
        recall = recalled(draft, indices, drafts, has_references=has_references)
        shot = replace(draft.shot, recall=recall, entities=draft.entities or ())
        scenes.setdefault(shot.scene_num, []).append(shot)
    return tuple(Scene(scene_num=number, shots=tuple(shots)) for number, shots in scenes.items())


def _drafts(value: object, where: str, reader: ShotReader, warnings: Warnings) -> list[Draft]:
    """The shots of all scenes, in order."""
    entries = read_list(_in_order(value, where, warnings), where, "scenes", "scenes")
    positions: dict[int, int] = {}
    drafts: list[Draft] = []
    for position, entry in enumerate(entries, start=1):
        scene_num, found = _scene(entry, where, position, reader, warnings)
        if scene_num in positions:
            raise StoryboardError(
                f"{where}, scene {position}: scene_num {scene_num} is taken by scene"
                f" {positions[scene_num]}; allowed: a different number for each scene"
            )
        positions[scene_num] = position
        drafts += found
        if len(drafts) > MAX_SHOTS:
            raise StoryboardError(
                f"{where}, scene {position}: more than {MAX_SHOTS} shots; allowed: at most {MAX_SHOTS}"
            )
    return drafts


def _in_order(value: object, where: str, warnings: Warnings) -> object:
    """``scenes`` that is written as an object as the list of its scenes: one scene, or one for each key."""
    if not isinstance(value, Mapping) or not value:
        return value
    if any("prompt" in str(key).lower() or key == "shots" for key in value):
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
    return [
        Lined({"scene_num": number, **entry}, entry.lines if isinstance(entry, Lined) else None)
        for number, entry in zip(numbers, value.values(), strict=True)
    ]


def _scene(value: object, where: str, position: int, reader: ShotReader, warnings: Warnings) -> tuple[int, list[Draft]]:
    where, place = f"{where}, scene {position}", f"scene {position}"
    scene = read_keys(value, SCENE, where, warnings, place)
    scene_num = _scene_num(scene.get("scene_num"), where, position, warnings)
    if scene_num != position:
        where = f"{where} (scene_num {scene_num})"
    has_lists, shots = scene.get("video_prompts") is not None, scene.get("shots")
    if isinstance(shots, list) or (shots is not None and not has_lists):
        for key in ("video_prompts", "cut"):
            if scene.get(key) is not None:
                raise StoryboardError(
                    f"{at_line(where, scene, key)}: {key} and shots are two ways to write a scene; keep one of them"
                )
        written = [
            _shot_keys(entry, f"{where}, shot {number}", f"{place}, shot {number}", warnings)
            for number, entry in enumerate(
                read_list(shots, at_line(where, scene, "shots"), "shots", "shots, each an object with prompt"), start=1
            )
        ]
    elif not has_lists:
        raise missing_key("video_prompts", SCENE, where, map(str, value if isinstance(value, Mapping) else ()))
    else:
        if shots is not None:  # a count of them, perhaps
            warnings.add_unused(["shots"])
        written = _listed_shots(scene, where, place, reader, warnings)
    return scene_num, [
        reader.read(
            keys,
            where=f"{where}, shot {index + 1}",
            place=f"{place}, shot {index + 1}",
            scene_num=scene_num,
            index_in_scene=index,
        )
        for index, keys in enumerate(written)
    ]


def _shot_keys(entry: object, where: str, place: str, warnings: Warnings) -> Lined:
    """The keys of an entry of ``shots``."""
    if isinstance(entry, str):
        warnings.add("the shot is a text; read as its prompt", place)
        return Lined({"prompt": entry})
    keys = list(map(str, entry)) if isinstance(entry, Mapping) else []
    if not _KEYS_OF_A_SHOT & set(map(plain_key, keys)) and any(" " in key for key in keys):  # "A keeper: he climbs"
        raise StoryboardError(
            f"{at_line(where, entry)}: the shot is {describe(entry)}; allowed: an object with prompt{warnings.quotes}"
        )
    return read_keys(entry, SHOT, at_line(where, entry), warnings, place)


def _listed_shots(scene: Lined, where: str, place: str, reader: ShotReader, warnings: Warnings) -> list[Lined]:
    """The shots of a scene that has lists of prompts and cuts."""
    texts, own_cuts = _prompts(scene["video_prompts"], where, place, warnings)
    cuts = own_cuts
    if own_cuts is None and scene.get("cut") is None and reader.defaults.get("cut") is not None:
        cuts = [reader.defaults["cut"]] * len(texts)
    else:
        cuts = _cuts(scene.get("cut"), own_cuts, len(texts), where, place, warnings)
    shots = []
    for number, (prompt, cut) in enumerate(zip(texts, cuts, strict=True), start=1):
        shot_where = f"{where}, shot {number}"
        text = read_text(prompt, shot_where, "the prompt", warnings)
        shots.append(
            Lined({"prompt": text, "cut": read_truth(cut, shot_where, f"{place}, shot {number}", "cut", warnings)})
        )
    return shots


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
    return read_whole_number(number, where, "scene_num", 0, MAX_SCENE_NUM)


def _prompts(value: object, where: str, place: str, warnings: Warnings) -> tuple[list[object], list[object] | None]:
    """The prompts of a scene, and the cuts that are written with them, if they are written as objects with cuts."""
    if isinstance(value, str):
        warnings.add("video_prompts is one text; read as a list of one", place)
        value = [value]
    entries = read_list(value, where, "video_prompts", "texts, one prompt a shot")
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
    cuts = read_list(value, where, "cut", "true or false, one a shot")
    if num_prompts != len(cuts):
        raise StoryboardError(
            f"{where}: video_prompts has {num_prompts} entries and cut has {len(cuts)};"
            " allowed: exactly one cut for each prompt"
        )
    return cuts


def _reference_images(value: object, where: str, files: GivenFiles, warnings: Warnings) -> tuple[Path, ...]:
    if value is None or value == []:
        return ()
    entries = read_list(value, where, "reference_images", LIST_OF_PATHS)
    if len(entries) > MAX_REFERENCE_IMAGES:
        raise StoryboardError(
            f"{where}: reference_images has {len(entries)} entries; allowed: at most {MAX_REFERENCE_IMAGES}"
        )
    return tuple(
        files.image(entry, where, f"reference_images, entry {position},", f"reference image {position}")
        for position, entry in enumerate(entries, start=1)
    )


def _or_empty(value: object) -> object:
    return "" if value is None else value
