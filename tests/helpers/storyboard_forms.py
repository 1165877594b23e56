"""Storyboards with one meaning, written in a random one of the ways that people and language models write them."""

import copy
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

Document = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """What a storyboard means: its name, and (prompt, cut, scene_num) of each shot; the first is always a cut."""

    name: str
    shots: tuple[tuple[str, bool, int], ...]


@dataclass(frozen=True)
class Written:
    """One file. ``is_repaired``: it differs from the format, so its stories must have warnings."""

    suffix: str
    raw: bytes
    truth: tuple[Truth, ...]
    is_repaired: bool


def _is_text(text: str) -> bool:
    return bool(text.strip()) and any(unicodedata.category(character)[0] not in "ZC" for character in text)


LETTERS = st.characters(exclude_categories=("Cc", "Cs", "Cn", "Zl", "Zp"), exclude_characters="\ufeff")
TRAPS = (
    "yes",
    "null",
    "42",
    "2024-01-01",
    "a: b",
    "a # b",
    "[wide] a",
    "*a",
    '"x" y',
    "@a",
    "'a'",
    "C:\\new",
    "```",
    "- a",
    "{a}",
)
TEXTS = (st.text(LETTERS, min_size=1, max_size=30) | st.sampled_from(TRAPS)).filter(_is_text).map(str.strip)
NAMES = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=12)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """A storyboard in the format."""
    scenes = []
    for scene_num in range(1, draw(st.integers(1, 3)) + 1):
        prompts = draw(st.lists(TEXTS, min_size=1, max_size=3))
        cuts = [draw(st.booleans()) for _ in prompts]
        scenes.append({"scene_num": scene_num, "video_prompts": prompts, "cut": cuts})
    return {"story_name": draw(NAMES), "story_overview": draw(st.just("") | TEXTS), "scenes": scenes}


def meaning(document: Document) -> Truth:
    """What ``document``, in the format, means."""
    shots = [
        (prompt, cut, scene["scene_num"])
        for scene in document["scenes"]
        for prompt, cut in zip(scene["video_prompts"], scene["cut"], strict=True)
    ]
    prompt, _, scene_num = shots[0]
    return Truth(name=document["story_name"], shots=((prompt, True, scene_num), *shots[1:]))


def _one_prompt_as_text(scene: Document) -> bool:
    if len(scene["video_prompts"]) != 1:
        return False
    scene["video_prompts"] = scene["video_prompts"][0]
    return True


def _no_cut(scene: Document) -> bool:
    if len(scene["cut"]) != 1 or not scene["cut"][0]:
        return False
    del scene["cut"]
    return True


def _cut_as_one_value(scene: Document) -> bool:
    if len(scene["cut"]) != 1:
        return False
    scene["cut"] = scene["cut"][0]
    return True


def _cut_as_numbers(scene: Document) -> bool:
    scene["cut"] = [int(cut) for cut in scene["cut"]]
    return True


def _cut_as_text(scene: Document) -> bool:
    scene["cut"] = [str(cut) for cut in scene["cut"]]
    return False  # ST-Bench's own form


def _number_as_text(scene: Document) -> bool:
    scene["scene_num"] = str(scene["scene_num"])
    return True


def _number_as_float(scene: Document) -> bool:
    scene["scene_num"] = float(scene["scene_num"])
    return True


def _no_number(scene: Document) -> bool:
    del scene["scene_num"]
    return True


def _prompts_as_objects(scene: Document) -> bool:
    scene["video_prompts"] = [{"prompt": prompt} for prompt in scene["video_prompts"]]
    return True


def _prompts_with_cuts(scene: Document) -> bool:
    cuts = scene.pop("cut")
    scene["video_prompts"] = [
        {"text": prompt, "cut": cut} for prompt, cut in zip(scene["video_prompts"], cuts, strict=True)
    ]
    return True


def _keys_of_a_planner(document: Document) -> bool:
    document["duration_seconds"] = 5
    document["entity_schedule"] = {"1:1": {"characters": ["Ada"]}}
    return True


def _no_overview(document: Document) -> bool:
    del document["story_overview"]
    return False  # nothing reads it


def _other_spelling(document: Document) -> bool:
    document["storyName"] = document.pop("story_name")
    return True


STORY_CHANGES = (_keys_of_a_planner, _no_overview, _other_spelling)
SCENE_CHANGES = (
    *(_cut_as_text, _cut_as_numbers, _cut_as_one_value, _no_cut, _one_prompt_as_text, _prompts_as_objects),
    *(_prompts_with_cuts, _number_as_text, _number_as_float, _no_number),
)
"""Each changes a storyboard (a scene) without changing its meaning, and returns whether a warning must say so."""


@st.composite
def changed(draw: st.DrawFn, document: Document) -> tuple[Document, bool]:
    """``document`` changed in up to three ways, and whether a warning must say so."""
    document = copy.deepcopy(document)
    is_repaired = False
    if draw(st.booleans()):
        is_repaired |= draw(st.sampled_from(STORY_CHANGES))(document)
    if draw(st.booleans()):
        change = draw(st.sampled_from(SCENE_CHANGES))
        warned = [change(scene) for scene in document["scenes"]]
        is_repaired |= any(warned)
    if draw(st.integers(0, 5)) == 0:
        document["scenes"] = {f"scene_{index}": scene for index, scene in enumerate(document["scenes"], start=1)}
        is_repaired = True
    return document, is_repaired


def as_json5(value: object) -> str:
    """``value`` with single quotes, keys without quotes, trailing commas and a comment."""
    if isinstance(value, dict):
        return "{" + "".join(f"{_key(key)}: {as_json5(item)}, /* , */\n" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + "".join(f"{as_json5(item)},\n" for item in value) + "] // end\n"
    if isinstance(value, str):
        return "'" + json.dumps(value, ensure_ascii=False)[1:-1].replace("'", "\\'") + "'"
    return json.dumps(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z_]\w*", key) else json.dumps(key)


WRITERS: dict[str, tuple[tuple[str, ...], Callable[[Any], str]]] = {
    "json": ((".json", ".json5", ".JSON"), lambda value: json.dumps(value, ensure_ascii=False, indent=1)),
    "ascii": ((".json", ".jsonl"), json.dumps),
    "json5": ((".json5", ".json"), as_json5),
    "yaml": ((".yaml", ".yml"), lambda value: yaml.safe_dump(value, allow_unicode=True, sort_keys=False)),
    "quoted yaml": ((".yaml",), lambda value: yaml.safe_dump(value, default_style='"', sort_keys=False)),
    "flow yaml": ((".yml",), lambda value: yaml.safe_dump(value, default_flow_style=True, width=60)),
}
WRAPPERS: tuple[Callable[[Any], Any], ...] = (
    lambda document: [document],
    lambda document: {"story": document},
    lambda document: {"data": {"storyboard": document}},
    lambda document: {"stories": [document]},
)


@st.composite
def one_story(draw: st.DrawFn) -> Written:
    """A file of one story."""
    document = draw(documents())
    truth = meaning(document)
    value: Any
    value, is_repaired = draw(changed(document))
    if draw(st.integers(0, 3)) == 0:
        value, is_repaired = draw(st.sampled_from(WRAPPERS))(value), True
    kind = draw(st.sampled_from(sorted(WRITERS)))
    suffixes, write = WRITERS[kind]
    text = write(value)
    if draw(st.integers(0, 3)) == 0 and "\n```" not in f"\n{text}":
        language = "yaml" if "yaml" in kind else draw(st.sampled_from(["json", ""]))
        before, after = draw(st.sampled_from([("", ""), ("Here it is, as asked:\n\n", "\n\nEnjoy."), ("", "\n")]))
        text, is_repaired = f"{before}```{language}\n{text}\n```{after}", True
    if draw(st.booleans()) and "\r" not in text:
        text = text.replace("\n", "\r\n")
    raw = text.encode("utf-8-sig" if draw(st.booleans()) else "utf-8")
    return Written(draw(st.sampled_from(suffixes)), raw, (truth,), is_repaired)


@st.composite
def several_stories(draw: st.DrawFn) -> Written:
    """A file of two or three stories."""
    stories = draw(st.lists(documents(), min_size=2, max_size=3))
    form = draw(st.sampled_from(["list", "object", "lines", "documents"]))
    if form == "lines":
        suffix, text = ".jsonl", "\n\n".join(json.dumps(story, ensure_ascii=False) for story in stories) + "\n"
    elif form == "documents":
        suffix, text = ".yaml", yaml.safe_dump_all(stories, allow_unicode=True)
    else:
        suffix, text = ".json", json.dumps(stories if form == "list" else {"stories": stories}, indent=1)
    return Written(suffix, text.encode(), tuple(map(meaning, stories)), form == "object")
