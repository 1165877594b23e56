"""A small ``WanDiT`` with seeded weights, and inputs for it."""

import torch
from torch import Tensor

from storymem_dist.models.wan.dit import DiTConfig, WanDiT

CONFIG = DiTConfig(dim=64, ffn_dim=96, freq_dim=32, num_heads=4, num_layers=2, in_dim=16, text_dim=24, text_len=12)
"""4 heads of 16 channels; 4, 2 and 1 divide them."""


def make_dit(config: DiTConfig = CONFIG, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> WanDiT:
    """The same weights for the same seed, on every rank."""
    torch.manual_seed(seed)
    return WanDiT(config, dtype=dtype).eval().requires_grad_(False)


def make_inputs(
    config: DiTConfig = CONFIG, *, times: int = 3, height: int = 6, width: int = 10, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x, timestep, context, temporal_positions`` for ``times * height / 2 * width / 2`` tokens; memory at -10, -5."""
    generator = torch.Generator().manual_seed(times * 10_000 + height * 100 + width)
    x = torch.randn(batch, config.in_dim, times, height, width, generator=generator)
    context = torch.randn(batch, 7, config.text_dim, generator=generator)
    timestep = torch.arange(batch) * 100 + 500
    positions = torch.tensor([-10, -5, *range(times)])[:times]
    return x, timestep, context, positions


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
