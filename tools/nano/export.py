"""From trained states to the one file that ``model.packed`` names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.weights.key_maps import native_vae_key
from storymem_dist.weights.packed import PackedWeights, write_packed
from tools.nano import words

LICENCE = "Apache-2.0"
ORIGIN = "Trained for storymem_dist from nothing, on drawings of tools/nano/world.py; no data or weights of others."


def pack(path: Path, config: DiTConfig, dit: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> None:
    """Write transformer and VAE (native names) to one file, with the text encoder and tokenizer of ``words``."""
    weights = PackedWeights(
        config=config, dit=dit, vae=vae, text_encoder=words.encoder_weights(), tokenizer=words.tokenizer_files()
    )
    write_packed(path, weights, licence=LICENCE, origin=ORIGIN)


@torch.no_grad()
def native_vae(vae: Mapping[str, Tensor], base_dim: int, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """A VAE (diffusers' names) whose latents have mean 0 and deviation 1 after Wan's normalization; native names, fp16.

    ``mean`` and ``std`` ``[16]`` are those of its raw latents. They go into its 1x1x1 layers, so that Wan's published
    constants hold as they are.
    """
    autoencoder: Any = AutoencoderKLWan(base_dim=base_dim, z_dim=16)
    autoencoder.load_state_dict(vae)
    wanted_mean = torch.tensor(autoencoder.config.latents_mean)
    scale = torch.tensor(autoencoder.config.latents_std) / std
    autoencoder.quant_conv.weight[:16] *= scale[:, None, None, None, None]
    autoencoder.quant_conv.bias[:16] = (autoencoder.quant_conv.bias[:16] - mean) * scale + wanted_mean
    autoencoder.quant_conv.weight[16:] = 0
    autoencoder.quant_conv.bias[16:] = 0
    weight = autoencoder.post_quant_conv.weight[..., 0, 0, 0].clone()
    autoencoder.post_quant_conv.bias += weight @ (mean - wanted_mean / scale)
    autoencoder.post_quant_conv.weight /= scale[None, :, None, None, None]
    return {native_vae_key(key): value.half().contiguous() for key, value in autoencoder.state_dict().items()}
