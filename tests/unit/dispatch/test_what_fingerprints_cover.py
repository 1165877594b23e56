"""Two storyboards give a shot the same fingerprint only where the shot sees the same: whatever was edited."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storymem_dist.dispatch.plan import plan_story
from storymem_dist.dispatch.protocol import ShotHistory
from storymem_dist.memory.bank import Keyframe
from storymem_dist.memory.settings import RECALL_RULES, MemorySettings
from storymem_dist.render.recall import memory_bank, recall
from storymem_dist.story.modes import GIVEN
from storymem_dist.story.schema import Entity, ShotReference, Story
from tests.helpers.fake_renderer import make_part
from tests.helpers.story_graphs import NAMES, shot_of, stories, story_of

Edit = Callable[[Story], Story]


def digest(*what: object) -> bytes:
    return hashlib.sha256(repr(what).encode()).digest()


def as_image(content: bytes) -> Tensor:
    return torch.tensor(list(content[:12]), dtype=torch.uint8).reshape(3, 2, 2)


@contextmanager
def pictures() -> Iterator[list[Path]]:
    """Files that stand for pictures; one is read as an image of its first bytes."""
    with TemporaryDirectory() as folder, patch("storymem_dist.render.recall.given_image") as reader:
        reader.side_effect = lambda path, sampler: as_image(digest(path.read_bytes()))
        paths = [Path(folder) / f"{number}.png" for number in range(4)]
        for path in paths:
            path.write_bytes(path.name.encode())
        yield paths


def rendered(story: Story, rule: str) -> list[tuple[str, bytes]]:
    """The fingerprint of each shot, and a digest of its pixels: of all that a renderer sees, with short memories."""
    memory = MemorySettings(recall=rule, max_keyframes=4, num_fixed=2)
    part = dataclasses.replace(make_part(Path("unused"), [], recall=rule), memory=memory)
    shots: list[tuple[str, bytes]] = []
    kept: list[list[Keyframe]] = []
    for planned in plan_story(0, part, story, {}):
        shot, needs = planned.shot, planned.needs
        job = planned.job("attempt", "")
        history = ShotHistory(keyframes=tuple(one for index in needs.memory for one in kept[index]), tail=None)
        seen = [one.image.tolist() for one in recall(memory_bank(job, history), job, memory).keyframes]
        tail = shots[-1][1] if needs.continues else None
        own = (None, 0) if planned.kind == GIVEN else (shot.prompt, planned.seed)
        given = shot.start_image if shot.video is None else shot.video  # no storyboard has both in one shot
        files = given and given.read_bytes()
        pixels = digest(planned.mode, own, files, seen, tail)
        slots = range(2 if shot.remember else 0)
        kept.append(
            [
                Keyframe(
                    image=as_image(digest(pixels, slot, needs.keeps_first)),
                    shot_index=shot.index,
                    slot=slot,
                    frame_index=slot,
                )
                for slot in slots
            ]
        )
        shots.append((planned.fingerprint, pixels))
    return shots


def check(before: Story, after: Story, rule: str) -> None:
    for index, (one, two) in enumerate(zip(rendered(before, rule), rendered(after, rule), strict=False)):
        if one[1] != two[1]:
            assert one[0] != two[0], f"shot {index} sees something else and would not be rendered again"


def with_shots(story: Story, *shots: object) -> Story:
    return dataclasses.replace(story, scenes=story_of("s", *shots).scenes)  # type: ignore[arg-type]


@st.composite
def illustrated(draw: st.DrawFn, paths: list[Path]) -> Story:
    """A story with pictures in every place that may have some."""
    images = st.lists(st.sampled_from(paths), max_size=2)
    story = draw(stories(max_shots=6, clip=paths[0]))
    shots = [
        dataclasses.replace(
            shot,
            references=tuple(
                ShotReference(path=path, is_sink=draw(st.booleans()))
                for path in (draw(images) if draw(st.booleans()) else [])
            ),
            start_image=paths[1] if shot.video is None and draw(st.integers(0, 7)) == 0 else None,
        )
        for shot in story.shots
    ]
    table = tuple(Entity(name=name, references=tuple(draw(images))) for name in draw(st.permutations(NAMES)))
    return dataclasses.replace(
        with_shots(story, *shots), entities=table, reference_images=tuple(draw(images)) if draw(st.booleans()) else ()
    )


EDITS = (
    "prompt",
    "cut",
    "remember",
    "recall",
    "entities",
    "video",
    "references",
    "start_image",
    "sinks",
    "cast",
    "images",
)


@st.composite
def edited(draw: st.DrawFn, story: Story, paths: list[Path]) -> Story:
    """The story with something else in one place."""
    key = draw(st.sampled_from(EDITS))
    if key == "cast":
        return dataclasses.replace(story, entities=tuple(draw(st.permutations(story.entities))))
    if key == "images":
        return dataclasses.replace(story, reference_images=(*story.reference_images[:-1], draw(st.sampled_from(paths))))
    shots = list(story.shots)
    index = draw(st.integers(0, len(shots) - 1))
    if key == "sinks":
        value = tuple(dataclasses.replace(one, is_sink=not one.is_sink) for one in shots[index].references)
        shots[index] = dataclasses.replace(shots[index], references=value)
        return with_shots(story, *shots)
    other = draw(st.sampled_from(draw(illustrated(paths)).shots))
    if other.index <= index:
        shots[index] = dataclasses.replace(shots[index], **{key: getattr(other, key)})
    return with_shots(story, *shots)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(RECALL_RULES))
def test_a_shot_that_sees_something_else_has_another_fingerprint(data: st.DataObject, rule: str) -> None:
    with pictures() as paths:
        story = data.draw(illustrated(paths))
        check(story, data.draw(edited(story, paths)), rule)


def references_of_the_story(first: dict[str, object]) -> Callable[[list[Path]], tuple[Story, Story]]:
    def make(paths: list[Path]) -> tuple[Story, Story]:
        fields = {key: paths[0] if key == "video" else value for key, value in first.items()}
        story = story_of("s", shot_of(0, "first", **fields), shot_of(1), shot_of(2))
        return (
            dataclasses.replace(story, reference_images=(paths[1],)),
            dataclasses.replace(story, reference_images=(paths[2],)),
        )

    return make


def sink_of_a_forgotten_shot(paths: list[Path]) -> tuple[Story, Story]:
    def story(is_sink: bool) -> Story:
        references = tuple(ShotReference(path=path, is_sink=is_sink) for path in paths[:3])
        return story_of("s", shot_of(0), shot_of(1, remember=False, references=references), shot_of(2), shot_of(3))

    return story(False), story(True)


def order_of_the_cast(paths: list[Path]) -> tuple[Story, Story]:
    story = story_of("s", shot_of(0, entities=NAMES[:2]))
    table = [Entity(name=name, references=(path,)) for name, path in zip(NAMES[:2], paths, strict=False)]
    return dataclasses.replace(story, entities=tuple(table)), dataclasses.replace(story, entities=tuple(table[::-1]))


@pytest.mark.parametrize(
    ("pair", "rule", "changed"),
    [
        (references_of_the_story({"video": True}), "window", [False, True, True]),
        (references_of_the_story({"recall": ()}), "window", [False, True, True]),
        (references_of_the_story({}), "window", [True, True, True]),
        (sink_of_a_forgotten_shot, "window", [False, True, True, True]),
        (order_of_the_cast, "entities", [True]),
    ],
)
def test_what_no_shot_before_covers_is_in_the_fingerprint(
    pair: Callable[[list[Path]], tuple[Story, Story]], rule: str, changed: list[bool]
) -> None:
    with pictures() as paths:
        before, after = pair(paths)
        both = list(zip(rendered(before, rule), rendered(after, rule), strict=True))
        assert [one[1] != two[1] for one, two in both] == changed, "the test is about pictures that differ"
        assert [one[0] != two[0] for one, two in both] == changed
