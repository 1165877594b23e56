"""Seeded random weights with the Wan models' key names, scaled so that values neither grow, saturate nor vanish.

A tensor's values depend only on the seed and its own name, not on the order of tensors or their split into files.
Nothing is trained: pictures made with these weights are coloured noise. Knows nothing about files.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from storymem_dist.models.wan.presets import TextEncoderConfig, VaeConfig
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.weights.key_maps import native_vae_key

_NORM_SPREAD = 0.1
_BIAS_STD = 0.02
# Gains found by trial with the tiny sizes: latents stay near unit size through guided steps, and prompts change the
# colours of a clip (this needs strong cross-attention, because most of the text is padding).
_GAINS = (
    (re.compile(r"head\.head\.weight"), 0.5),
    (re.compile(r".*\.cross_attn\.o\.weight"), 5.0),
    (re.compile(r"decoder\..*\.residual\.6\.weight"), 0.7),
)
_ONE_CENTERED = re.compile(r"(.*\.)?(norm\d?(_[qk])?\.weight|gamma)")
_TO_PIXELS = "decoder.head.2.weight"
_SPATIAL_PROFILE = torch.tensor([0.17, 0.66, 0.17])
_TEMPORAL_PROFILE = torch.tensor([0.15, 0.24, 0.61])
_KERNEL_NOISE = 0.35
_COLOURFULNESS = 0.5
# Standard deviations of the pixels of random latents, before the clamp to [-1, 1] (few saturate), and of their latents.
_PIXEL_STD = 0.85
_LATENT_STD = 0.8
_SAMPLE_CTHW = (16, 3, 6, 8)
_LEAST_STD = 1e-3


def random_weight(seed: int, scope: str, key: str, shape: torch.Size) -> Tensor:
    """The fp32 tensor that ``key`` of model ``scope`` has under ``seed``."""
    digest = hashlib.sha256(f"{seed}/{scope}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    gain = next((gain for pattern, gain in _GAINS if pattern.fullmatch(key)), 1.0)
    if scope == "vae" and len(shape) >= 4 and not _ONE_CENTERED.fullmatch(key):
        return _smooth_convolution(key, shape, generator).mul_(gain)
    values = torch.randn(shape, generator=generator)
    if _ONE_CENTERED.fullmatch(key):
        return values.mul_(_NORM_SPREAD).add_(1)
    if key.endswith("bias"):
        return values.mul_(_BIAS_STD)
    if key.endswith("modulation"):
        return values.mul_(shape[-1] ** -0.5)
    if key.endswith("embedding.weight") and len(shape) == 2:
        return values
    return values.mul_(gain * shape[1:].numel() ** -0.5)


def _smooth_convolution(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A kernel that mixes channels at random and blurs a little in space and time: pictures become blobs, not static.

    Outside residual branches the mixing keeps lengths (no channel dominates). Inside them it ignores the channels'
    mean, which the activation before it makes positive. The last layer changes brightness more than colour: with dark
    and bright blobs, frames of one shot and of different shots count as different keyframes.
    """
    num_out, num_in, *kernel = shape
    mix = torch.randn(num_out, num_in, generator=generator)
    if key == _TO_PIXELS:
        mix = mix * _COLOURFULNESS + torch.randn(1, num_in, generator=generator)
    if "residual" in key or "head" in key:
        mix = (mix - mix.mean(1, keepdim=True)) * num_in**-0.5
    else:
        wide = torch.randn(max(num_out, num_in), min(num_out, num_in), generator=generator)
        orthogonal = torch.linalg.qr(wide).Q * max(1.0, num_out / num_in) ** 0.5
        mix = orthogonal if num_out >= num_in else orthogonal.T
    profile = torch.ones(())
    for axis, size in enumerate(kernel):
        is_time = len(kernel) == 3 and axis == 0
        taps = (_TEMPORAL_PROFILE if is_time else _SPATIAL_PROFILE) if size == 3 else torch.full((size,), 1.0 / size)
        profile = profile[..., None] * taps
    noise = torch.randn(shape, generator=generator) * _KERNEL_NOISE * num_in**-0.5 / profile.numel()
    return mix.reshape(num_out, num_in, *[1] * len(kernel)) * profile + noise


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


def random_vae(seed: int, config: VaeConfig) -> dict[str, Tensor]:
    """Weights of a Wan2.1 VAE, fp32, native names; output layers are scaled for latents and pixels of usable size."""
    with torch.device("meta"):
        autoencoder: Any = AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )
    shapes = {native_vae_key(key): value.shape for key, value in autoencoder.state_dict().items()}
    weights = {key: random_weight(seed, "vae", key, shape) for key, shape in shapes.items()}
    autoencoder.load_state_dict(convert_wan_vae_to_diffusers(dict(weights)), assign=True)
    _scale_outputs(WanVae(autoencoder), weights, seed)
    return weights


@torch.no_grad()
def _scale_outputs(vae: WanVae, weights: dict[str, Tensor], seed: int) -> None:
    """Scale and centre the last layers of decoder and encoder in place, from their results for random latents.

    ``weights`` are the tensors of ``vae`` itself.
    """
    autoencoder: Any = vae.autoencoder
    latents = torch.randn(_SAMPLE_CTHW, generator=torch.Generator().manual_seed(seed))
    chunks: list[Tensor] = []
    hook = autoencoder.decoder.conv_out.register_forward_hook(lambda module, args, output: chunks.append(output[0]))
    vae.decode(latents)
    hook.remove()
    pixels = torch.cat(chunks, dim=1)
    weights["decoder.head.2.weight"].mul_(_PIXEL_STD / pixels.std())
    weights["decoder.head.2.bias"].copy_(-pixels.mean((1, 2, 3)) * _PIXEL_STD / pixels.std())
    num_channels = latents.shape[0]
    raw = autoencoder.encode(vae.decode(latents)[None]).latent_dist.mean[0]
    wanted_std = torch.tensor(autoencoder.config.latents_std) * _LATENT_STD
    scale = wanted_std / raw.std((1, 2, 3)).clamp_min(_LEAST_STD)
    shift = torch.tensor(autoencoder.config.latents_mean) - raw.mean((1, 2, 3)) * scale
    weights["conv1.weight"][:num_channels].mul_(scale[:, None, None, None, None])
    weights["conv1.bias"][:num_channels].mul_(scale).add_(shift)
