"""Prompts are encoded in growing groups, each once, in the order in which shots are claimed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.errors import MachineError
from storymem_dist.render.prompts import FIRST_PER_RANK, GROWTH, CachedPrompts, prompts_left, shots_left
from storymem_dist.story.schema import ShotOptions
from tests.helpers.batches import render
from tests.helpers.fake_renderer import FakeRenderer, make_part, make_story
from tests.helpers.videos import write_video

MANY = [f"prompt {number}" for number in range(200)]


@dataclass(frozen=True)
class World:
    rank: int = 0
    world_size: int = 1


class CountingEncoder:
    """Encodes to a constant and counts texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        self.texts += texts
        return [torch.full((1, 2), float(len(text))) for text in texts]


class CountingLoads:
    """A loader of one encoder."""

    def __init__(self) -> None:
        self.encoder = CountingEncoder()
        self.num = 0

    def __call__(self) -> CountingEncoder:
        self.num += 1
        return self.encoder


def test_prompts_are_encoded_once_and_lost_ones_again(tmp_path: Path) -> None:
    cache, loads = PromptCache(tmp_path, "encoder"), CountingLoads()
    for _ in range(2):
        prompts = CachedPrompts(cache, loads)
        prompts.begin(lambda: ["a", "b"], ["ugly"], World())
        assert loads.encoder.texts == ["ugly", "a", "b"]
    cache.path("a").unlink()
    assert prompts.embeds("a").shape == (1, 2)
    assert loads.encoder.texts == ["ugly", "a", "b", "a"]


def test_the_first_shot_waits_for_a_few_prompts_and_each_is_encoded_once(tmp_path: Path) -> None:
    cache, loads, rooms = PromptCache(tmp_path, "encoder"), CountingLoads(), list[int]()
    prompts = CachedPrompts(cache, loads, make_room=lambda: rooms.append(len(loads.encoder.texts)))
    prompts.begin(lambda: MANY, ["ugly"], World())
    assert loads.encoder.texts == ["ugly", *MANY[:FIRST_PER_RANK]]
    sizes = []
    for prompt in MANY:
        before = len(loads.encoder.texts)
        assert torch.equal(prompts.embeds(prompt), torch.full((1, 2), float(len(prompt))))
        assert prompts.embeds("ugly").shape == (1, 2)
        if grown := len(loads.encoder.texts) - before:
            sizes.append(grown)
    assert sizes == [GROWTH * FIRST_PER_RANK, GROWTH**2 * FIRST_PER_RANK, 200 - FIRST_PER_RANK * (1 + 4 + 16)]
    assert loads.encoder.texts == ["ugly", *MANY] and loads.num == 4 and len(rooms) == 3


def test_replicas_encode_disjoint_shares_and_do_not_wait_for_each_other(tmp_path: Path) -> None:
    loads = [CountingLoads() for _ in range(2)]
    replicas = [
        CachedPrompts(PromptCache(tmp_path, "e"), load, replica=index, num_replicas=2)
        for index, load in enumerate(loads)
    ]
    for prompts in replicas:
        prompts.begin(lambda: MANY, [], World())
    for index, prompt in enumerate(MANY):  # claims alternate
        replicas[index % 2].embeds(prompt)
    encoded = [text for load in loads for text in load.encoder.texts]
    assert sorted(encoded) == sorted(MANY)
    assert all(len(load.encoder.texts) > 50 for load in loads)


def test_a_stage_is_marked_only_while_prompts_are_encoded(tmp_path: Path) -> None:
    stages: list[str] = []

    class Stage:
        def __init__(self, name: str) -> None:
            stages.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    prompts = CachedPrompts(PromptCache(tmp_path, "e"), CountingLoads())
    prompts.begin(lambda: MANY, [], World())
    prompts.embeds(MANY[0], Stage)
    assert stages == []
    prompts.embeds(MANY[20], Stage)
    assert stages == ["text"]


def test_the_prompts_of_what_is_left_come_in_the_order_of_claims(tmp_path: Path) -> None:
    stories = [make_story("ocean", 3), make_story("city", 2), make_story("wood", 5), make_story("hill", 1)]
    expected = prompts_left([make_part(tmp_path / "run", stories)], 1)
    assert len(expected) == 11
    rendered: list[str] = []
    renderer = FakeRenderer(before_step=lambda job, step: rendered.append(job.shot.prompt) if step == 0 else None)
    render(tmp_path / "run", stories, renderer=renderer, overlap_saving=False)
    assert rendered == expected


def test_committed_shots_need_no_prompts(tmp_path: Path) -> None:
    stories = [make_story("ocean", 3), make_story("city", 2)]
    render(tmp_path / "run", [stories[1]])
    part = make_part(tmp_path / "run", stories)
    assert [shot.shot_id for shots in shots_left([part]) for shot in shots] == ["shot_01", "shot_02", "shot_03"]
    assert prompts_left([part], 1) == [f"ocean, shot {index}" for index in range(3)]


def test_a_cache_that_cannot_be_written_is_a_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = CachedPrompts(PromptCache(tmp_path, "e"), CountingLoads())
    monkeypatch.setattr("storymem_dist.artifacts.prompt_cache.write_bytes", lambda *a, **b: _full())
    with pytest.raises(MachineError, match="No space left"):
        prompts.begin(lambda: MANY, [], World())


def _full() -> None:
    raise OSError(28, "No space left on device")


def test_negative_prompts_of_shots_are_encoded_after_their_prompts_and_given_clips_need_no_text(tmp_path: Path) -> None:
    story = make_story("fox", 4)
    (scene,) = story.scenes
    clip = write_video(tmp_path / "clip.mp4", 3)
    changes: dict[int, dict[str, object]] = {
        1: {"video": clip},
        2: {"options": ShotOptions(negative_prompt="no clouds")},
        3: {"options": ShotOptions(negative_prompt="no rain", guidance_scale=(1.0, 1.0))},
    }
    shots = tuple(replace(shot, **changes.get(shot.index, {})) for shot in scene.shots)
    story = replace(story, scenes=(replace(scene, shots=shots),))
    part = make_part(tmp_path / "run", [story])
    part.run.open()
    assert prompts_left([part], 1) == [shots[0].prompt, shots[2].prompt, "no clouds", shots[3].prompt]
