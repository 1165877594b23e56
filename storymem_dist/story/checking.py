"""Checks plain data against the storyboard format and builds a ``Story`` from it.

The format is ST-Bench's: ``{story_name, story_overview, scenes: [{scene_num, video_prompts, cut}]}``, and optionally
``reference_images``, ``seed`` and ``style``. The first problem is raised as one message that names the file, the scene,
the shot and what is allowed. Reads no file but the reference images; knows nothing about file formats.
"""

import difflib
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.images import open_reference_image
from storymem_dist.story.schema import Scene, Shot, Story

STORY_KEYS = ("story_name", "story_overview", "scenes")
OPTIONAL_STORY_KEYS = ("reference_images", "seed", "style")
SCENE_KEYS = ("scene_num", "video_prompts", "cut")

IGNORED_STORY_KEYS = ("$schema", "comment", "notes")
IGNORED_SCENE_KEYS = ("first_frame_prompt", "comment", "notes")
"""``first_frame_prompt`` is ST-Bench's, for other methods; StoryMem does not use it."""

MAX_PROMPT_CHARACTERS = 10_000
"""The text encoder reads 512 tokens, about 2,500 characters; far more than that is not a prompt."""

MAX_REFERENCE_IMAGES = 64
MAX_SCENE_NUM = 10**6
MAX_SEED = 2**63 - 1


def build_story(document: object, *, story_id: str, source: Path) -> Story:
    """Check ``document`` (parsed JSON or YAML) and return the story; ``source`` is its file, for messages and images.

    Relative ``reference_images`` are searched in the folder of ``source``. ``style`` is put before every prompt. The
    first shot of the chain continues no other, so its ``cut`` is always True. Raises ``StoryboardError``.
    """
    where = str(source)
    story = _mapping(document, where, "a storyboard", STORY_KEYS, OPTIONAL_STORY_KEYS, IGNORED_STORY_KEYS)
    style = _text(story.get("style") or "", where, "style", may_be_empty=True)
    return Story(
        story_id=story_id,
        name=_text(story["story_name"], where, "story_name"),
        overview=_text(story["story_overview"], where, "story_overview", may_be_empty=True),
        scenes=_scenes(story["scenes"], where, style),
        reference_images=_reference_images(story.get("reference_images"), where, source.parent),
        seed=_seed(story.get("seed"), where),
        style=style,
        source=source,
    )


def _scenes(value: object, where: str, style: str) -> tuple[Scene, ...]:
    entries = _list(value, where, "scenes", "scenes")
    positions: dict[int, int] = {}
    scenes: list[Scene] = []
    num_shots = 0
    for position, entry in enumerate(entries, start=1):
        scene = _scene(entry, where, position, first_index=num_shots, style=style)
        if scene.scene_num in positions:
            raise StoryboardError(
                f"{where}, scene {position}: scene_num {scene.scene_num} is taken by scene"
                f" {positions[scene.scene_num]}; allowed: a different number for each scene"
            )
        positions[scene.scene_num] = position
        num_shots += len(scene.shots)
        scenes.append(scene)
    return tuple(scenes)


def _scene(value: object, where: str, position: int, *, first_index: int, style: str) -> Scene:
    where = f"{where}, scene {position}"
    scene = _mapping(value, where, "a scene", SCENE_KEYS, (), IGNORED_SCENE_KEYS)
    scene_num = _whole_number(scene["scene_num"], where, "scene_num", 0, MAX_SCENE_NUM)
    if scene_num != position:
        where = f"{where} (scene_num {scene_num})"
    prompts = _list(scene["video_prompts"], where, "video_prompts", "texts, one prompt a shot")
    cuts = _list(scene["cut"], where, "cut", "true or false, one a shot")
    if len(prompts) != len(cuts):
        raise StoryboardError(
            f"{where}: video_prompts has {len(prompts)} entries and cut has {len(cuts)};"
            " allowed: exactly one cut for each prompt"
        )
    shots = []
    for index, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True)):
        shot_where = f"{where}, shot {index + 1}"
        text = _text(prompt, shot_where, "the prompt", max_characters=MAX_PROMPT_CHARACTERS)
        is_cut = _truth(cut, shot_where, "cut")
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


def _reference_images(value: object, where: str, folder: Path) -> tuple[Path, ...]:
    if value is None or value == []:
        return ()
    entries = _list(value, where, "reference_images", "paths, relative to the storyboard")
    if len(entries) > MAX_REFERENCE_IMAGES:
        raise StoryboardError(
            f"{where}: reference_images has {len(entries)} entries; allowed: at most {MAX_REFERENCE_IMAGES}"
        )
    paths = []
    for position, entry in enumerate(entries, start=1):
        path = (folder / _text(entry, where, f"reference_images, entry {position},")).absolute()
        try:
            open_reference_image(path)
        except StoryboardError as error:
            raise StoryboardError(f"{where}: reference_images, entry {position}: {error}") from None
        paths.append(path)
    return tuple(paths)


def _seed(value: object, where: str) -> int | None:
    return None if value is None else _whole_number(value, where, "seed", 0, MAX_SEED)


def _mapping(
    value: object, where: str, what: str, required: Collection[str], optional: Collection[str], ignored: Collection[str]
) -> Mapping[str, object]:
    """``value`` as a mapping that has all ``required`` keys and none that is not listed."""
    known = [*required, *optional, *ignored]
    if not isinstance(value, Mapping):
        raise StoryboardError(f"{where}: {what} is {_describe(value)}; allowed: an object with {', '.join(required)}")
    unknown = [key for key in value if key not in known]
    if unknown:
        near = difflib.get_close_matches(str(_short(unknown[0])).lower(), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise StoryboardError(
            f"{where}: unknown key {_short(unknown[0])!r}{hint}{more}; allowed in {what}: {', '.join(known)}"
        )
    missing = [key for key in required if key not in value]
    if missing:
        raise StoryboardError(
            f"{where}: {', '.join(map(repr, missing))} {'is' if len(missing) == 1 else 'are'} missing;"
            f" {what} needs {', '.join(required)}"
        )
    return value


def _list(value: object, where: str, key: str, of_what: str) -> list[object]:
    if not isinstance(value, list):
        raise StoryboardError(f"{where}: {key} is {_describe(value)}; allowed: a list of {of_what}")
    if not value:
        raise StoryboardError(f"{where}: {key} is empty; allowed: a list of {of_what}, at least one")
    return value


def _text(
    value: object, where: str, key: str, *, may_be_empty: bool = False, max_characters: int = MAX_PROMPT_CHARACTERS
) -> str:
    """``value`` as text without surrounding white space; rejects control characters."""
    if not isinstance(value, str):
        raise StoryboardError(f"{where}: {key} is {_describe(value)}; allowed: text")
    if len(value) > max_characters:
        raise StoryboardError(f"{where}: {key} has {len(value)} characters; allowed: at most {max_characters}")
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise StoryboardError(
                f"{where}: {key} holds the control character U+{ord(character):04X}; allowed: printable text"
            )
    if not may_be_empty and all(unicodedata.category(character)[0] in "ZC" for character in value):
        raise StoryboardError(f"{where}: {key} is empty; allowed: text with at least one visible character")
    return value.strip()


def _truth(value: object, where: str, key: str) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise StoryboardError(
            f"{where}: {key} is {_describe(value)}; allowed: true (a cut) or false (continues the shot before it)"
        )
    return value


def _whole_number(value: object, where: str, key: str, minimum: int, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise StoryboardError(
            f"{where}: {key} is {_describe(value)}; allowed: a whole number from {minimum} to {maximum}"
        )
    return value


def _describe(value: object) -> str:
    """A short description of ``value`` for the author of a storyboard."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"the number {value}" if value.bit_length() <= 64 else "a number of more than 64 bits"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {_short(value)!r}"
    if isinstance(value, Mapping):
        return "an object with " + (", ".join(repr(_short(key)) for key in list(value)[:3]) or "no keys")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else _describe(value)
    return text if len(text) <= 60 else text[:57] + "..."
