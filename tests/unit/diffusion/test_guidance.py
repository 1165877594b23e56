"""Classifier-free guidance on one device, with and without the unconditional pass."""

import pytest
import torch

from storymem_dist.diffusion.experts import Expert
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.errors import ConfigError
from tests.helpers.fake_experts import FakeExpert

INPUTS = (torch.randn(1, 16, 2, 4, 4), torch.tensor([700]))
COND, UNCOND, POSITIONS = torch.randn(1, 6, 8), torch.randn(1, 2, 8), torch.arange(2)


def expert(scale: float) -> Expert:
    return Expert(name="low_noise", module=FakeExpert(0.7), guidance_scale=scale)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.5])
def test_the_velocity_goes_from_unconditional_towards_conditional_by_the_scale(scale: float) -> None:
    guided = LocalGuidance().velocity(expert(scale), *INPUTS, COND, UNCOND, POSITIONS)
    model = FakeExpert(0.7)
    cond, uncond = (model(*INPUTS, context, POSITIONS) for context in (COND, UNCOND))
    torch.testing.assert_close(guided, (1 - scale) * uncond + scale * cond)


def test_scale_one_runs_the_conditional_pass_alone_and_needs_no_negative_prompt() -> None:
    one = expert(1.0)
    velocity = LocalGuidance().velocity(one, *INPUTS, COND, None, POSITIONS)
    assert one.module.calls == [(700, (1, 6, 8))]
    assert torch.equal(velocity, FakeExpert(0.7)(*INPUTS, COND, POSITIONS))


def test_guidance_without_a_negative_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"guidance_scale=3.5 of the low_noise expert needs the embedding"):
        LocalGuidance().velocity(expert(3.5), *INPUTS, COND, None, POSITIONS)
