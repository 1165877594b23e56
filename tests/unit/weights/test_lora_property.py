"""A LoRA in any layout is equal to its truth when it is merged, or refused with one sentence."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from storymem_dist.errors import StoryMemError
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.lora import LoraSettings, open_loras
from tests.helpers.lora_layouts import SHAPES, LoraCase, lora_cases

ANYTIME = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def merged(path: Path, expert: str) -> dict[str, Tensor]:
    """What rendering would add to the weights of an expert, by parameter."""
    added: dict[str, Tensor] = {}
    for lora in open_loras([LoraSettings(path=str(path))], expert, SHAPES):
        for key in lora.shapes():
            rows = torch.zeros(SHAPES[key])
            half = rows.shape[0] // 2
            lora.add_to(rows[:half], key, 0)
            lora.add_to(rows[half:], key, half)
            added[key] = rows
    return added


def load(case: LoraCase) -> dict[str, dict[str, Tensor]]:
    with TemporaryDirectory() as folder:
        path = case.write(Path(folder) / "lora")
        return {expert: merged(path, expert) for expert in EXPERTS}


@ANYTIME
@given(lora_cases())
def test_every_layout_loads_and_equals_its_truth(case: LoraCase) -> None:
    found = load(case)
    for expert in EXPERTS:
        expected = case.truth.get("both", case.truth.get(expert, {}))
        assert found[expert].keys() == expected.keys()
        for key, change in expected.items():
            torch.testing.assert_close(found[expert][key].double(), change, atol=1e-4, rtol=1e-5, msg=f"{expert} {key}")


@ANYTIME
@given(lora_cases(damaged=True))
def test_every_damage_is_refused_with_one_sentence(case: LoraCase) -> None:
    with pytest.raises(StoryMemError) as caught:
        load(case)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and "adapter_" in message, message
