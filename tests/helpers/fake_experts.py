"""Experts that cost nothing and depend on everything an expert is given."""

import torch
from torch import Tensor, nn

from storymem_dist.diffusion.denoise import PromptEmbeds
from storymem_dist.diffusion.experts import ExpertPair, Residency
from storymem_dist.diffusion.latent_grid import LatentGrid


class FakeExpert(nn.Module):
    """A velocity that changes with every input; ``weight`` tells two experts apart."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def forward(self, x_BCTHW: Tensor, timestep_B: Tensor, context_BSE: Tensor, temporal_positions_T: Tensor) -> Tensor:
        self.calls.append((int(timestep_B), tuple(context_BSE.shape)))
        noise, rest = x_BCTHW[:, :16].float(), x_BCTHW[:, 16:].float()
        velocity = torch.sin(self.weight * noise) * (timestep_B.view(-1, 1, 1, 1, 1) / 1000)
        velocity = velocity + 0.1 * context_BSE.mean() + 0.01 * temporal_positions_T.view(1, 1, -1, 1, 1).cos()
        return velocity + 0.1 * rest.mean(1, keepdim=True) if rest.shape[1] else velocity


def fake_experts(residency: Residency | None = None, guidance_scale: float = 3.5) -> ExpertPair:
    return ExpertPair(
        high_noise=FakeExpert(1.5),
        low_noise=FakeExpert(0.7),
        boundary_ratio=0.9,
        guidance_scale_high=guidance_scale,
        guidance_scale_low=guidance_scale,
        residency=residency,
    )


def fake_shot(num_memory: int = 2) -> tuple[LatentGrid, Tensor, Tensor | None, PromptEmbeds]:
    """Grid, noise, condition and prompt of a small shot, always the same."""
    grid = LatentGrid(num_frames=9, height=32, width=48, num_memory=num_memory)
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(grid.latent_shape, generator=generator)
    condition = torch.randn(20, *grid.latent_shape[1:], generator=generator) if num_memory else None
    prompt = PromptEmbeds(
        prompt_LE=torch.randn(7, 12, generator=generator), negative_LE=torch.randn(3, 12, generator=generator)
    )
    return grid, noise, condition, prompt
