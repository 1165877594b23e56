"""Sampler settings: allowed and refused values."""

import math

import pytest
from omegaconf import OmegaConf

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 80}, "sampler.num_frames=80 is not allowed; it must be 4n+1, such as 77 or 81"),
        ({"num_frames": 0}, "sampler.num_frames=0 is not allowed; it must be between 1 and 10001"),
        ({"num_frames": -3}, "sampler.num_frames=-3 is not allowed"),
        ({"height": 490}, "sampler.height=490 is not allowed; it must be a multiple of 16, such as 496"),
        ({"width": 0}, "sampler.width=0 is not allowed; it must be between 16 and 16384"),
        ({"fps": 0}, "sampler.fps=0 is not allowed; it must be between 1 and 1000"),
        ({"num_inference_steps": 0}, "sampler.num_inference_steps=0 is not allowed; it must be between 1 and 1000"),
        ({"solver": "ddim"}, "sampler.solver='ddim' is not allowed; use one of: unipc, dpmpp, euler"),
        ({"continuation": "i2v"}, "sampler.continuation='i2v' is not allowed; use one of: none, mi2v, mm2v"),
        ({"first_shot": "mr2v"}, "sampler.first_shot='mr2v' is not allowed; use one of: t2v, m2v"),
        ({"seed_rule": "random"}, "sampler.seed_rule='random' is not allowed"),
        ({"noise_device": "mps"}, "sampler.noise_device='mps' is not allowed; use one of: cpu, cuda"),
        ({"seed": 2**63}, "sampler.seed=9223372036854775808 is not allowed"),
        ({"flow_shift_m2v": 0.0}, "sampler.flow_shift_m2v=0.0 is not allowed"),
        ({"flow_shift_t2v": math.nan}, "sampler.flow_shift_t2v=nan is not allowed"),
        (
            {"boundary_ratio_m2v": 900.0},
            "sampler.boundary_ratio_m2v=900.0 is not allowed; it must be between 0.0 and 1",
        ),
        ({"guidance_scale_high": -1.0}, "sampler.guidance_scale_high=-1.0 is not allowed"),
        ({"guidance_scale_low": math.inf}, "sampler.guidance_scale_low=inf is not allowed"),
        ({"step_cache_threshold": -0.1}, "sampler.step_cache_threshold=-0.1 is not allowed"),
        ({"continuation": "mi2v", "num_frames": 1}, "sampler.num_frames=1 leaves nothing new to render"),
        ({"continuation": "mm2v", "num_frames": 5}, "repeats 5 frames of the shot before it; use at least 9"),
        ({"sigmas": [1.0]}, "sampler.sigmas is given with sampler.solver=unipc"),
        ({"solver": "euler", "sigmas": [1.0, 0.5]}, "sampler.sigmas has 2 values but sampler.num_inference_steps=40"),
        (
            {"solver": "euler", "num_inference_steps": 2, "sigmas": [0.5, 0.5]},
            "sampler.sigmas=[0.5, 0.5] is not allowed; give falling values in (0, 1], without the final 0",
        ),
        ({"solver": "euler", "num_inference_steps": 2, "sigmas": [1.1, 0.5]}, "sampler.sigmas=[1.1, 0.5]"),
        ({"solver": "euler", "num_inference_steps": 2, "sigmas": [1.0, 0.0]}, "sampler.sigmas=[1.0, 0.0]"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_with_what_is_allowed(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplerSettings(**values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"height": 832, "width": 480},
        {"num_frames": 1, "height": 16, "width": 16, "continuation": "none"},
        {"num_frames": 5, "continuation": "mi2v"},
        {"num_frames": 9, "continuation": "mm2v"},
        {"solver": "euler", "num_inference_steps": 4, "sigmas": [1.0, 0.9375, 0.8333, 0.625]},
        {"seed": -1},
    ],
)
def test_settings_that_can_work_are_accepted(values: dict) -> None:
    SamplerSettings(**values)


def test_the_defaults_are_those_of_the_published_pipeline() -> None:
    settings = SamplerSettings()
    assert (settings.flow_shift("t2v"), settings.flow_shift("m2v")) == (12.0, 4.0)
    assert (settings.boundary_ratio("t2v"), settings.boundary_ratio("m2v")) == (0.875, 0.9)
    assert settings.needs_negative_prompt


def test_the_negative_prompt_is_needed_unless_both_experts_run_unguided() -> None:
    assert SamplerSettings(guidance_scale_high=1.0).needs_negative_prompt
    assert not SamplerSettings(guidance_scale_high=1.0, guidance_scale_low=1.0).needs_negative_prompt


def test_an_unknown_kind_of_model_has_no_schedule() -> None:
    with pytest.raises(ConfigError, match="kind='mi2v' is not allowed; use one of: t2v, m2v"):
        SamplerSettings().flow_shift("mi2v")


def test_the_settings_work_as_a_configuration_schema_that_takes_overrides() -> None:
    schema = OmegaConf.structured(SamplerSettings)
    merged = OmegaConf.merge(schema, {"solver": "euler", "num_inference_steps": 2, "sigmas": [1.0, 0.5]})
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, SamplerSettings)
    assert settings.sigmas == [1.0, 0.5]
