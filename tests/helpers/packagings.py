"""A native checkpoint's weights in the packagings that people have on disk; each returns what settings would name."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storymem_dist.weights.text_encoder import transformers_t5_key

Tensors = dict[str, Tensor]

EXPERT_FOLDERS = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def expert_tensors(root: Path, expert: str) -> Tensors:
    """All weights of an expert of a native folder."""
    tensors: Tensors = {}
    for file in sorted((root / EXPERT_FOLDERS[expert]).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def is_linear(key: str, value: Tensor) -> bool:
    """Whether other programs store this weight in 8 bits."""
    return value.ndim == 2 and key.startswith("blocks.")


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    """All weights in ``dtype``."""
    return lambda tensors: {key: value.to(dtype) for key, value in tensors.items()}


def unscaled(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    """Linears of the blocks in float8 as they are, all else in fp16."""
    return lambda tensors: {
        key: value.to(dtype if is_linear(key, value) else torch.float16) for key, value in tensors.items()
    }


def scaled(
    dtype: torch.dtype = E4M3, *, name: str = "scale_weight", by_row: bool = False, marker: bool = True
) -> Callable[[Tensors], Tensors]:
    """Linears in 8 bits with scales named ``name``, one per weight or per row, all else in fp16."""

    def change(tensors: Tensors) -> Tensors:
        largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        result: Tensors = {"scaled_fp8": torch.empty(2, dtype=E4M3)} if marker else {}
        for key, value in tensors.items():
            if not is_linear(key, value):
                result[key] = value.half()
                continue
            scale = value.abs().amax(1, keepdim=True) / largest if by_row else value.abs().max() / largest
            numbers = value / scale
            stem = key.removesuffix("weight")
            result[key] = (numbers.round() if dtype == torch.int8 else numbers).to(dtype)
            result[stem + name] = scale.float() if by_row else scale.reshape(1).float()
            result[stem + name.replace("weight", "input")] = torch.ones(1)
        return result

    return change


def as_numbers(stored: Tensors) -> Tensors:
    """What the tensors of ``scaled`` and the others mean, in fp32, by this file's own reading."""
    numbers: Tensors = {}
    for key, value in stored.items():
        if key == "scaled_fp8" or "scale" in key.rpartition(".")[2] or key.endswith("comfy_quant"):
            continue
        stem = key.removesuffix("weight")
        scale = next((stored[stem + name] for name in ("scale_weight", "weight_scale") if stem + name in stored), None)
        numbers[key] = value.float() if scale is None else value.float() * scale.float()
    return numbers


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The same tensors with longer names."""
    return {prefix + key: value for key, value in tensors.items()}


def in_native_folder(
    native: Path, root: Path, change: Callable[[Tensors], Tensors], prefix: str = "", name: str = "model.safetensors"
) -> dict[str, Tensors]:
    """Copy ``native`` to ``root`` with one file per expert; returns what was stored, without the prefix."""
    shutil.copytree(native, root, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    written = {}
    for expert, folder in EXPERT_FOLDERS.items():
        written[expert] = change(expert_tensors(native, expert))
        save_file(prefixed(prefix, written[expert]), root / folder / name)
    return written


def comfyui_models(
    native: Path, root: Path, change: Callable[[Tensors], Tensors], kind: str = "t2v", prefix: str = ""
) -> dict[str, Tensors]:
    """A ``models`` folder of ComfyUI with both experts of a kind, text encoder and VAE, and the tokenizer."""
    for folder in ("diffusion_models/wan", "text_encoders", "vae", "loras"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    written = {}
    for expert in EXPERT_FOLDERS:
        written[expert] = change(expert_tensors(native, expert))
        file = root / "diffusion_models/wan" / f"wan2.2_{kind}_{expert}_14B_fp8_scaled.safetensors"
        save_file(prefixed(prefix, written[expert]), file)
    # heads of 16 are not Wan's, so the sizes must be said
    shutil.copy(native / EXPERT_FOLDERS["high_noise"] / "config.json", root / "diffusion_models/wan/config.json")
    save_file(comfyui_text_encoder(native), root / "text_encoders/umt5_xxl_fp16.safetensors")
    save_file(vae_tensors(native), root / "vae/wan_2.1_vae.safetensors")
    shutil.copytree(native / "google/umt5-xxl", root / "text_encoders/umt5-xxl", dirs_exist_ok=True)
    return written


def vae_tensors(native: Path) -> Tensors:
    """All weights of the VAE of a native folder."""
    return {key: value.contiguous() for key, value in torch.load(native / "Wan2.1_VAE.pth").items()}


def comfyui_text_encoder(native: Path) -> Tensors:
    """The text encoder under transformers' names with the tokenizer's model in a tensor, as ComfyUI has it."""
    weights = torch.load(native / "models_t5_umt5-xxl-enc-bf16.pth")
    tensors = {transformers_t5_key(key): value for key, value in weights.items()}
    return tensors | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}


def scaled_text_encoder(native: Path) -> Tensors:
    """The same with its linears in scaled float8."""
    tensors = comfyui_text_encoder(native)
    for key in [key for key in tensors if is_encoder_linear(key)]:
        scale = tensors[key].float().abs().max() / 448
        tensors[key.replace(".weight", ".scale_weight")] = scale.reshape(1)
        tensors[key] = (tensors[key].float() / scale).to(E4M3)
    return tensors | {"scaled_fp8": torch.empty(0, dtype=E4M3)}


def is_encoder_linear(key: str) -> bool:
    """Whether a weight of the text encoder is a linear's."""
    return re.search(r"\.(q|k|v|o|wi_0|wi_1|wo)\.weight$", key) is not None


def write_gguf(path: Path, tensors: Tensors, quantization: str, *, reshaped: bool = False) -> Tensors:
    """Write a GGUF file with the linears of the blocks quantized; returns what it means, by gguf's own reading.

    ``reshaped`` stores the patch embedding in two dimensions, with its shape in the metadata, as converters do.
    """
    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(str(path), "wan")
    numbers: Tensors = {}
    for key, value in tensors.items():
        array = value.float().contiguous().numpy()
        if is_linear(key, value):
            blocks = gguf.quantize(array, kind)
            writer.add_tensor(key, blocks, raw_dtype=kind)
            numbers[key] = torch.from_numpy(gguf.dequantize(blocks, kind).copy())
            continue
        numbers[key] = value.float()
        if reshaped and key == "patch_embedding.weight":
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
            array = array.reshape(value.shape[0], -1)
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers
