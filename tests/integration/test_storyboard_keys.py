"""Random stories with the keys of shots: in both forms they load equal, they are valid against the published schema,
and random damage gives a story or one sentence, never a traceback.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from PIL import Image

from storymem_dist.errors import StoryboardError
from storymem_dist.story.json_schema import storyboard_schema
from storymem_dist.story.loading import load_storyboard, load_storyboards
from storymem_dist.story.schema import REFERENCES, Story
from tests.helpers.storyboard_forms import NAMES, TEXTS
from tests.helpers.videos import write_video

VALIDATOR = Draft7Validator(storyboard_schema())
KNOWN = [
    *("prompt", "cut", "name", "duration", "num_frames", "seed", "num_inference_steps", "guidance", "negative_prompt"),
    *("start_image", "references", "video", "loras", "remember", "entities", "recall", "shots", "defaults"),
]
FUZZ = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

SCALES = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 2))
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "num_inference_steps": st.integers(1, 50),
        "guidance": SCALES
        | st.lists(SCALES, min_size=2, max_size=2)
        | st.fixed_dictionaries({"high": SCALES, "low": SCALES}),
        "negative_prompt": TEXTS | st.just(""),
        "remember": st.booleans(),
    },
)
LENGTHS = st.sampled_from([{}, {"duration": 2.5}, {"num_frames": 33}])
WORDS = st.lists(st.sampled_from(["Mira", "Ole", "harbour"]), max_size=3, unique=True)


@st.composite
def shots(draw: st.DrawFn, index: int, remembered: list[str]) -> dict[str, Any]:
    """A shot of the format, in a story whose earlier shots of a memory have these names."""
    shot: dict[str, Any] = {"prompt": draw(TEXTS), "cut": draw(st.booleans())}
    shot |= draw(OPTIONS) | draw(LENGTHS)
    if draw(st.booleans()):
        shot["entities"] = draw(WORDS)
    if (shot["cut"] or index == 0) and draw(st.integers(0, 3)) == 0:
        shot["start_image"] = "still.png"
    if draw(st.integers(0, 3)) == 0:
        shot["references"] = draw(
            st.lists(st.sampled_from(["still.png", {"path": "still.png", "sink": True}]), min_size=1, max_size=2)
        )
    if draw(st.integers(0, 3)) == 0:
        shot["loras"] = ["push.safetensors", {"path": "push.safetensors", "strength": 0.5, "expert": "low_noise"}]
    if draw(st.booleans()):
        recalled = draw(st.lists(st.sampled_from(remembered), unique=True)) if remembered else []
        shot["recall"] = recalled or draw(st.sampled_from(["none", [], ["references"]]))
    if index and draw(st.integers(0, 4)) == 0:
        kept = {key: shot[key] for key in ("entities", "references", "remember") if key in shot}
        shot = {"video": "filmed.mp4"} | kept
    return shot


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A storyboard of the format with shots."""
    scenes, remembered, index = [], [], 0
    for scene_num in range(1, draw(st.integers(1, 3)) + 1):
        written = []
        for _ in range(draw(st.integers(1, 3))):
            shot = draw(shots(index, remembered))
            names = [f"shot_{index + 1:02d}"]
            if draw(st.booleans()):
                shot["name"] = f"{draw(NAMES)} {index}"
                names.append(shot["name"])
            remembered += names if shot.get("remember", True) else []
            written.append(shot)
            index += 1
        scenes.append({"scene_num": scene_num, "shots": written})
    document: dict[str, Any] = {"story_name": draw(NAMES), "reference_images": ["still.png"], "scenes": scenes}
    if draw(st.booleans()):
        document["defaults"] = draw(OPTIONS) | draw(LENGTHS)
        if not document["defaults"].get("remember", True):
            del document["defaults"]["remember"]  # earlier shots may be recalled
    return document


def in_the_other_form(document: dict[str, Any]) -> dict[str, Any]:
    """The same story with defaults written in each shot, and EntityBench's schedule in place of its entities."""
    other = copy.deepcopy(document)
    defaults = other.pop("defaults", {})
    schedule = {}
    rendering = ("seed", "num_inference_steps", "guidance", "negative_prompt", "duration", "num_frames")
    for scene in other["scenes"]:
        for number, shot in enumerate(scene["shots"], start=1):
            left_out = rendering if "video" in shot else ()
            has_length = "duration" in shot or "num_frames" in shot
            lengths = ("duration", "num_frames") if has_length else ()
            for key, value in defaults.items():
                if key not in (*left_out, *lengths):
                    shot.setdefault(key, value)
            if entities := shot.pop("entities", []):
                schedule[f"{scene['scene_num']}:{number}"] = {"characters": entities}
            if "prompt" in shot:
                shot["video_prompt"] = shot.pop("prompt")
            if "name" in shot:
                shot["shot_id"] = shot.pop("name")
    return other | ({"entity_schedule": schedule} if schedule else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("keys")
    Image.new("RGB", (8, 6)).save(folder / "still.png")
    (folder / "push.safetensors").touch()
    write_video(folder / "filmed.mp4")
    yield folder


def load(folder: Path, document: object, suffix: str) -> Story:
    path = folder / f"story{suffix}"
    text = json.dumps(document)
    if suffix == ".yaml":  # from JSON: parts that two shots share would become aliases
        text = yaml.safe_dump(json.loads(text), allow_unicode=True, sort_keys=False)
    path.write_text(text)
    story = load_storyboard(path)
    assert [shot.index for shot in story.shots] == list(range(len(story.shots))) and story.shots[0].cut
    for shot in story.shots:
        assert shot.recall is None or (
            list(shot.recall) == sorted(set(shot.recall)) and all(REFERENCES <= one < shot.index for one in shot.recall)
        )
        assert set(shot.entities) <= {entity.name for entity in story.entities}
    return story


@FUZZ
@given(document=documents(), suffix=st.sampled_from([".json", ".yaml"]))
def test_a_story_is_the_same_in_both_forms_and_valid_against_the_schema(
    folder: Path, document: dict[str, Any], suffix: str
) -> None:
    story = load(folder, document, suffix)
    other_document = in_the_other_form(document)
    other = load(folder, other_document, suffix)
    assert story == other and story.warnings == ()
    VALIDATOR.validate(document)
    VALIDATOR.validate(other_document)


@FUZZ
@given(document=documents())
def test_a_story_of_prompts_and_cuts_is_the_same_with_lists_and_with_shots(
    folder: Path, document: dict[str, Any]
) -> None:
    for scene in document["scenes"]:
        scene["shots"] = [
            {"prompt": shot.get("prompt", "The sea."), "cut": shot.get("cut", True)} for shot in scene["shots"]
        ]
    lists = copy.deepcopy(document)
    for scene in lists["scenes"]:
        written = scene.pop("shots")
        scene["video_prompts"] = [shot["prompt"] for shot in written]
        scene["cut"] = [shot["cut"] for shot in written]
    assert load(folder, document, ".json") == load(folder, lists, ".json")


def places(value: object) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]  # type: ignore[index]


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [10**400, "x" * 300, "still.png", "filmed.mp4", "a\0b", "shot_01", "shot_02", "none", "\ud800", "/", "~"]
    )
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KNOWN, "path", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    document = draw(documents())
    for _ in range(draw(st.integers(1, 3))):
        found = places(document)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        action = draw(st.sampled_from(["replace", "remove", "add", "rename"]))
        if action == "remove":
            container.pop(key)
        elif action == "replace" or isinstance(container, list):
            container[key] = draw(VALUES)
        elif action == "add":
            container[draw(st.sampled_from(KNOWN))] = draw(VALUES)
        else:
            container[draw(st.sampled_from([*KNOWN, "sede", "Recall", "first_frame"]))] = container.pop(key)
    return document


@settings(FUZZ, max_examples=250)
@given(document=damaged(), suffix=st.sampled_from([".json", ".yaml"]))
def test_a_damaged_story_is_a_story_or_one_sentence(folder: Path, document: dict[str, Any], suffix: str) -> None:
    path = folder / f"damaged{suffix}"
    text = json.dumps(document) if suffix == ".json" else yaml.safe_dump(document)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        story = load_storyboard(path)
    except StoryboardError as error:
        said = str(error).removeprefix(str(path))
        assert said != str(error) and said.isprintable() and len(said) < 1000, error
        return
    for shot in story.shots:
        repr(shot).encode()
    assert all(warning.isprintable() for warning in story.warnings)


@settings(FUZZ, max_examples=120)
@given(
    rows=st.lists(
        st.just({"path": "story.json"})
        | st.fixed_dictionaries(
            {},
            optional={
                "path": VALUES,
                "id": VALUES,
                "priority": VALUES,
                "seed": VALUES,
                "scenes": VALUES,
                "owner": VALUES,
            },
        )
        | VALUES,
        min_size=1,
        max_size=4,
    )
)
def test_a_damaged_list_stops_no_other_row(folder: Path, rows: list[Any]) -> None:
    (folder / "story.json").write_text(json.dumps({"scenes": [{"video_prompts": ["The sea."]}]}))
    path = folder / "list.jsonl"
    good = {"path": "story.json", "id": "the good one", "seed": 3}
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *rows]))
    batch = load_storyboards(path)
    assert ("the_good_one", 3) in [(story.story_id, story.seed) for story in batch.stories]
    assert len(batch.stories) + len(batch.rejected) >= len(rows) + 1
    for one in batch.rejected:
        assert one.message.isprintable() and one.message.startswith(str(folder)), one.message
