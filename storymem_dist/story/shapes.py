"""Finds the storyboards in a document: alone, in a list, or inside the objects that language models put around them.

Knows keys and shapes, not what they must hold. Reads a shape only where it has one meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from storymem_dist.story.keys import STORY
from storymem_dist.story.problems import Unreadable, named, plain_key, short

MAX_STORIES_PER_FILE = 1000
_MAX_WRAPPERS = 4
_OPTIONAL = {plain_key(key) for key in STORY.optional if key != "entities"}  # planners list them anywhere


@dataclass(slots=True)
class Found:
    """One document of a file that should be a storyboard, ``Unreadable`` if its line is bad; how it was found.

    ``unused`` are the keys next to it.
    """

    document: object
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def find_stories(document: object) -> list[Found]:
    """Return the storyboards of ``document``, at least one; ``document`` itself if nothing in it looks like one.

    Raises ``Unreadable`` when several places of an object hold one, or a list holds too many.
    """
    found = _unwrap(document, _MAX_WRAPPERS) or [Found(document)]
    if len(found) > MAX_STORIES_PER_FILE:
        raise Unreadable(f"{len(found)} storyboards in one file; allowed: at most {MAX_STORIES_PER_FILE}")
    return found


def holds_story(document: object) -> bool:
    """Whether something in ``document`` looks like a storyboard."""
    try:
        return bool(_unwrap(document, _MAX_WRAPPERS))
    except Unreadable:  # several, or keys next to one
        return True


def _unwrap(value: object, depth: int) -> list[Found]:
    if isinstance(value, Mapping):
        scenes = [item for key, item in value.items() if plain_key(str(key)) == "scenes"]
        if any(map(_looks_like_scenes, scenes)):
            return [Found(value)]
        inside = _inside_object(value, depth) if depth else []
        return inside or ([Found(value)] if scenes else [])
    if isinstance(value, list) and value:
        return _inside_list(value, depth) if depth else []
    return []


def _inside_object(value: Mapping[object, object], depth: int) -> list[Found]:
    inside = {str(key): found for key, item in value.items() if (found := _unwrap(item, depth - 1))}
    if len(inside) > 1:  # a summary may have a key "scenes" too, such as their number
        inside = {key: found for key, found in inside.items() if any(map(_has_scenes, found))} or inside
    if len(inside) > 1:
        raise Unreadable(f"there are storyboards under {named(list(inside))}; keep one, or write them as a list")
    for key, found in inside.items():
        if outside := [other for other in map(str, value) if other != key and plain_key(other) in _OPTIONAL]:
            raise Unreadable(
                f"{named(outside)} is next to the storyboard {short(key)!r}; write it inside, or remove it"
            )
        for one in found:
            one.notes.append(f"the storyboard is the value of {short(key)!r}")
            one.unused.extend(str(other) for other in value if str(other) != key)
        return found
    return []


def _inside_list(value: list[object], depth: int) -> list[Found]:
    if all(isinstance(entry, Mapping) and _looks_like_scene(entry) for entry in value):
        return [Found({"scenes": value}, ["the file is a list of scenes; read as the scenes of one storyboard"])]
    found = [_unwrap(entry, depth - 1) for entry in value]
    if not any(found):
        return []
    stories = [one for entry, inside in zip(value, found, strict=True) for one in inside or [Found(entry)]]
    if len(stories) == 1:
        stories[0].notes.append("the storyboard is in a list of one")
    return stories


def _has_scenes(found: Found) -> bool:
    document = found.document
    return isinstance(document, Mapping) and any(
        plain_key(str(key)) == "scenes" and _looks_like_scenes(item) for key, item in document.items()
    )


def _looks_like_scenes(value: object) -> bool:
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return any(isinstance(entry, Mapping) for entry in entries)


def _looks_like_scene(entry: Mapping[object, object]) -> bool:
    keys = {plain_key(str(key)) for key in entry}
    return ("videoprompts" in keys or isinstance(entry.get("shots"), list)) and "scenes" not in keys
