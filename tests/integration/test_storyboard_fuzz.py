"""Storyboards in every form with one meaning load and equal it; a thousand that nobody would write give a story or one
useful message. Nothing crashes or hangs, and nothing is repaired without a warning.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboard, load_storyboards
from storymem_dist.story.schema import Story
from tests.helpers.storyboard_forms import Truth, Written, one_story, several_stories

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.*"))
GOOD: dict[str, Any] = {
    "story_name": "The Lamp",
    "story_overview": "A “night”.",
    "seed": 3,
    "style": "Ink.",
    "scenes": [
        {"scene_num": 1, "video_prompts": ["She climbs.", "She lights it."], "cut": [True, False]},
        {"scene_num": 2, "video_prompts": ["The sea."], "cut": ["False"], "first_frame_prompt": [""]},
    ],
}

KEYS = st.sampled_from(["scenes", "cut", "cuts", "video_prompts", "seed", "style", "reference_images", "", "\0", "<<"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**100, max_value=10**4000)
    | st.floats()
    | st.text()
    | st.sampled_from(["true", "FALSE", " ", "\u200b", "\ud800", "x" * 20_000, "/dev/zero", ".", "/", "~", "a\0b"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(), inner, max_size=4),
    max_leaves=12,
)


def places(value: object) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@st.composite
def mutated_documents(draw: st.DrawFn) -> object:
    document = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(document) or [(document, "scenes")]))
        action = draw(st.sampled_from(["replace", "delete", "duplicate", "rename"]))
        if action == "replace" or (action == "rename" and isinstance(container, list)):
            container[key] = draw(VALUES)
        elif action == "delete":
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        elif action == "duplicate" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif isinstance(container, dict) and key in container:
            container[draw(KEYS)] = container.pop(key)
    return document


@st.composite
def damaged_texts(draw: st.DrawFn) -> bytes:
    raw = bytearray(draw(st.sampled_from([path.read_bytes() for path in EXAMPLES])))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        length = draw(st.sampled_from([0, 1, 2, 50, len(raw)]))
        junk = draw(
            st.binary(max_size=8) | st.sampled_from([b'"', b"{", b"]", b",", b"/*", b"*x", b"\n", b"\xff", b": "])
        )
        raw[start : start + length] = junk
    return bytes(raw)


def outcome(path: Path, raw: bytes) -> Story | str:
    path.write_bytes(raw)
    try:
        story = load_storyboard(path)
    except StoryboardError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert len(message.removeprefix(str(path))) < 1000, message
        assert message.isprintable(), message
        message.encode()  # can be printed and logged
        return message
    assert isinstance(story, Story) and story.shots and story.shots[0].cut
    assert [shot.index for shot in story.shots] == list(range(len(story.shots)))
    for shot in story.shots:
        assert shot.prompt.strip()
        shot.prompt.encode()
    assert all(warning.isprintable() and len(warning) < 1000 for warning in story.warnings)
    return story


def truth_of(story: Story) -> Truth:
    return Truth(name=story.name, shots=tuple((shot.prompt, shot.cut, shot.scene_num) for shot in story.shots))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


FUZZ = settings(
    max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@FUZZ
@given(document=mutated_documents() | VALUES)
def test_mutated_documents_written_as_json(folder: Path, document: object) -> None:
    outcome(folder / "a.json", json.dumps(document).encode())


@FUZZ
@given(document=mutated_documents() | VALUES)
def test_mutated_documents_written_as_yaml(folder: Path, document: object) -> None:
    outcome(folder / "a.yaml", yaml.safe_dump(document).encode("utf-8", "surrogatepass"))


@FUZZ
@given(raw=damaged_texts(), suffix=st.sampled_from([".json", ".json5", ".yaml"]))
def test_damaged_example_files(folder: Path, raw: bytes, suffix: str) -> None:
    outcome(folder / f"a{suffix}", raw)


@FUZZ
@given(
    raw=st.binary(max_size=400) | st.text(alphabet="{}[]:,\"'/*\\&!|>-? \n0xeNaIt", max_size=400).map(str.encode),
    suffix=st.sampled_from([".json", ".json5", ".yml"]),
)
def test_raw_bytes(folder: Path, raw: bytes, suffix: str) -> None:
    assert isinstance(outcome(folder / f"a{suffix}", raw), str)


@FUZZ
@given(written=one_story())
def test_every_form_with_one_meaning_loads_and_equals_it(folder: Path, written: Written) -> None:
    story = outcome(folder / f"a{written.suffix}", written.raw)
    assert isinstance(story, Story), story
    assert (truth_of(story),) == written.truth
    assert bool(story.warnings) == written.is_repaired, story.warnings


@FUZZ
@given(written=several_stories())
def test_every_file_of_several_stories_is_one_story_each(folder: Path, written: Written) -> None:
    path = folder / f"several{written.suffix}"
    path.write_bytes(written.raw)
    batch = load_storyboards(path)
    assert not batch.rejected
    assert tuple(map(truth_of, batch.stories)) == written.truth
    assert [story.story_id for story in batch.stories] == [f"several-{n + 1}" for n in range(len(written.truth))]
    assert all(bool(story.warnings) == written.is_repaired for story in batch.stories)


@FUZZ
@given(
    written=one_story(),
    junk=st.sampled_from(['"', "{", "]", ",", "\n", "“", "...", "#", ": ", "\\", "```", "\x00"]),
    at=st.floats(0, 1),
)
def test_a_form_with_a_flaw_is_a_story_or_one_sentence(folder: Path, written: Written, junk: str, at: float) -> None:
    place = round(at * len(written.raw))
    outcome(folder / f"flawed{written.suffix}", written.raw[:place] + junk.encode() + written.raw[place:])


def test_the_fuzzer_starts_from_a_good_story(folder: Path) -> None:
    assert isinstance(outcome(folder / "good.json", json.dumps(GOOD).encode()), Story)
    assert [isinstance(load_storyboard(path), Story) for path in EXAMPLES] == [True, True, True]
