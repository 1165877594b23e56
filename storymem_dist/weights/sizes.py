"""Sizes of text encoder and VAE from their files, without reading weights: for plans of memory and time."""

import json
from pathlib import Path

from storymem_dist.errors import CheckpointError
from storymem_dist.models.wan.presets import TextEncoderConfig, VaeConfig
from storymem_dist.weights.tensor_files import open_text_encoder_file, open_vae_file
from storymem_dist.weights.text_encoder import text_encoder_config, transformers_t5_key
from storymem_dist.weights.torch_file import is_safetensors, read_state_dict

_VAE_WIDTH = "encoder.conv1.weight"


def text_encoder_sizes(path: Path) -> TextEncoderConfig:
    """Return the sizes of the umT5 encoder in a file, or in a folder of transformers. Raises ``CheckpointError``."""
    try:
        if path.is_dir():
            stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return TextEncoderConfig(
                vocab_size=stored["vocab_size"],
                dim=stored["d_model"],
                attention_dim=stored["num_heads"] * stored["d_kv"],
                ffn_dim=stored["d_ff"],
                num_heads=stored["num_heads"],
                num_layers=stored["num_layers"],
            )
        if is_safetensors(path):
            source = open_text_encoder_file(path)
            shapes = {key: source.shape(key) for key in source.keys()}  # noqa: SIM118  (no dict)
        else:
            shapes = {key: value.shape for key, value in read_state_dict(path).items()}
        return text_encoder_config({transformers_t5_key(key): shape for key, shape in shapes.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the umT5 encoder ({type(error).__name__}: {error})") from None


def vae_sizes(path: Path) -> VaeConfig:
    """Return the sizes of the VAE in a file, or in a folder of diffusers. Raises ``CheckpointError``."""
    try:
        if path.is_dir():
            return VaeConfig(base_dim=int(json.loads((path / "config.json").read_text(encoding="utf-8"))["base_dim"]))
        if is_safetensors(path):
            return VaeConfig(base_dim=open_vae_file(path).shape(_VAE_WIDTH)[0])
        return VaeConfig(base_dim=read_state_dict(path)[_VAE_WIDTH].shape[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the Wan2.1 VAE ({type(error).__name__}: {error})") from None
