"""One shot with a memory value: modes, refusals before anything is loaded, interruption, and what is freed."""

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem_dist import WeightsNotFound
from storymem_dist.errors import ConfigError, ShotError, StoryMemError
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.pipeline import (
    Interrupted,
    ShotOutput,
    StoryMemory,
    StoryModels,
    check_models,
    check_shot,
    check_story,
    loaded_models,
    model_names,
    open_models,
    render_shot,
    story_seed,
    to_frames,
    unload_all,
)
from storymem_dist.pipeline import (
    models as models_module,
)
from tests.helpers.host_programs import OVERRIDES

PICTURE = torch.randint(0, 256, (1, 40, 40, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def models() -> Iterator[StoryModels]:
    opened = open_models("tiny", device="cpu", overrides=(*OVERRIDES, "sampler.num_frames=5"))
    yield opened
    opened.unload()


@pytest.fixture(scope="module")
def first(models: StoryModels) -> ShotOutput:
    return render_shot(models, "a fox", seed=3)


def experts_in_memory() -> int:
    gc.collect()
    return sum(type(one) is WanDiT and not next(one.parameters()).is_meta for one in gc.get_objects())


def test_a_first_shot_has_frames_a_last_frame_and_a_memory(first: ShotOutput) -> None:
    assert first.frames.shape == (5, 32, 48, 3) and first.frames.dtype == torch.uint8
    assert first.images().shape == first.frames.shape and first.images().max() <= 1
    assert torch.equal(first.last_frame[0], first.frames[-1])
    assert len(first.memory) == len(first.keyframes) > 0
    assert (first.mode, first.seed, first.fps, first.memory.next_shot) == ("t2v", 3, 16, 1)


def test_a_shot_that_continues_another_has_new_frames_only(models: StoryModels, first: ShotOutput) -> None:
    given = {"memory": first.memory, "seed": 4, "first_frame": first.last_frame}
    second = render_shot(models, "it turns", mode="MI2V", **given)
    assert len(second.frames) == 4 and second.memory.next_shot == 2
    given["first_frame"] = first.images()  # the last one counts, in any form
    kept = render_shot(models, "it turns", mode="mi2v", is_continuation=False, **given)
    assert torch.equal(kept.frames[1:], second.frames), "an init image is a part of the clip"


def test_a_cut_keeps_the_memory_and_leaves_the_given_frame_out(models: StoryModels, first: ShotOutput) -> None:
    cut = render_shot(models, "a den", mode="mi2v", memory=first.memory, first_frame=first.last_frame, is_cut=True)
    plain = render_shot(models, "a den", mode="m2v", memory=first.memory)
    other = render_shot(models, "a den", mode="m2v", memory=StoryMemory(selection=first.memory.selection))
    assert torch.equal(cut.frames, plain.frames) and cut.mode == "m2v" and len(cut.frames) == 5
    assert not torch.equal(cut.frames, other.frames), "the memory is shown"
    assert len(cut.memory) >= len(first.memory)


def test_a_users_pictures_may_be_the_memory_of_a_first_shot(models: StoryModels) -> None:
    memory = StoryMemory().with_references(PICTURE)
    shot = render_shot(models, "a fox", mode="m2v", memory=memory, steps=1)
    assert shot.memory.keyframes[0].name == "reference image 1"
    assert not torch.equal(shot.frames, render_shot(models, "a fox", mode="m2v", steps=1).frames)


def test_five_frames_are_continued_with_their_own_lora_only(models: StoryModels, first: ShotOutput) -> None:
    with pytest.raises(ConfigError, match=r"mode MM2V needs the LoRA MM2V, and the models have MI2V; load them with"):
        render_shot(models, "it runs", mode="mm2v", motion_frames=first.frames)
    other = open_models("tiny", continuation="mm2v", device="cpu", overrides=OVERRIDES)
    shot = render_shot(other, "it runs", mode="mm2v", memory=first.memory, motion_frames=first.frames)
    assert len(shot.frames) == 4
    with pytest.raises(ConfigError, match="motion_frames has 4 frames; MM2V takes the last 5"):
        render_shot(other, "it runs", mode="mm2v", motion_frames=first.frames[:4])
    other.unload()


class HostsOwn(BaseException):
    """How ComfyUI interrupts."""


def third_time(answer: Callable[[], object]) -> Callable[[], object]:
    """A ``should_stop`` that answers at the third question: before anything, before the first step, after it."""
    asked: list[int] = []

    def should_stop() -> object:
        asked.append(0)
        return len(asked) >= 3 and answer()

    return should_stop


def interrupt() -> None:
    raise HostsOwn


def test_a_shot_that_is_interrupted_twice_goes_on_at_its_step_with_the_same_pixels(
    models: StoryModels, first: ShotOutput
) -> None:
    with pytest.raises(HostsOwn):
        render_shot(models, "a fox", seed=3, should_stop=third_time(interrupt))
    with pytest.raises(Interrupted, match="stopped after 2 of 3 steps"):
        render_shot(models, "a fox", seed=3, should_stop=third_time(lambda: True))
    assert models.is_loaded, "weights stay"
    steps: list[tuple[int, int]] = []
    again = render_shot(models, "a fox", seed=3, on_step=lambda *step: steps.append(step))
    assert steps == [(3, 3)]
    assert torch.equal(again.frames, first.frames)
    with pytest.raises(HostsOwn):
        render_shot(models, "a fox", seed=3, should_stop=third_time(interrupt))
    steps.clear()
    render_shot(models, "a crow", seed=3, on_step=lambda *step: steps.append(step))
    assert len(steps) == 3, "another shot begins anew"


def test_a_shot_without_memory_for_both_experts_is_repeated_with_less(
    models: StoryModels, first: ShotOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models._held is not None
    clips, tried = models._held.engine.clips, []

    def sample(*arguments: Any, **options: Any) -> torch.Tensor:
        tried.append(options["low_memory"])
        if len(tried) == 1 or tried[0] is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return type(clips).sample(clips, *arguments, **options)

    monkeypatch.setattr(clips, "sample", sample)
    render_shot(models, "a fox", seed=3)
    assert tried == [False, True]
    tried[:] = [None]
    with pytest.raises(ShotError, match=r"Tried to allocate 2 GiB; use fewer frames"):
        render_shot(models, "a fox", seed=3)


def test_seeds_are_those_of_a_story() -> None:
    assert [story_seed(7, 4, 1), story_seed(7, 4, 1, "per_shot"), story_seed(7, 4)] == [8, 11, 11]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "v2v"}, "mode='v2v' is not allowed; use t2v, m2v, mi2v or mm2v"),
        ({"mode": "t2v", "width": 840}, "width=840 is not allowed; it must be a multiple of 16"),
        ({"mode": "t2v", "num_frames": 24}, "num_frames=24 is not allowed; it must be 4n.1"),
        ({"mode": "t2v", "num_frames": 9.0}, "num_frames=9.0 is not allowed; it must be a whole number"),
        ({"mode": "mm2v", "num_frames": 5}, "^num_frames=5 leaves nothing new to render"),
        ({"mode": "t2v", "steps": 0}, "^steps=0"),
        ({"mode": "t2v", "cfg_scale": "much"}, "^cfg_scale='much'"),
        ({"mode": "t2v", "seed": 1.5}, "seed=1.5 is not allowed; it must be a whole number"),
        ({"mode": "t2v", "seed": 2**64}, "seed=18446744073709551616"),
        ({"mode": "MM2V", "continuation": "mi2v"}, "mode MM2V needs the LoRA MM2V, and the models have MI2V"),
        ({"mode": "MI2V", "continuation": "mm2v"}, "mode MI2V needs the LoRA MI2V, and the models have MM2V"),
        ({"mode": "mm2v", "num_motion_frames": 1}, "motion_frames has 1 frames"),
    ],
)
def test_what_a_shot_cannot_be_is_known_before_anything_is_loaded(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_shot(**values)


@pytest.mark.parametrize(
    ("prompt", "message"), [(None, "prompt is a NoneType; allowed: text"), ("a \ud800", r"character U\+D800")]
)
def test_a_prompt_that_is_no_text_is_refused(models: StoryModels, prompt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_shot(models, prompt)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=/x", "the run folder is an argument"),
        ("stories.max_shots=1", "the story is an argument"),
        ("+launch=slurm", "gpus says"),
        ("parallel.device=cuda", "the models have a device"),
        ("dispatch.rerender=[a:1]", "rerender is an argument"),
        ("--help", "settings are written KEY=VALUE"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(models: StoryModels, override: str, message: str) -> None:
    for call in (
        lambda: open_models("tiny", overrides=[override]),
        lambda: check_story("a", models, overrides=[override]),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(override)}: .*{message}"):
            call()
    with pytest.raises(ConfigError, match="give a list"):
        open_models("tiny", overrides=override)


def test_a_comfyui_seed_of_64_bits_is_allowed() -> None:
    check_shot(mode="t2v", seed=2**64 - 1, num_frames=81, width=832, height=480, steps=40, cfg_scale=3.5)


def test_models_have_names_or_folders_which_do_not_mix(tmp_path: Path) -> None:
    assert model_names() == ("nano", "tiny")
    for continuation in ("mi2v", "mm2v"):
        check_models("tiny", "tiny", continuation=continuation)
    with pytest.raises(ConfigError, match=f"i2v_model={tmp_path} does not go with the model tiny"):
        check_models("tiny", tmp_path)
    with pytest.raises(ConfigError, match="i2v_model=tiny does not go with the model nano"):
        check_models("nano", "tiny")
    with pytest.raises(ConfigError, match="no model is given; choose nano or tiny, or a folder"):
        check_models(None)
    with pytest.raises(ConfigError, match="continuation='none' is not allowed"):
        check_models("tiny", continuation="none")


def test_missing_weights_name_the_command_that_downloads_them(tmp_path: Path) -> None:
    where = str(tmp_path / "it's 1, 2 (new)")
    with pytest.raises(WeightsNotFound, match=r"hf download Wan-AI/Wan2\.2-T2V-A14B --local-dir .*s 1, 2 \(new\)"):
        check_models(where)
    tiny = open_models("tiny", device="cpu").describe()
    with pytest.raises(WeightsNotFound, match=r"hf download Kevin-thu/StoryMem"):
        check_models(tiny["t2v_checkpoint"], tiny["i2v_checkpoint"])
    with pytest.raises(WeightsNotFound, match=r"hf download Wan-AI/Wan2\.2-I2V-A14B"):
        check_models(tiny["t2v_checkpoint"], str(tmp_path / "none"))


def test_a_model_that_was_not_opened_is_named(models: StoryModels) -> None:
    alone = open_models(models.describe()["t2v_checkpoint"], device="cpu", overrides=OVERRIDES)
    with pytest.raises(ConfigError, match="mode M2V needs the M2V model, which was not opened"):
        render_shot(alone, "a fox", mode="m2v")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:0", "torch sees no GPU here"),
        ("mps", "device=mps is not supported"),
        ("gpu", "device='gpu' is not allowed"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str) -> None:
    if torch.cuda.is_available() and device.startswith("cuda"):
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        open_models("tiny", device=device)


def test_two_models_in_a_row_leave_one_in_memory_and_unloading_none(first: ShotOutput, models: StoryModels) -> None:
    unload_all()
    before = experts_in_memory()
    seen: list[weakref.ref[Any]] = []

    class Node:
        """What a host's callbacks hold on to."""

        def report(self, *step: object) -> None:
            pass

    limits = ("memory.max_keyframes=4", "memory.num_fixed=2")
    for dtype in ("float32", "bfloat16"):
        node = Node()
        opened = open_models("tiny", device="cpu", overrides=(*OVERRIDES, *limits, f"model.dtype={dtype}"))
        shot = render_shot(opened, "a fox", steps=1, num_frames=5, on_step=node.report, on_load=node.report)
        assert (shot.memory.max_keyframes, shot.memory.num_fixed) == (4, 2), "an empty memory is that of the models"
        assert loaded_models() == [opened] and opened._held is not None
        seen += [weakref.ref(one) for one in (node, opened, opened._held.engine, opened._held.engine.vae)]
        del node, opened
        gc.collect()
        assert [one() for one in seen] == [None] * len(seen), "dropping the models frees them"
    other = render_shot(models, "a fox", seed=3)
    assert torch.equal(other.frames, first.frames), "loaded again"
    assert experts_in_memory() == before + 2
    unload_all()
    assert experts_in_memory() == before and loaded_models() == []


def test_what_a_host_gives_stays_as_it_was(models: StoryModels, first: ShotOutput) -> None:
    images, frames = first.images(), first.frames.clone()
    before = images.clone()
    memory = StoryMemory(selection=models.memory_settings).with_references(images[:1]).remember(images).memory
    shot = render_shot(models, "a den", mode="mi2v", memory=memory, first_frame=images, steps=1, num_frames=5)
    to_frames(images.numpy())
    assert torch.equal(images, before) and torch.equal(first.frames, frames)
    shot.frames.zero_()
    memory.images()[0].zero_()
    assert all(one.image.any() for one in shot.memory.keyframes), "and what it does with a result changes no memory"


def test_models_cannot_be_unloaded_by_their_own_callback(models: StoryModels) -> None:
    with pytest.raises(StoryMemError, match="the models are rendering"):
        render_shot(models, "a fox", steps=1, num_frames=5, on_step=lambda *step: models.unload())


def test_the_bytes_a_host_must_free_are_known_before_loading(
    models: StoryModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.unload()
    assert models.bytes_needed() == 0, "a CPU needs no room"
    monkeypatch.setattr(models_module, "device_memory_bytes", lambda device: 2**40)
    assert models.bytes_needed("m2v") >= models.bytes_needed("t2v") > 2**28
    monkeypatch.setattr(models_module, "device_memory_bytes", lambda device: 2**20)
    assert models.bytes_needed() == 2**20, "never more than there is"
