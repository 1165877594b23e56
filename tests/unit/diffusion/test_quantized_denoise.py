"""Whole denoises with 8-bit layers stay near the exact one; the error falls with the number of bits kept."""

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion.denoise import PromptEmbeds, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.seeds import initial_noise
from storymem_dist.diffusion.solver import Solver
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_tiny_checkpoint

LARGEST_ERRORS = {"float8": 0.05, "int8": 0.012}
"""Twice the measured 2.2e-2 and 5.8e-3. A single layer is off by 3.8% and 0.8% (``test_quantized_linear``). A denoise
is not further off, so errors do not grow over its steps."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    return generate_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


def latents(tiny: ModelFolders, linears: str) -> Tensor:
    checkpoint = open_checkpoint(tiny.t2v_dir, "t2v")
    dits = {}
    for name in EXPERTS:
        dits[name] = WanDiT(checkpoint.dit_config, dtype=torch.float32).eval().requires_grad_(False)
        quantize_linears(dits[name].blocks, linears)
        load_dit_weights(dits[name], checkpoint.expert(name))
    experts = ExpertPair(**dits, boundary_ratio=0.875, guidance_scale_high=3.5, guidance_scale_low=3.5)
    generator = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(2, 9, checkpoint.dit_config.text_dim, generator=generator)
    grid = LatentGrid(num_frames=9, height=64, width=96)
    solver = Solver("unipc", num_steps=20, flow_shift=12.0)
    embeds = PromptEmbeds(prompt_LE=prompt, negative_LE=negative)
    noise = initial_noise(0, grid.latent_shape)
    return denoise(experts, LocalGuidance(), solver, noise, None, embeds, grid, device="cpu")


@pytest.mark.float8
def test_errors_of_whole_denoises_are_bounded_and_fall_with_the_bits_kept(tiny: ModelFolders) -> None:
    exact = latents(tiny, "exact")
    errors = {
        linears: ((latents(tiny, linears) - exact).norm() / exact.norm()).item() for linears in ("float8", "int8")
    }
    assert 1e-4 < errors["int8"] < LARGEST_ERRORS["int8"]
    assert errors["int8"] < errors["float8"] < LARGEST_ERRORS["float8"]
