"""Latents of checkpoints in the packagings that people have: those of a native folder with the very same numbers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.weights.checkpoints import ModelFolders
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint
from tests.helpers import packagings
from tests.helpers.lora_shots import render
from tests.helpers.packagings import E5M2, EXPERT_FOLDERS, Tensors, expert_tensors
from tests.helpers.tiny_dit import largest_error

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaged")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> ModelFolders:
    return generate_tiny_checkpoint(folder / "tiny")


@pytest.fixture(scope="module")
def original(folder: Path, tiny: ModelFolders) -> Tensor:
    return latents(folder, tiny.t2v_dir)


def latents(folder: Path, checkpoint: Path, **model: str) -> Tensor:
    return render(str(folder / "tiny"), [[]], model={"t2v_checkpoint": str(checkpoint), **model}).latents[0]


def with_numbers(native: Path, root: Path, numbers: dict[str, Tensors]) -> Path:
    """A native folder whose experts are these fp32 numbers."""
    shutil.copytree(native, root, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    for expert, tensors in numbers.items():
        file = root / EXPERT_FOLDERS[expert] / "diffusion_pytorch_model.safetensors"
        save_file({key: value.float().contiguous() for key, value in tensors.items()}, file)
    return root


PACKAGINGS: dict[str, tuple[Callable[[Tensors], Tensors], str, float]] = {
    "fp16": (packagings.cast(torch.float16), PREFIX, 0.01),
    "bf16": (packagings.cast(torch.bfloat16), "", 0.05),
    "fp8_scaled": (packagings.scaled(), PREFIX, 0.5),
    "fp8_scaled by row": (packagings.scaled(name="weight_scale", by_row=True, marker=False), "", 0.5),
    "fp8": (packagings.unscaled(packagings.E4M3), "", 0.5),
    "fp8 e5m2": (packagings.unscaled(E5M2), PREFIX, 1.0),
    "int8": (packagings.scaled(torch.int8, name="weight_scale", by_row=True, marker=False), "", 0.1),
}
"""What is stored, the prefix of its names, and the largest error of latents that its bits may cost."""


@pytest.mark.parametrize("name", PACKAGINGS)
def test_latents_equal_those_of_the_stored_numbers(
    folder: Path, tiny: ModelFolders, original: Tensor, tmp_path: Path, name: str
) -> None:
    change, prefix, cost = PACKAGINGS[name]
    stored = packagings.comfyui_models(tiny.t2v_dir, tmp_path / "models", change, prefix=prefix)
    numbers = {expert: packagings.as_numbers(stored[expert]) for expert in EXPERT_FOLDERS}
    native = with_numbers(tiny.t2v_dir, tmp_path / "native", numbers)
    expected = latents(folder, native, experts="resident")
    for experts in ("resident", "stream"):
        assert torch.equal(latents(folder, tmp_path / "models", experts=experts), expected), experts
    assert 0 < largest_error(expected, original) < cost


@pytest.mark.parametrize(("quantization", "cost"), [("Q8_0", 0.1), ("Q4_0", 1.0)])
def test_latents_of_gguf_equal_those_of_its_numbers(
    folder: Path, tiny: ModelFolders, original: Tensor, tmp_path: Path, quantization: str, cost: float
) -> None:
    models, numbers = tmp_path / "models", {}
    packagings.comfyui_models(tiny.t2v_dir, models, packagings.cast(torch.float16))
    for expert, name in zip(EXPERT_FOLDERS, ("HighNoise", "LowNoise"), strict=True):
        next(models.rglob(f"*{expert}*.safetensors")).unlink()
        file = models / "diffusion_models/wan" / f"Wan2.2-T2V-A14B-{name}-{quantization}.gguf"
        numbers[expert] = packagings.write_gguf(file, expert_tensors(tiny.t2v_dir, expert), quantization, reshaped=True)
    found = latents(folder, models)
    assert torch.equal(found, latents(folder, with_numbers(tiny.t2v_dir, tmp_path / "native", numbers)))
    assert 0 < largest_error(found, original) < cost
