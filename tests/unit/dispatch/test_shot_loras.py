"""LoRAs of shots before a job starts: bad ones reject their story alone; what they need is counted; what is kept."""

import bisect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.shot_loras import OpenedLoras, check_loras
from storymem_dist.errors import ConfigError
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.wan.presets import TINY
from storymem_dist.parallel import weight_memory as memory_of_weights
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.weight_memory import WeightMemory, check_weight_memory, decide_experts
from storymem_dist.render import loras as render_loras
from storymem_dist.render.loras import LoraShelf
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.schema import Scene, Shot, ShotOptions, Story
from storymem_dist.weights.bundle import Weights, open_weights
from storymem_dist.weights.lora import lora_inputs, lora_key
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint
from tests.helpers.lora_shots import write_backbones, write_lora

Loras = tuple[Mapping[str, Any], ...]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folders = generate_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")
    settings = ModelSettings(
        t2v_checkpoint=str(folders.t2v_dir),
        i2v_checkpoint=str(folders.i2v_dir),
        storymem_lora=str(folders.lora_dir),
    )
    return open_weights(settings, ["t2v", "m2v"], "mi2v")


def story(name: str, *loras: Loras | None) -> Story:
    """Shots that are cuts."""
    shots = tuple(
        Shot(
            index=number,
            index_in_scene=number,
            scene_num=1,
            prompt="a fox",
            cut=True,
            options=ShotOptions(loras=own),
        )
        for number, own in enumerate(loras)
    )
    return Story(story_id=name, name=name, overview="", scenes=(Scene(scene_num=1, shots=shots),))


def checked(weights: Weights, *stories: Story, dtype: torch.dtype = torch.float32) -> tuple[StoryBatch, OpenedLoras]:
    opened = OpenedLoras(weights, dtype)
    batch = StoryBatch(stories=stories, rejected=())
    return check_loras(batch, SamplerSettings(), MemorySettings(), opened), opened


def only_for_i2v(path: Path) -> str:
    """A LoRA of the patch embedding of the I2V model: 36 channels in."""
    save_file(
        {
            "patch_embedding.lora_A.weight": torch.ones(2, 36, 1, 2, 2),
            "patch_embedding.lora_B.weight": torch.ones(64, 2, 1, 1, 1),
        },
        path,
    )
    return str(path)


def test_loras_are_checked_against_the_experts_that_render_the_shot(weights: Weights, tmp_path: Path) -> None:
    path = only_for_i2v(tmp_path / "camera.safetensors")
    first, second = story("first", ({"path": path},), None), story("second", None, ({"path": path},))
    batch, _ = checked(weights, first, second, story("third", None, None))
    assert [one.story_id for one in batch.stories] == ["second", "third"]
    (rejected,) = batch.rejected
    assert rejected.source == "first"
    assert rejected.message.startswith(f"first, scene 1, shot_01: {path}: made for another width")
    assert "\n" not in rejected.message


def test_other_adapters_are_refused_with_one_sentence(weights: Weights, tmp_path: Path) -> None:
    stored = {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(128, 2), "dora_scale": torch.ones(128)}
    save_file({f"blocks.0.ffn.0.{key}": value for key, value in stored.items()}, tmp_path / "dora.safetensors")
    batch, _ = checked(weights, story("first", None, ({"path": str(tmp_path / "dora.safetensors")},)))
    assert not batch.stories
    (rejected,) = batch.rejected
    assert "first, scene 1, shot_02: " in rejected.message and "this is DoRA" in rejected.message


def test_keys_that_are_left_out_and_names_of_experts_are_warned_about(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "style_high_noise.safetensors"
    halves = {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 64), "blocks.0.ffn.0.lora_B.weight": torch.ones(128, 2)}
    save_file({**halves, "something.else": torch.ones(2)}, path)
    batch, _ = checked(weights, story("first", ({"path": str(path), "unmatched": "skip"},)))
    (found,) = batch.stories
    left_out, named = found.warnings
    assert "1 keys have no place and are left out: something.else" in left_out
    assert "its name says high_noise, but it is added to low_noise" in named and "in the shot's loras" in named
    assert all(warning.startswith("first, scene 1, shot_01: ") for warning in found.warnings)


def test_a_file_that_a_shot_gets_twice_is_warned_about_once(weights: Weights, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "style.safetensors", 1, names=["blocks.0.ffn.0"])
    other = write_lora(tmp_path / "other.safetensors", 2, names=["blocks.0.ffn.0"])
    opened = OpenedLoras(weights, torch.float32)
    merged = replace(weights, loras=weights.loras | {"t2v": dict(opened.open("t2v", ({"path": path},), "key"))})
    twice = ({"path": other}, {"path": other, "strength": 0.5})
    batch, _ = checked(merged, story("first", ({"path": path},)), story("second", twice), story("third", twice[:1]))
    place = "scene 1, shot_01: "
    assert [one.warnings for one in batch.stories] == [
        (f"first, {place}{path}: model.loras has it for all shots too; the strengths add up",),
        (f"second, {place}{other}: the shot's loras name it more than once; the strengths add up",),
        (),
    ]
    experts = tuple({"path": path, "expert": expert} for expert in ("high_noise", "low_noise"))
    batch, _ = checked(weights, story("fourth", experts))
    assert batch.stories[0].warnings == ()


@pytest.mark.parametrize("wrong", [{"expert": "high"}, {"strength": float("inf")}])
def test_a_wrong_setting_is_named_as_the_storyboard_has_it(
    weights: Weights, tmp_path: Path, wrong: Mapping[str, Any]
) -> None:
    path = write_lora(tmp_path / "style.safetensors", 1, names=["blocks.0.ffn.0"])
    (rejected,) = checked(weights, story("first", ({"path": path}, {"path": path, **wrong})))[0].rejected
    assert f"first, scene 1, shot_01: loras, entry 2: {next(iter(wrong))}=" in rejected.message
    assert "model.loras" not in rejected.message


def test_what_the_largest_shot_needs_is_counted(weights: Weights, tmp_path: Path) -> None:
    names = ["blocks.0.ffn.0"]
    small = write_lora(tmp_path / "small.safetensors", 1, names=names, rank=2)
    large = write_lora(tmp_path / "large.safetensors", 2, names=names, rank=20)
    only_low = {"path": large, "expert": "low_noise"}
    _, opened = checked(weights, story("first", ({"path": small},), (only_low, {"path": small})), dtype=torch.bfloat16)
    one_rank = 2 * (64 + 128)
    assert opened.most_bytes().on_device == 22 * one_rank
    assert opened.most_bytes().on_host == (22 + 2) * one_rank
    assert opened.most_bytes(compiled=True).on_device == 32 * one_rank, "filled up to a multiple of 16"
    _, none = checked(weights, story("first", None))
    assert (none.most_bytes().on_device, none.most_bytes().on_host) == (0, 0)


def test_experts_leave_room_for_the_loras_of_a_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    model, parallel, device = ModelSettings(), ParallelSettings(), torch.device("cuda")

    def least_for_resident(extra: int) -> int:
        """The least free memory with which both experts stay on the device."""

        def fits(free: int) -> bool:
            monkeypatch.setattr(memory_of_weights, "free_device_memory_bytes", lambda device: free)
            adapters = WeightMemory(on_device=extra)
            return decide_experts(model, parallel, TINY.t2v, device, adapters=adapters).experts == "resident"

        return bisect.bisect_left(range(2**40), True, key=fits)

    assert least_for_resident(2**30) == least_for_resident(0) + 2**30
    monkeypatch.setattr(memory_of_weights, "free_device_memory_bytes", lambda device: 2**30)
    monkeypatch.setattr(memory_of_weights, "device_memory_bytes", lambda device: 2**30)
    resident = replace(model, experts="resident")
    check_weight_memory(resident, parallel, TINY.t2v, device=device, ranks_per_node=1)
    with pytest.raises(ConfigError, match=r"and the LoRAs of a shot \(1\.0 GiB\) needs 1\.0 GiB"):
        check_weight_memory(
            resident,
            parallel,
            TINY.t2v,
            device=device,
            ranks_per_node=1,
            adapters=WeightMemory(on_device=2**30),
        )


def test_the_shelf_keeps_the_latest_and_at_least_two(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_loras, "_KEPT_BYTES", 0)
    opened = OpenedLoras(weights, torch.float32)
    sets: list[Loras] = [({"path": write_backbones(tmp_path / str(number), number)},) for number in range(3)]
    keys = [lora_key(lora_inputs(loras)) for loras in sets]
    for kept, order, reads in ((0, (0, 1, 0, 1, 2, 1, 0), 4), (2**30, (0, 1, 2, 0, 1, 2), 3)):
        monkeypatch.setattr(render_loras, "_KEPT_BYTES", kept)
        shelf = LoraShelf(opened)
        for number in order:
            adapters = shelf("t2v", sets[number], keys[number])
            assert set(adapters) == {"high_noise", "low_noise"}
        assert shelf.num_reads == reads, f"with {kept} bytes"
    assert shelf("t2v", (), "") == {}
    shelf("m2v", sets[0], keys[0])
    assert shelf.num_reads == 4, "other experts, other adapters"
