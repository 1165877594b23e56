from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storymem_dist.config.schema import RenderConfig, StoriesSettings
from storymem_dist.models.wan.presets import TINY, WAN22_A14B
from storymem_dist.render.inputs import (
    choose_stories,
    config_hash,
    cost_model,
    first_shots,
    kinds_of,
    most_tokens,
    pixel_inputs,
)
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.schema import Scene, Shot, ShotOptions, Story

# Settings whose effect is in the shot's own seed, mode or kind, which are inputs of their own.
COVERED_ELSEWHERE = {"seed", "seed_rule", "continuation", "first_shot", "recall"}
ONLY_T2V = {"flow_shift_t2v", "boundary_ratio_t2v"}
ONLY_M2V = {"flow_shift_m2v", "boundary_ratio_m2v", "max_keyframes", "num_fixed"}
OTHER_VALUES = {
    "solver": "dpmpp",
    "num_frames": 85,
    "height": 496,
    "width": 848,
    "noise_device": "cuda",
    "guidance_interval": [0.0, 0.5],
    "negative_prompt": "dull",
    "similarity": "hsv",
    "quality": "none",
    "quality_threshold": 1.5,
    "clip_model": "elsewhere",
    "hpsv3_checkpoint": "elsewhere",
    "codec": "libvpx-vp9",
    "preset": "slow",
    "pixel_format": "yuv444p",
    "similarity_threshold": 0.8,
    "threshold_step": 0.02,
    "boundary_ratio_t2v": 0.5,
    "boundary_ratio_m2v": 0.5,
    "step_cache_threshold": 0.1,
}


def weights(identity: str = "w", sizes: Any = TINY.t2v) -> Any:
    return SimpleNamespace(identity=lambda kind: f"{identity} {kind}", any_checkpoint=SimpleNamespace(dit_config=sizes))


def changed(group: str, name: str) -> RenderConfig:
    settings = RenderConfig()
    old = getattr(getattr(settings, group), name)
    if name == "sigmas":
        return replace(
            settings,
            sampler=replace(settings.sampler, solver="euler", num_inference_steps=2, sigmas=[0.9, 0.5]),
        )
    new = OTHER_VALUES.get(name, old + 1 if isinstance(old, int | float) else None)
    assert new is not None and new != old, f"add another value of {group}.{name} to OTHER_VALUES"
    return replace(settings, **{group: replace(getattr(settings, group), **{name: new})})


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, one.name) for group in ("sampler", "memory", "video") for one in fields(getattr(RenderConfig(), group))],
)
def test_every_setting_that_can_change_pixels_is_in_the_fingerprint_of_the_shots_it_concerns(
    group: str, name: str
) -> None:
    """A setting that is added later and forgotten here would let a resumed run mix two settings."""
    if name in COVERED_ELSEWHERE:
        return
    for kind, spared in (("t2v", ONLY_M2V), ("m2v", ONLY_T2V)):
        same = pixel_inputs(kind, changed(group, name), weights()) == pixel_inputs(kind, RenderConfig(), weights())
        assert same == (name in spared), kind


def test_weights_and_number_format_are_in_the_fingerprint_and_paths_are_not() -> None:
    settings = RenderConfig()
    base = pixel_inputs("m2v", settings, weights())
    assert pixel_inputs("m2v", settings, weights("others")) != base
    for other in ({"dtype": "float32"}, {"linears": "float8"}, {"vae_precision": "float32"}):
        assert pixel_inputs("m2v", replace(settings, model=replace(settings.model, **other)), weights()) != base
    moved = replace(settings, output="elsewhere", model=replace(settings.model, t2v_checkpoint="x", experts="swap"))
    assert pixel_inputs("m2v", moved, weights()) == base


def test_the_negative_prompt_counts_only_where_guidance_uses_it() -> None:
    off = replace(RenderConfig().sampler, guidance_scale_high=1.0, guidance_scale_low=1.0)
    one = replace(RenderConfig(), sampler=off)
    other = replace(RenderConfig(), sampler=replace(off, negative_prompt="dull"))
    assert pixel_inputs("t2v", one, weights()) == pixel_inputs("t2v", other, weights())


def story(name: str = "fox") -> Story:
    def shot(index: int, scene: int, in_scene: int) -> Shot:
        return Shot(index=index, index_in_scene=in_scene, scene_num=scene, prompt=f"{name} {index}", cut=True)

    scenes = (
        Scene(scene_num=1, shots=(shot(0, 1, 0), shot(1, 1, 1))),
        Scene(scene_num=2, shots=(shot(2, 2, 0),)),
    )
    return Story(story_id=name, name=name, overview="", scenes=scenes, seed=5, style="warm")


def test_a_story_cut_short_keeps_everything_else() -> None:
    assert [shot.index for shot in first_shots(story(), 1).shots] == [0]
    assert len(first_shots(story(), 2).scenes) == 1
    assert first_shots(story(), 9) == story()
    assert replace(first_shots(story(), 1), scenes=story().scenes) == story()


def test_a_batch_is_cut_to_stories_and_shots() -> None:
    batch = StoryBatch(stories=(story("a"), story("b")), rejected=())
    assert choose_stories(batch, StoriesSettings()) == batch
    cut = choose_stories(batch, StoriesSettings(max_stories=1, max_shots=2))
    assert [(one.story_id, len(one.shots)) for one in cut.stories] == [("a", 2)]
    first = replace(batch, stories=(story("a"), replace(story("b"), priority=-1), replace(story("c"), priority=-2)))
    assert [one.story_id for one in choose_stories(first, StoriesSettings(max_stories=2)).stories] == ["b", "c"]


def test_only_the_needed_experts_are_named_first_shots_first() -> None:
    settings = RenderConfig()
    assert kinds_of([story()], settings) == ["t2v", "m2v"]
    assert kinds_of([first_shots(story(), 1)], settings) == ["t2v"]
    assert kinds_of([story()], replace(settings, sampler=replace(settings.sampler, first_shot="m2v"))) == ["m2v"]


def test_given_clips_need_no_experts_and_a_job_of_them_alone_takes_its_sizes_from_the_first_kind() -> None:
    settings = RenderConfig()
    (scene, _) = story().scenes
    given = tuple(replace(shot, video=Path("a.mp4")) for shot in scene.shots)
    filmed = replace(story(), scenes=(replace(scene, shots=given),))
    assert kinds_of([filmed], settings) == ["t2v"]
    begun = replace(story(), scenes=(replace(scene, shots=(given[0], scene.shots[1])),))
    assert kinds_of([begun], settings) == ["m2v"]


@pytest.mark.parametrize(("kinds", "num_memory"), [(("t2v",), 0), (("t2v", "m2v"), 10)])
def test_the_most_tokens_are_those_of_the_longest_shot(kinds: tuple[str, ...], num_memory: int) -> None:
    opened = weights()
    opened.checkpoints = dict.fromkeys(kinds)
    (scene, rest) = story().scenes
    long = replace(scene.shots[1], options=ShotOptions(duration=10.0))
    longer = replace(story(), scenes=(replace(scene, shots=(scene.shots[0], long)), rest))
    assert most_tokens(RenderConfig(), [story()], opened) == (21 + num_memory) * 30 * 52
    assert most_tokens(RenderConfig(), [story(), longer], opened) == (41 + num_memory) * 30 * 52


def test_floating_point_work_is_known_for_a14b_alone() -> None:
    settings = RenderConfig()
    assert not cost_model(settings, weights(sizes=TINY.i2v)).is_a14b
    for sizes in (WAN22_A14B.t2v, WAN22_A14B.i2v):
        cost = cost_model(settings, weights(sizes=sizes))
        assert cost.is_a14b and cost.passes_per_step == 2 and cost.num_inference_steps == 40


def test_the_hash_of_a_configuration_leaves_out_where_and_how_fast() -> None:
    plain = {"output": "a", "sampler": {"seed": 0}, "parallel": {"ulysses": 1}}
    assert config_hash(plain) == config_hash({**plain, "output": "b", "parallel": {"ulysses": 8}})
    assert config_hash(plain) != config_hash({**plain, "sampler": {"seed": 1}})
