"""Checkpoints for tests: the -Diffusers layout of a native one, and small ways to damage files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.text_encoder import load_text_encoder
from storymem_dist.weights.vae import load_vae

NUM_SHARDS = 3


def write_diffusers_layout(native: Path, kind: str, root: Path) -> Path:
    """Rewrite a native checkpoint as ``-Diffusers`` repositories have it, by diffusers' and transformers' own means."""
    checkpoint = open_checkpoint(native, kind)
    for source, target in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        weights: dict[str, Tensor] = {}
        for file in (native / source).glob("*.safetensors"):
            weights |= load_file(file)
        _write_transformer(
            root / target,
            convert_wan_transformer_to_diffusers(weights),
            json.loads((native / source / "config.json").read_text()),
        )
    load_vae(checkpoint.vae_path).autoencoder.save_pretrained(root / "vae")
    encoder = load_text_encoder(checkpoint, dtype=torch.bfloat16)
    encoder.model.save_pretrained(root / "text_encoder")
    encoder.tokenizer.save_pretrained(root / "tokenizer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def _write_transformer(folder: Path, weights: dict[str, Tensor], native_config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    weight_map = {}
    for number in range(NUM_SHARDS):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        part = {key: weights[key].contiguous() for key in sorted(weights)[number::NUM_SHARDS]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": native_config["num_heads"],
        "attention_head_dim": native_config["dim"] // native_config["num_heads"],
        "in_channels": native_config["in_dim"],
        "out_channels": native_config["out_dim"],
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "image_dim": None,
        "added_kv_proj_dim": None,
        **{key: native_config[key] for key in ("ffn_dim", "freq_dim", "text_dim", "num_layers", "patch_size", "eps")},
    }
    (folder / "config.json").write_text(json.dumps(config))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def truncate(path: Path, num_bytes: int) -> None:
    """Cut ``num_bytes`` off the end of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - num_bytes)


def rewrite_safetensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
