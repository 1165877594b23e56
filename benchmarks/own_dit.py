"""Our transformer with random weights and random inputs, for the benchmarks; needs nothing but torch."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from storymem_dist.models.quantized_linear import QuantizedLinear, quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of one step: latents ``[1, in_dim, T, h, w]``, timestep, two texts of full length, positions."""

    latents: Tensor
    timestep: Tensor
    context: Tensor
    negative_context: Tensor
    positions: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the video, with patches of 1 x 2 x 2."""
        return self.latents.shape[2] * (self.latents.shape[3] // 2) * (self.latents.shape[4] // 2)

    def with_context(self, context: Tensor) -> "Inputs":
        """The same inputs with another text."""
        return replace(self, context=context)


def small_config(dim: int, num_heads: int, num_layers: int) -> DiTConfig:
    """A14B's proportions (image to video) at another width and depth."""
    return DiTConfig(
        dim=dim,
        ffn_dim=int(dim * 2.7) // 16 * 16,  # float8 needs multiples of 16
        freq_dim=256,
        num_heads=num_heads,
        num_layers=num_layers,
        in_dim=36,
        text_dim=dim,
        text_len=512,
    )


def make_ours(config: DiTConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> WanDiT:
    """Our transformer with random weights of usual size, made on the device."""
    with torch.device("meta"):
        dit = WanDiT(config, dtype=dtype)
    dit.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in dit.named_parameters():
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return dit


def make_quantized(ours: WanDiT, linears: str) -> WanDiT:
    """Our transformer with layers of another format (``model.linears``); it shares all other weights."""
    variant = share_weights(ours)
    quantize_linears(variant.blocks, linears)
    exact = dict(ours.named_modules())
    for name, layer in variant.named_modules():
        if isinstance(layer, QuantizedLinear):
            values, scales = layer.quantize(exact[name].weight.float())
            layer.weight.copy_(values)
            layer.row_scale.copy_(scales)
            layer.bias.copy_(exact[name].bias)
    return variant


def share_weights(module: nn.Module) -> Any:
    """A second module over the same weights."""
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def make_inputs(config: DiTConfig, latent_size: tuple[int, int, int], device: torch.device, seed: int = 1) -> Inputs:
    """Random fp32 inputs for latents of ``(frames, height, width)``."""
    generator = torch.Generator(device).manual_seed(seed)
    text_shape = (1, config.text_len, config.text_dim)
    return Inputs(
        latents=torch.randn(1, config.in_dim, *latent_size, generator=generator, device=device),
        timestep=torch.tensor([900], device=device),
        context=torch.randn(text_shape, generator=generator, device=device),
        negative_context=torch.randn(text_shape, generator=generator, device=device),
        positions=torch.arange(latent_size[0], device=device),
    )


def run_ours(dit: nn.Module, inputs: Inputs) -> Tensor:
    """One forward of our transformer."""
    with torch.no_grad():
        return dit(inputs.latents, inputs.timestep, inputs.context, inputs.positions)


def step_tflop(config: DiTConfig, num_tokens: int) -> float:
    """TFLOP of the matrix products and attention of two forwards."""
    dim, text = config.dim, config.text_len
    attention_linears = 2 * dim * dim * (4 * num_tokens + 2 * num_tokens + 2 * text)
    attention = 4 * num_tokens * dim * (num_tokens + text)
    feed_forward = 4 * num_tokens * dim * config.ffn_dim
    ends = 2 * num_tokens * dim * (4 * config.in_dim + 4 * config.out_dim) + 2 * text * dim * (config.text_dim + dim)
    return 2 * (config.num_layers * (attention_linears + attention + feed_forward) + ends) / 1e12
