"""Reads what is seen in each shot: the ``entities`` of shots and story, and EntityBench's ``entity_schedule``."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from unicodedata import normalize

from storymem_dist.errors import StoryboardError
from storymem_dist.story.given_files import GivenFiles
from storymem_dist.story.keys import ENTITY, read_keys
from storymem_dist.story.problems import at_line, bad_character, describe, named, short
from storymem_dist.story.schema import Entity
from storymem_dist.story.shots import Draft
from storymem_dist.story.values import LIST_OF_PATHS, names_picture, read_entries, read_name, read_text
from storymem_dist.story.warnings import Warnings

MAX_ENTITIES = 1000
MAX_REFERENCES = 64
_NEAR = 0.75
_SHOT_KEY = re.compile(r"\s*(\d{1,7})\s*:\s*(\d{1,7})\s*")


def read_table(value: object, files: GivenFiles, where: str, warnings: Warnings) -> dict[str, Entity]:
    """The entities of a story by name: from an object of names, or from a list. Raises ``StoryboardError``."""
    entries: Iterable[tuple[object, object, str]]
    if isinstance(value, Mapping):
        entries = [(name, entry, at_line(where, value, str(name))) for name, entry in value.items()]
    elif isinstance(value, list):
        entries = [(entry.get("name") if isinstance(entry, Mapping) else entry, entry, where) for entry in value]
    else:
        raise StoryboardError(
            f"{where}: entities is {describe(value)}; allowed: an object with the name of each and its description"
        )
    if isinstance(value, (Mapping, list)) and len(value) > MAX_ENTITIES:
        raise StoryboardError(f"{where}: entities has {len(value)} entries; allowed: at most {MAX_ENTITIES}")
    table: dict[str, Entity] = {}
    for position, (written, entry, there) in enumerate(entries, start=1):
        key = f"entities, entry {position},"
        if written is None:
            raise StoryboardError(f"{there}: {key} is {describe(entry)}; allowed: a name, or an object with name")
        name = read_name(written, there, key, warnings)
        if name in table:
            raise StoryboardError(f"{there}: entities names {short(name)!r} twice; keep one of them")
        table[name] = _entity(name, entry, files, there, warnings, is_listed=isinstance(value, list))
    return table


def _entity(name: str, entry: object, files: GivenFiles, where: str, warnings: Warnings, *, is_listed: bool) -> Entity:
    what = f"the entity {short(name)!r}"
    if entry is None or (is_listed and not isinstance(entry, Mapping)):
        return Entity(name=name)
    if isinstance(entry, str):
        if names_picture(entry):
            warnings.add(f"{what} has a description {short(entry)!r}; a picture is written as references: [{entry}]")
        return Entity(name=name, description=read_text(entry, where, what, warnings, may_be_empty=True))
    if not isinstance(entry, Mapping):
        raise StoryboardError(
            f"{where}: {what} is {describe(entry)}; allowed: text, or an object with description and references"
        )
    written = read_keys(entry, ENTITY, f"{where}: {what}", warnings, what)
    own = written.get("name")
    if not is_listed and own is not None and read_name(own, where, f"{what}: name", warnings) != name:
        raise StoryboardError(
            f"{at_line(where, entry, 'name')}: {what} has another name, {short(own)!r}; keep one of them"
        )
    description, images = written.get("description"), written.get("references")
    paths = read_entries(
        [] if images is None else images,
        *(f"{at_line(where, entry, 'references')}: {what}", what, "references", LIST_OF_PATHS, warnings),
        most=MAX_REFERENCES,
    )
    return Entity(
        name=name,
        description=""
        if description is None
        else read_text(description, where, f"{what}: description", warnings, may_be_empty=True),
        references=tuple(
            files.image(path, where, f"{what}: references, entry {number},", f"{what}, reference {number}")
            for number, path in enumerate(paths, start=1)
        ),
    )


def read_schedule(value: object, drafts: Sequence[Draft], where: str, warnings: Warnings) -> None:
    """Give the shots the entities of EntityBench's ``entity_schedule``: lists of names for each ``scene_num:shot``."""
    if not isinstance(value, Mapping):
        raise StoryboardError(
            f"{where}: entity_schedule is {describe(value)}; allowed: an object with a key such as 1:2 for each shot"
        )
    by_place = {(draft.shot.scene_num, draft.shot.index_in_scene + 1): draft for draft in drafts}
    nowhere: list[str] = []
    for key, entry in value.items():
        match = _SHOT_KEY.fullmatch(str(key))
        draft = by_place.get((int(match[1]), int(match[2]))) if match else None
        if draft is None:
            nowhere.append(str(key))
            continue
        if draft.entities is not None and "entities" not in draft.defaults:
            raise StoryboardError(
                f"{draft.at['entities']}: entities are written in the shot and in entity_schedule; keep one of them"
            )
        draft.entities = _scheduled(
            entry, f"{at_line(where, value, str(key))}: entity_schedule, {short(str(key))!r}", warnings
        )
    if nowhere:
        warnings.add(f"entity_schedule names shots that the story does not have: {named(nowhere, 4)}")


def _scheduled(entry: object, where: str, warnings: Warnings) -> tuple[str, ...]:
    lists = list(entry.values()) if isinstance(entry, Mapping) else [entry]
    names: dict[str, None] = {}
    for listed in lists:
        if not isinstance(listed, list):
            raise StoryboardError(f"{where} holds {describe(listed)}; allowed: lists of names")
        for name in listed:
            names[read_name(name, where, "an entity", warnings)] = None
    if len(names) > MAX_ENTITIES:
        raise StoryboardError(f"{where} holds {len(names)} names; allowed: at most {MAX_ENTITIES}")
    return tuple(names)


def read_descriptions(value: object) -> dict[str, Entity]:
    """The entities of EntityBench's ``entity_descriptions`` by name; what has another shape is left out."""
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
    found = [
        Entity(name=normalize("NFC", entry["name"].strip()), description=entry["description"].strip())
        for entry in entries
        if isinstance(entry, Mapping) and all(_is_text(entry.get(key)) for key in ("name", "description"))
    ]
    return {entity.name: entity for entity in found}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bad_character(value) is None


def entities_of(
    drafts: Sequence[Draft], table: Mapping[str, Entity], descriptions: Mapping[str, Entity], warnings: Warnings
) -> tuple[Entity, ...]:
    """The entities that shots name: those of ``table`` in its order, then the others in order of their appearance.

    A name that is almost one of ``table`` raises ``StoryboardError``; any other that is not in it has a warning.
    """
    seen: dict[str, None] = {}
    for draft in drafts:
        for name in draft.entities or ():
            if name not in table and name not in seen and (meant := _near(name, table)) is not None:
                raise StoryboardError(
                    f"{draft.at['entities']}: the entity {short(name)!r} is not in the story's entities (did you mean"
                    f" {meant!r}?); correct it, or add it there"
                )
            seen[name] = None
        if len(seen) > MAX_ENTITIES:
            raise StoryboardError(f"{draft.where}: more than {MAX_ENTITIES} entities; allowed: at most {MAX_ENTITIES}")
    spellings: dict[str, list[str]] = {}
    for name in seen:
        spellings.setdefault(" ".join(name.casefold().split()), []).append(name)
    for alike in spellings.values():
        if len(alike) > 1:
            warnings.add(f"{named(alike, 4)} differ in case or spaces alone; they are different entities")
    others = [name for name in seen if name not in table]
    if table and others and not descriptions:
        warnings.add(f"the story's entities do not describe {named(others, 4)}")
    if unseen := [name for name in table if name not in seen]:
        warnings.add(f"no shot names the entity {named(unseen, 4)}")
    return (
        *(entity for name, entity in table.items() if name in seen),
        *(descriptions.get(name) or Entity(name=name) for name in others),
    )


def _near(name: str, table: Mapping[str, Entity]) -> str | None:
    folded = {one.casefold(): one for one in table}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=_NEAR)
    return folded[near[0]] if near else None
