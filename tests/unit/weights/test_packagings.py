"""Weights in packagings that are not read: the refusal names the format and the way out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storymem_dist.errors import StoryMemError
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.tiny_checkpoint import ModelFolders

HIGH = "high_noise_model"


def rewrite_expert(root: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((root / HIGH).glob("*.safetensors*")):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    save_file(change(tensors), root / HIGH / "model.safetensors")
    return root


def prefixed(root: Path) -> Path:
    return rewrite_expert(root, lambda tensors: {f"model.diffusion_model.{key}": one for key, one in tensors.items()})


def eight_bits(root: Path, **scales: torch.Tensor) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: one.to(torch.float8_e4m3fn) if one.ndim == 2 else one for k, one in tensors.items()} | scales

    return rewrite_expert(root, change)


def with_scales(root: Path) -> Path:
    return eight_bits(root, scaled_fp8=torch.empty(2, dtype=torch.float8_e4m3fn))


def single_files(root: Path) -> Path:
    folder = root.with_name("comfyui")
    folder.mkdir()
    save_file({"patch_embedding.weight": torch.zeros(2, 16, 1, 2, 2)}, folder / "wan2.2_t2v_high_noise_14B.safetensors")
    return folder


def gguf_folder(root: Path) -> Path:
    folder = root.with_name("gguf")
    folder.mkdir()
    (folder / "wan2.2_t2v_high_noise_14B_Q8_0.gguf").write_bytes(b"GGUF" + bytes(64))
    return folder


def gguf_file(root: Path) -> Path:
    return next(gguf_folder(root).iterdir())


def one_file(root: Path) -> Path:
    save_file({"x": torch.zeros(1)}, root.with_name("one.safetensors"))
    return root.with_name("one.safetensors")


def encoder_as_safetensors(root: Path) -> Path:
    (encoder,) = root.glob("models_t5*.pth")
    encoder.rename(encoder.with_suffix(".safetensors"))
    return root


@pytest.mark.parametrize(
    ("packaging", "says", "way_out"),
    [
        (prefixed, "for ComfyUI: its keys begin with 'model.diffusion_model.'", "hf download Wan-AI/Wan2.2-T2V-A14B"),
        (eight_bits, "an 8-bit file without scales", "hf download"),
        (with_scales, "an 8-bit file with scales", "prepare --dtype float8"),
        (single_files, "transformers as single files, as ComfyUI has them", "hf download"),
        (gguf_folder, "GGUF files", "hf download"),
        (gguf_file, "a GGUF file", "use the .safetensors file"),
        (one_file, "a single file; here a base model is a folder", "hf download"),
        (encoder_as_safetensors, "this part is read from models_t5_umt5-xxl-enc-bf16.pth only", "hf download"),
    ],
)
def test_the_refusal_names_the_format_and_the_way_out(
    tiny: ModelFolders, tmp_path: Path, packaging: Callable[[Path], Path], says: str, way_out: str
) -> None:
    shutil.copytree(tiny.t2v_dir, tmp_path / "t2v")
    with pytest.raises(StoryMemError) as refusal:
        open_checkpoint(packaging(tmp_path / "t2v"), "t2v")
    assert says in str(refusal.value) and way_out in str(refusal.value)
