"""The memory of a story as a value: what the bank and the selection of a render job do, without a job."""

from typing import Any

import pytest
import torch

from storymem_dist.errors import ConfigError, WeightsNotFound
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.pipeline import StoryMemory

WITHOUT_WEIGHTS = MemorySettings(similarity="hsv", quality="none")


def plain_clip(look: int, num_frames: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    """A red, a white, or a half red and half white clip: three that no scorer takes for each other."""
    clip = torch.full((num_frames, height, width, 3), 255, dtype=torch.uint8)
    white_from = {0: width, 1: 0, 2: width // 2}[look]
    clip[:, :, :white_from] = torch.tensor([100, 0, 0], dtype=torch.uint8)
    return clip


def test_remembering_gives_a_new_value_and_the_keyframes() -> None:
    empty = StoryMemory(selection=WITHOUT_WEIGHTS)
    found = empty.remember(plain_clip(0))
    assert (len(empty), empty.next_shot, len(found.memory), found.memory.next_shot) == (0, 0, 1, 1)
    assert torch.equal(found.keyframes, plain_clip(0)[:1])
    assert [one["verdict"] for one in found.decisions] == ["kept"]
    again = found.memory.remember(plain_clip(0))
    assert again.keyframes.shape == (0, 32, 48, 3), "the memory holds the like of it"
    assert (len(again.memory), again.memory.next_shot) == (1, 2)
    assert [one.name for one in again.memory.remember(plain_clip(1)).memory.keyframes] == [
        "shot_01 keyframe 0",
        "shot_03 keyframe 0",
    ]


def test_a_shot_is_shown_the_oldest_and_the_newest() -> None:
    pictures = [torch.full((8, 8, 3), number, dtype=torch.uint8) for number in range(6)]
    memory = StoryMemory(max_keyframes=3, num_fixed=1).with_references(pictures[:3]).with_references(pictures[3:])
    assert [int(image[0, 0, 0]) for image in memory.images()] == [0, 4, 5]
    assert [int(image[0, 0, 0]) for image in memory.with_limits(num_fixed=3).images()] == [0, 1, 2]
    assert memory.num_references == len(memory) == 6


def test_pictures_and_clips_of_other_sizes_are_compared_at_the_size_of_the_clip() -> None:
    memory = StoryMemory(selection=WITHOUT_WEIGHTS).with_references(plain_clip(0, 1, 100, 60))
    assert memory.remember(plain_clip(0)).keyframes.shape[0] == 0
    kept = memory.remember(plain_clip(2, height=64, width=64)).memory
    assert [one.image.shape for one in kept.keyframes] == [(3, 100, 60), (3, 64, 64)]
    assert [one.image.shape for one in kept.at_size(32, 48)] == [(3, 32, 48)] * 2


def test_the_number_of_keyframes_and_the_threshold_are_those_of_the_call() -> None:
    clip = torch.cat([plain_clip(look, 2) for look in (0, 1, 2)])
    memory = StoryMemory(selection=WITHOUT_WEIGHTS)
    assert [len(memory.remember(clip, count).keyframes) for count in (3, 1)] == [3, 1]
    with pytest.raises(ConfigError, match=r"memory.max_per_shot=0 is not allowed"):
        memory.remember(clip, 0)
    with pytest.raises(ConfigError, match=r"memory.similarity_threshold=0 is not allowed"):
        memory.remember(clip, similarity_threshold=0)


def test_the_default_scorer_without_its_weights_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    selection = MemorySettings(clip_model="no-such/clip", quality="none")
    with pytest.raises(WeightsNotFound, match=r"run: hf download openai/clip-vit-base-patch32"):
        StoryMemory().remember(plain_clip(0), selection=selection)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 3), "^num_fixed=3 is not allowed; it must be at most max_keyframes=2"),
        ((-1, 0), "^max_keyframes=-1"),
        ((2.5, 0), "^max_keyframes=2.5 is not allowed; it must be a whole number"),
    ],
)
def test_impossible_limits_are_refused(sizes: tuple[Any, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StoryMemory(*sizes)
