"""Reads the shots of a storyboard: the keys of each, over the story's ``defaults``.

Both forms of a scene end here: ``shots``, and StoryMem's lists of prompts and cuts. What names other shots is resolved
when all shots are read (``story.recall``, ``story.entities``).
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from storymem_dist.errors import StoryboardError
from storymem_dist.story.given_files import GivenFiles
from storymem_dist.story.keys import DEFAULTS, LORA_KEYS, REFERENCE, read_keys
from storymem_dist.story.problems import Lined, at_line, describe, short
from storymem_dist.story.schema import Shot, ShotOptions, ShotReference
from storymem_dist.story.values import (
    LIST_OF_PATHS,
    MAX_SEED,
    read_entries,
    read_name,
    read_number,
    read_text,
    read_truth,
    read_whole_number,
)
from storymem_dist.story.warnings import Warnings

MAX_SECONDS = 600
"""Ten minutes; the memory of a machine ends before."""

MAX_FRAMES = 10_001
MAX_STEPS = 1000
MAX_GUIDANCE = 100
MAX_ENTRIES = 64
"""References, LoRAs and entities of a shot."""

MAX_RECALLED = 1000
NO_GUIDANCE_KEYS = "allowed: a number, or two for the high-noise and the low-noise expert: [4.0, 3.0] or {high, low}"

OF_RENDERING = (
    *("duration", "num_frames", "seed", "num_inference_steps", "guidance", "negative_prompt"),
    *("start_image", "loras", "recall"),
)
"""The keys that say how a shot is rendered; a given clip has none of them."""

OF_ONE_SHOT = ("name", "shot_id", "video")
"""The keys that have no place in ``defaults``."""


@dataclass(kw_only=True, slots=True)
class Draft:
    """A shot whose ``recall`` and ``entities`` are names as they are written; ``where`` names it in messages.

    ``defaults`` are the keys whose value is the story's, and gives way where it has no place. ``shot_id`` is another
    program's name of the shot. ``at`` has the places of single keys.
    """

    shot: Shot
    where: str
    recall: tuple[str, ...] | None = None
    defaults: frozenset[str] = frozenset()
    shot_id: str = ""
    entities: tuple[str, ...] | None = None
    at: Mapping[str, str] = field(default_factory=dict)


class ShotReader:
    """Reads the shots of one story in order. ``style`` is put before every prompt."""

    def __init__(self, defaults: object, style: str, files: GivenFiles, where: str, warnings: Warnings) -> None:
        self._style = style
        self._files = files
        self._warnings = warnings
        self._num_read = 0
        self.defaults: dict[str, Any] = {}
        if defaults is not None:
            where = f"{where}, defaults"
            written = read_keys(defaults, DEFAULTS, where, warnings, "defaults")
            for key in OF_ONE_SHOT:
                if written.get(key) is not None:
                    raise StoryboardError(f"{at_line(where, written, key)}: {key} belongs to one shot; write it there")
            self.defaults = self._values(written, where, "defaults")

    def read(self, written: Lined, *, where: str, place: str, scene_num: int, index_in_scene: int) -> Draft:
        """Read the next shot of the story. ``written`` are its keys by our names."""
        own = self._values(written, where, place)
        values = self._over_defaults(own, where, written, place)
        index, self._num_read = self._num_read, self._num_read + 1
        if values.get("prompt") is None and values.get("video") is None:
            raise StoryboardError(f"{at_line(where, written)}: 'prompt' is missing; a shot needs prompt, or video")
        is_cut = index == 0 or values.get("cut") in (None, True) or values.get("video") is not None
        if values.get("start_image") is not None and not is_cut:
            raise StoryboardError(
                f"{at_line(where, written, 'start_image')}: start_image is given for a shot that continues the one"
                " before it; write cut: true, or remove start_image"
            )
        text = values.get("prompt") or ""
        shot = Shot(
            index=index,
            index_in_scene=index_in_scene,
            scene_num=scene_num,
            prompt=f"{self._style} {text}" if self._style and text else text,
            cut=is_cut,
            name=values.get("name") or values.get("shot_id") or "",
            options=ShotOptions(
                duration=values.get("duration"),
                num_frames=values.get("num_frames"),
                seed=values.get("seed"),
                num_inference_steps=values.get("num_inference_steps"),
                guidance_scale=values.get("guidance"),
                negative_prompt=values.get("negative_prompt"),
                loras=values.get("loras"),
            ),
            start_image=values.get("start_image"),
            video=values.get("video"),
            references=values.get("references") or (),
            remember=values.get("remember") is not False,
        )
        at_keys = {key: at_line(where, written, key) for key in ("name", "recall", "entities")}
        if own.get("name") is not None and own.get("shot_id") is not None:
            self._warnings.add("shot_id is written next to name; recall knows the name", place)
        return Draft(
            shot=shot,
            where=where,
            recall=values.get("recall"),
            defaults=frozenset(self.defaults.keys() - own.keys()),
            shot_id="" if values.get("name") else values.get("shot_id") or "",
            entities=values.get("entities"),
            at=at_keys,
        )

    def _over_defaults(self, own: dict[str, Any], where: str, lines: Lined, place: str) -> dict[str, Any]:
        """The values of a shot over the story's defaults, of which those that cannot be meant for it give way."""
        defaults = dict(self.defaults)
        for key, partner in (("duration", "num_frames"), ("num_frames", "duration")):
            if own.get(key) is not None:
                defaults.pop(partner, None)
        if (defaults | own).get("cut") is False:
            defaults.pop("start_image", None)
        if own.get("video") is not None:
            for key in OF_RENDERING:
                defaults.pop(key, None)
                if own.get(key) is not None:
                    raise StoryboardError(
                        f"{at_line(where, lines, key)}: {key} says how a shot is rendered, and video gives this one;"
                        " remove one of them"
                    )
            if own.get("cut") is False:
                self._warnings.add("a given clip continues no other; its cut is read as true", place)
        return defaults | own

    def _values(self, written: Mapping[str, object], where: str, place: str) -> dict[str, Any]:
        """The value of each key that is written, checked; None for those that are written as null."""
        values: dict[str, Any] = {}
        for key, value in written.items():
            there = at_line(where, written, key)
            values[key] = None if value is None else self._readers[key](self, value, there, place)
        if values.get("duration") is not None and values.get("num_frames") is not None:
            raise StoryboardError(
                f"{at_line(where, written, 'num_frames')}: duration and num_frames are both given; keep one of them"
            )
        return values

    def _prompt(self, value: object, where: str, place: str) -> str:
        return read_text(value, where, "the prompt", self._warnings)

    def _cut(self, value: object, where: str, place: str) -> bool:
        return read_truth(value, where, place, "cut", self._warnings)

    def _name(self, value: object, where: str, place: str, key: str = "name") -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            self._warnings.add(f"{key} is a number; read as text", place)
            value = describe(value).removeprefix("the number ")
        return read_name(value, where, key, self._warnings)

    def _shot_id(self, value: object, where: str, place: str) -> str:
        return self._name(value, where, place, "shot_id")

    def _duration(self, value: object, where: str, place: str) -> float:
        seconds = read_number(value, where, "duration", 0, MAX_SECONDS)
        if not seconds:
            raise StoryboardError(f"{where}: duration is 0; allowed: seconds above 0, up to {MAX_SECONDS}")
        return seconds

    def _num_frames(self, value: object, where: str, place: str) -> int:
        return read_whole_number(value, where, "num_frames", 1, MAX_FRAMES)

    def _seed(self, value: object, where: str, place: str) -> int:
        return read_whole_number(value, where, "seed", 0, MAX_SEED)

    def _num_inference_steps(self, value: object, where: str, place: str) -> int:
        return read_whole_number(value, where, "num_inference_steps", 1, MAX_STEPS)

    def _guidance(self, value: object, where: str, place: str) -> tuple[float, float]:
        if isinstance(value, Mapping):
            keys = {str(key).removesuffix("_noise"): entry for key, entry in value.items()}
            if len(keys) != len(value) or set(keys) != {"high", "low"}:
                raise StoryboardError(f"{where}: guidance is {describe(value)}; {NO_GUIDANCE_KEYS}")
            value = [keys["high"], keys["low"]]
        if isinstance(value, list) and len(value) != 2:
            raise StoryboardError(f"{where}: guidance is {describe(value)}; {NO_GUIDANCE_KEYS}")
        high, low = value if isinstance(value, list) else (value, value)
        return (
            read_number(high, where, "guidance", 0, MAX_GUIDANCE),
            read_number(low, where, "guidance", 0, MAX_GUIDANCE),
        )

    def _negative_prompt(self, value: object, where: str, place: str) -> str:
        return read_text(value, where, "negative_prompt", self._warnings, may_be_empty=True)

    def _start_image(self, value: object, where: str, place: str) -> Any:
        return self._files.image(value, where, "start_image", f"{place}: start_image")

    def _video(self, value: object, where: str, place: str) -> Any:
        return self._files.video(value, where, "video", place)

    def _references(self, value: object, where: str, place: str) -> tuple[ShotReference, ...]:
        entries = self._entries(value, where, place, "references", LIST_OF_PATHS, single=(str, Mapping))
        return tuple(self._reference(entry, where, place, number) for number, entry in enumerate(entries, start=1))

    def _reference(self, entry: object, where: str, place: str, number: int) -> ShotReference:
        key, is_sink = f"references, entry {number},", False
        if isinstance(entry, Mapping):
            written = read_keys(entry, REFERENCE, f"{where}: {key.rstrip(',')}", self._warnings, place)
            entry, sink = written["path"], written.get("sink")
            if sink is not None:
                meaning = "true (always shown after that) or false (until newer keyframes take its place)"
                is_sink = read_truth(sink, where, place, "sink", self._warnings, meaning=meaning)
        path = self._files.image(entry, where, key, f"{place}: reference {number}")
        return ShotReference(path=path, is_sink=is_sink)

    def _loras(self, value: object, where: str, place: str) -> tuple[Mapping[str, Any], ...]:
        entries = self._entries(
            value, where, place, "loras", "paths, or of objects with path and strength", single=(str, Mapping)
        )
        return tuple(self._lora(entry, where, number) for number, entry in enumerate(entries, start=1))

    def _lora(self, entry: object, where: str, number: int) -> Mapping[str, Any]:
        key = f"loras, entry {number}"
        written = entry if isinstance(entry, Mapping) else {"path": entry}
        for name in map(str, written):
            if name not in LORA_KEYS:
                near = difflib.get_close_matches(name, LORA_KEYS, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise StoryboardError(
                    f"{where}: {key}: unknown key {short(name)!r}{hint}; allowed: {', '.join(LORA_KEYS)}"
                )
        if written.get("path") is None:
            raise StoryboardError(f"{where}: {key}: 'path' is missing; write the file as path: FILE")
        settings: dict[str, Any] = {"path": str(self._files.lora(written["path"], where, key))}
        for name in LORA_KEYS[1:]:
            if (given := written.get(name)) is None:
                continue
            is_number = name in ("strength", "alpha")
            if is_number and (isinstance(given, bool) or not isinstance(given, (int, float))):
                raise StoryboardError(f"{where}: {key}: {name} is {describe(given)}; allowed: a number")
            settings[name] = given if is_number else read_text(given, where, f"{key}: {name}", self._warnings)
        return settings

    def _remember(self, value: object, where: str, place: str) -> bool:
        meaning = "true, or false (its keyframes do not enter the memory)"
        return read_truth(value, where, place, "remember", self._warnings, meaning=meaning)

    def _entities(self, value: object, where: str, place: str) -> tuple[str, ...]:
        entries = self._entries(value, where, place, "entities", "names of what is seen in the shot")
        if isinstance(value, str) and "," in value:
            raise StoryboardError(
                f"{where}: entities is {describe(value)}; allowed: a list, with brackets and each name on its own"
            )
        names = [read_name(entry, where, "an entity", self._warnings) for entry in entries]
        return tuple(dict.fromkeys(names))

    def _recall(self, value: object, where: str, place: str) -> tuple[str, ...]:
        of_what = "names of earlier shots, such as shot_01, or references, or none"
        entries = value if isinstance(value, list) else [value]  # "recall: none" is how people write it
        if len(entries) > MAX_RECALLED:
            raise StoryboardError(f"{where}: recall has {len(entries)} entries; allowed: at most {MAX_RECALLED}")
        if isinstance(value, bool) or not isinstance(value, (list, str, int)):
            raise StoryboardError(f"{where}: recall is {describe(value)}; allowed: a list of {of_what}")
        if any(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
            self._warnings.add("recall holds a number; read as a name", place)
        return tuple(dict.fromkeys(self._recalled(entry, where) for entry in entries))

    def _recalled(self, entry: object, where: str) -> str:
        if isinstance(entry, int) and not isinstance(entry, bool):
            entry = describe(entry).removeprefix("the number ")
        return read_name(entry, where, "recall", self._warnings)

    def _entries(
        self,
        value: object,
        where: str,
        place: str,
        key: str,
        of_what: str,
        single: tuple[type, ...] = (str,),
    ) -> Any:
        return read_entries(value, where, place, key, of_what, self._warnings, most=MAX_ENTRIES, single=single)

    _readers: ClassVar[dict[str, Callable[["ShotReader", object, str, str], Any]]] = {
        "prompt": _prompt,
        "cut": _cut,
        "name": _name,
        "shot_id": _shot_id,
        "duration": _duration,
        "num_frames": _num_frames,
        "seed": _seed,
        "num_inference_steps": _num_inference_steps,
        "guidance": _guidance,
        "negative_prompt": _negative_prompt,
        "start_image": _start_image,
        "references": _references,
        "video": _video,
        "loras": _loras,
        "remember": _remember,
        "entities": _entities,
        "recall": _recall,
    }
