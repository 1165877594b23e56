"""Predicts what one forward, and the VAE, need on a rank: the project's own modules on tensors without data."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.harness import peak_gib
from benchmarks.ranks import CPU, simulated_ranks
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.hardware import GIB
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.mesh import ReplicaMesh
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae

NUM_FRAMES = 81


@dataclass(frozen=True, kw_only=True)
class ForwardPeak:
    """Peak of one forward on the rank that needs the most, in bytes, and its parts."""

    weights: int
    gathered: int
    activations: int
    total: int


def predict_forward(config: DiTConfig, grid: LatentGrid, num_ranks: int, linears: str = "exact") -> ForwardPeak:
    """One pass of one expert over ``num_ranks``: whole weights on one rank, FSDP2 and Ulysses on more."""
    with simulated_ranks(num_ranks) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        return tracked_forward(config, grid, mesh, linears)


def tracked_forward(config: DiTConfig, grid: LatentGrid, mesh: ReplicaMesh, linears: str = "exact") -> ForwardPeak:
    """Run a forward under a tracker: on real tensors, or on fake tensors inside ``FakeTensorMode``."""
    num_ranks = mesh.shard.size
    settings = ParallelSettings(ulysses=num_ranks, weights="fsdp" if num_ranks > 1 else "replicated")
    dit = WanDiT(config)
    quantize_linears(dit.blocks, linears)
    parallelize(dit, mesh, settings)
    inputs = forward_inputs(config, grid)
    if num_ranks == 1:
        weights = sum(parameter.nbytes for parameter in dit.parameters())
        with torch.no_grad():
            activations = round(peak_gib(lambda: dit(*inputs, grid.temporal_positions()), CPU) * GIB)
        return ForwardPeak(weights=weights, gathered=0, activations=activations, total=weights + activations)
    tracker: Any = FSDPMemTracker(dit)
    tracker.track_inputs(inputs)
    with torch.no_grad(), tracker:
        dit(*inputs, grid.temporal_positions())
    parts = {kind.value if hasattr(kind, "value") else kind: size for kind, size in peak_of(tracker).items()}
    weights = parts.get("Sharded Param", 0) + parts.get("Parameter", 0)
    gathered = parts.get("Unsharded Param", 0) + parts.get("All Gather", 0)
    return ForwardPeak(
        weights=weights, gathered=gathered, activations=parts["Total"] - weights - gathered, total=parts["Total"]
    )


def forward_inputs(config: DiTConfig, grid: LatentGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timestep and text of full length for one forward."""
    latents = torch.zeros(1, config.in_dim, grid.num_latents, grid.latent_height, grid.latent_width)
    return latents, torch.full((1,), 500), torch.zeros(1, config.text_len, config.text_dim, dtype=torch.bfloat16)


def predict_vae(num_ranks: int, height: int, width: int) -> dict[str, int]:
    """Peak bytes of encoding and decoding a clip of ``NUM_FRAMES``, VAE weights and the input included."""
    grid = LatentGrid(num_frames=NUM_FRAMES, height=height, width=width)
    with simulated_ranks(num_ranks) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        vae = WanVae(AutoencoderKLWan())
        if mesh.shard.group is not None:
            parallelize_vae(vae, mesh.shard.group)
        weights = sum(parameter.nbytes for parameter in vae.autoencoder.parameters())
        clip = torch.empty(3, NUM_FRAMES, height, width)
        latents = torch.empty(16, grid.num_latents, grid.latent_height, grid.latent_width)
        encode, decode = (peak_gib(run, CPU) * GIB for run in (lambda: vae.encode(clip), lambda: vae.decode(latents)))
    return {"encode": round(weights + clip.nbytes + encode), "decode": round(weights + latents.nbytes + decode)}


def peak_of(tracker: MemTracker) -> dict[Any, int]:
    """A tracker's bytes by kind, at the moment of the highest sum."""
    return tracker.get_tracker_snapshot("peak")[CPU]
