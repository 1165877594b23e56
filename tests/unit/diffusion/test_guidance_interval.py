"""Guidance in a part of the steps: which steps, what the others compute, and what it changes elsewhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from storymem_dist.config.schema import RenderConfig
from storymem_dist.diffusion.denoise import StepInfo, denoise
from storymem_dist.diffusion.experts import Expert, ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.diffusion.solver import Solver
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.dispatch.shot_settings import sampler_inputs
from storymem_dist.errors import ConfigError, LayoutError
from storymem_dist.models.wan.presets import EXPERTS, TINY
from storymem_dist.parallel.layout import check_guidance
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.inputs import cost_model
from tests.helpers.fake_experts import FakeExpert, fake_experts, fake_shot
from tests.helpers.tiny_dit import make_dit

NUM_STEPS = 8


def render(experts: ExpertPair, guided_steps: range | None, guidance: LocalGuidance | None = None) -> Tensor:
    grid, noise, condition, prompt = fake_shot()
    solver = Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0)
    return denoise(
        experts,
        guidance or LocalGuidance(),
        solver,
        noise,
        condition,
        prompt,
        grid,
        device="cpu",
        guided_steps=guided_steps,
    )


class Recording(LocalGuidance):
    """Keeps the input and the result of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def velocity(self, expert: Expert, x_BCTHW: Tensor, *rest: Any) -> Tensor:
        result = super().velocity(expert, x_BCTHW, *rest)
        self.steps.append((x_BCTHW.clone(), result))
        return result


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [
        ([], 8, range(8)),
        ([0.0, 1.0], 8, range(8)),
        ([0.0, 0.5], 8, range(4)),
        ([0.25, 0.75], 8, range(2, 6)),
        ([0.3, 0.7], 10, range(3, 7)),
        ([0.0, 0.01], 40, range(1)),
        ([0.1, 0.6], 4, range(1, 3)),
    ],
)
def test_the_interval_is_a_share_of_the_steps(interval: list[float], steps: int, expected: range) -> None:
    settings = SamplerSettings(num_inference_steps=steps, guidance_interval=interval)
    assert settings.guided_steps == expected
    assert settings.passes_per_step == 1 + len(expected) / steps
    assert replace(settings, guidance_scale_high=1.0, guidance_scale_low=1.0).passes_per_step == 1


@pytest.mark.parametrize("interval", [[0.5], [0.5, 0.5], [0.6, 0.4], [-0.1, 0.5], [0.5, 1.1], [0.0, 0.5, 1.0]])
def test_an_interval_that_is_none_is_refused(interval: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"sampler.guidance_interval=.* is not allowed; give the first and the last"):
        SamplerSettings(guidance_interval=interval)


def test_an_interval_without_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"holds none of sampler.num_inference_steps=4 steps; widen it"):
        SamplerSettings(guidance_interval=[0.3, 0.4], num_inference_steps=4)


def test_outside_the_interval_each_step_is_that_of_no_guidance_and_inside_that_of_guidance() -> None:
    recorded = Recording()
    render(fake_experts(), range(2, 5), recorded)
    pairs = {True: fake_experts(), False: fake_experts(guidance_scale=1.0)}
    grid, _, _, prompt = fake_shot()
    timesteps = Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0).timesteps.tolist()
    for index, (x, velocity) in enumerate(recorded.steps):
        expert = pairs[index in range(2, 5)].select(timesteps[index])
        expected = LocalGuidance().velocity(
            expert,
            x,
            torch.tensor([timesteps[index]]),
            prompt.prompt_LE[None],
            prompt.negative_LE[None],
            grid.temporal_positions(),
        )
        assert torch.equal(velocity, expected), index


def test_all_steps_give_the_bits_of_no_interval_and_no_step_those_of_no_guidance() -> None:
    assert torch.equal(render(fake_experts(), range(NUM_STEPS)), render(fake_experts(), None))
    without = render(fake_experts(guidance_scale=1.0), None)
    assert torch.equal(render(fake_experts(), range(0)), without)
    assert not torch.equal(render(fake_experts(), range(1)), without)


def test_the_unconditional_pass_runs_in_the_interval_alone() -> None:
    experts = fake_experts()
    modules = [experts.select(timestep).module for timestep in (999, 1)]
    render(experts, range(3))
    calls = [shape for module in modules if isinstance(module, FakeExpert) for _, shape in module.calls]
    assert (calls.count((1, 7, 12)), calls.count((1, 3, 12))) == (NUM_STEPS, 3)


def test_the_step_cache_works_across_both_ends_of_the_interval() -> None:
    """Steps are reused before, in and after the interval; a branch without an entry is computed."""
    config = replace(TINY.i2v, text_dim=12)
    dits = {name: make_dit(config) for name in EXPERTS}
    for dit in dits.values():
        attach_step_cache(dit)
    experts = ExpertPair(
        **dits, boundary_ratio=0.0, guidance_scale_high=3.5, guidance_scale_low=3.5, step_cache_threshold=1.0
    )
    grid, noise, condition, prompt = fake_shot()
    infos: list[StepInfo] = []
    solver = Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0)
    more: dict[str, Any] = {"device": "cpu", "on_step": infos.append, "guided_steps": range(2, 5)}
    latents = denoise(experts, LocalGuidance(), solver, noise, condition, prompt, grid, **more)
    assert torch.isfinite(latents).all()
    assert [info.reused for info in infos] == [False, True, False, True, True, True, True, True]


def test_the_interval_is_part_of_the_fingerprint_only_when_it_is_set() -> None:
    plain = SamplerSettings()
    assert "sampler.guidance_interval" not in sampler_inputs("t2v", plain)
    narrowed = sampler_inputs("t2v", replace(plain, guidance_interval=[0.0, 0.5]))
    assert narrowed == sampler_inputs("t2v", plain) | {"sampler.guidance_interval": [0.0, 0.5]}
    unguided = replace(plain, guidance_scale_high=1.0, guidance_scale_low=1.0)
    assert sampler_inputs("t2v", replace(unguided, guidance_interval=[0.0, 0.5])) == sampler_inputs("t2v", unguided)


def test_the_cost_counts_the_passes_that_run(tiny_weights: Any) -> None:
    config = RenderConfig(sampler=SamplerSettings(guidance_interval=[0.0, 0.25]))
    assert cost_model(config, tiny_weights).passes_per_step == 1.25


@pytest.fixture
def tiny_weights() -> Any:
    class Checkpoint:
        dit_config = TINY.t2v

    class Weights:
        any_checkpoint = Checkpoint()

    return Weights()


def test_a_layout_that_runs_both_passes_in_parallel_is_refused() -> None:
    in_part, always = SamplerSettings(guidance_interval=[0.0, 0.5]), SamplerSettings()
    with pytest.raises(LayoutError, match=r"guidance_interval=\[0.0, 0.5\] leaves .* some steps.*set parallel.cfg=1"):
        check_guidance(ParallelSettings(cfg=2), in_part)
    check_guidance(ParallelSettings(cfg=1), in_part)
    check_guidance(ParallelSettings(cfg=2), always)
