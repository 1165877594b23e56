"""Fp32 matrix products are exact, whatever was set before; convolutions follow the setting."""

from collections.abc import Iterator

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.models.precision import set_fp32_precision


@pytest.fixture(autouse=True)
def switches_restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("setting", "allowed"), [("tf32", True), ("float32", False)])
def test_the_setting_decides_about_convolutions_alone(setting: str, allowed: bool) -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not allowed
    set_fp32_precision(convolutions=setting)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", allowed)


def test_another_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.vae_precision='half' is not allowed; use one of: tf32, float32"):
        set_fp32_precision(convolutions="half")
