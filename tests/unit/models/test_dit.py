"""The transformer reproduces the original's numbers, and diffusers' with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from tests.helpers.golden import load_golden, strip_prefix

FIXTURES = ("dit_t2v", "dit_i2v", "dit_memory_rope")


def golden_dit(name: str) -> tuple[WanDiT, dict[str, Tensor], dict[str, Any]]:
    tensors, manifest = load_golden(name)
    dit = WanDiT(DiTConfig.from_json(manifest["config"]), dtype=torch.float32)
    dit.load_state_dict(strip_prefix(tensors, "w."), strict=True)
    return dit.eval().requires_grad_(False), tensors, manifest


def run_case(dit: WanDiT, tensors: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    inputs = strip_prefix(tensors, f"case.{case['id']}.")
    x = torch.cat([inputs["x"], inputs["y"]]) if "y" in inputs else inputs["x"]
    positions = torch.tensor(case.get("temporal_positions", range(x.shape[1])))
    return dit(x[None], inputs["t"], inputs["context"][None], positions)[0]


@pytest.mark.parametrize("name", FIXTURES)
def test_velocity_equals_the_original_in_every_case(name: str) -> None:
    dit, tensors, manifest = golden_dit(name)
    for case in manifest["cases"]:
        torch.testing.assert_close(
            run_case(dit, tensors, case), tensors[f"case.{case['id']}.out"], **manifest["tolerance"]
        )
