"""Seeded random weights with the Wan models' key names, scaled so that nothing explodes, saturates or dies.

Every tensor's values depend on the seed and its own name alone, not on the order in which tensors are made, nor on
how they are cut into files. Nothing is trained: pictures made with these weights are coloured noise.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from storymem_dist.models.wan.key_maps import native_vae_key
from storymem_dist.models.wan.presets import TextEncoderConfig, VaeConfig

_NORM_SPREAD = 0.1
_BIAS_STD = 0.02
# Gains found by trial: latents stay near unit size through 40 guided steps; decoded pixels have a standard deviation of
# about half the range, so that few of them saturate and frames of different shots differ.
_GAINS = (
    (re.compile(r"head\.head\.weight"), 0.5),
    (re.compile(r"encoder\.head\.2\.weight"), 2.0),
    (re.compile(r"decoder\.head\.2\.weight"), 0.5),
)
_ONE_CENTERED = re.compile(r"(.*\.)?(norm\d?(_[qk])?\.weight|gamma)")


def random_weight(seed: int, scope: str, key: str, shape: torch.Size) -> Tensor:
    """The fp32 tensor that ``key`` of model ``scope`` has under ``seed``."""
    digest = hashlib.sha256(f"{seed}/{scope}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(shape, generator=generator)
    if _ONE_CENTERED.fullmatch(key):
        return values.mul_(_NORM_SPREAD).add_(1)
    if key.endswith("bias"):
        return values.mul_(_BIAS_STD)
    if key.endswith("modulation"):
        return values.mul_(shape[-1] ** -0.5)
    if "embedding.weight" in key and len(shape) == 2:
        return values
    gain = next((gain for pattern, gain in _GAINS if pattern.fullmatch(key)), 1.0)
    return values.mul_(gain * shape[1:].numel() ** -0.5)


def text_encoder_shapes(config: TextEncoderConfig) -> Mapping[str, torch.Size]:
    """Native key names and shapes of a umT5 encoder."""
    dim, inner, ffn = config.dim, config.attention_dim, config.ffn_dim
    shapes = {"token_embedding.weight": (config.vocab_size, dim), "norm.weight": (dim,)}
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        shapes |= {f"{block}.norm{number}.weight": (dim,) for number in (1, 2)}
        shapes |= {f"{block}.attn.{letter}.weight": (inner, dim) for letter in "qkv"}
        shapes |= {
            f"{block}.attn.o.weight": (dim, inner),
            f"{block}.pos_embedding.embedding.weight": (config.num_buckets, config.num_heads),
            f"{block}.ffn.gate.0.weight": (ffn, dim),
            f"{block}.ffn.fc1.weight": (ffn, dim),
            f"{block}.ffn.fc2.weight": (dim, ffn),
        }
    return {key: torch.Size(shape) for key, shape in shapes.items()}


def vae_shapes(config: VaeConfig) -> Mapping[str, torch.Size]:
    """Native key names and shapes of the Wan2.1 VAE."""
    with torch.device("meta"):
        autoencoder: Any = AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )
    return {native_vae_key(key): value.shape for key, value in autoencoder.state_dict().items()}
