"""Fp32 matrix products are exact, whatever was set before; convolutions follow the setting."""

import os
from collections.abc import Iterator

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.models.precision import set_fp32_precision, vae_dtype


@pytest.fixture(autouse=True)
def switches_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDNN_CONV_WSCAP_DBG", "0")
    monkeypatch.delenv("CUDNN_CONV_WSCAP_DBG")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("setting", "allowed"), [("tf32", True), ("float32", False), ("bfloat16", False)])
def test_the_setting_decides_about_convolutions_alone(setting: str, allowed: bool) -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not allowed
    set_fp32_precision(convolutions=setting)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", allowed)
    assert vae_dtype(setting) == (torch.bfloat16 if setting == "bfloat16" else torch.float32)


def test_workspaces_of_convolutions_are_limited_unless_the_user_has_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    set_fp32_precision(convolutions="tf32")
    assert os.environ["CUDNN_CONV_WSCAP_DBG"] == "2048"
    monkeypatch.setenv("CUDNN_CONV_WSCAP_DBG", "512")
    set_fp32_precision(convolutions="tf32")
    assert os.environ["CUDNN_CONV_WSCAP_DBG"] == "512"


def test_another_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.vae_precision='half' is not allowed; use one of: tf32, float32, bf"):
        set_fp32_precision(convolutions="half")
