"""How well does the planner's memory model predict what a rank needs?

    python -m benchmarks.planner_memory                      # the table of docs/planning.md (2 to 8 minutes)
    python -m benchmarks.planner_memory --only forward       # or fsdp, stream, vae

Without a GPU: the project's own transformer and VAE run on tensors without data, as one rank of N. Their live bytes are
counted at every operator and compared with the formulas of ``parallel/working_memory.py`` and ``weight_memory.py``.
Blocks have full size; an expert has four of them where the number of blocks only adds weights, and 40 where it is
streamed.
"""

import gc
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from benchmarks.harness import make_parser, peak_gib, print_table, write_json
from benchmarks.memory_cards import CARDS, streamed_forward
from benchmarks.memory_forward import forward_inputs
from benchmarks.ranks import CPU, simulated_ranks
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.hardware import GIB
from storymem_dist.models.precision import CONV_WORKSPACE_MIB
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import EXPERTS, WAN22_A14B
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae
from storymem_dist.parallel.working_memory import decode_bytes, encode_bytes
from storymem_dist.planner.memory import DENOISE, rank_memory
from storymem_dist.story.modes import M2V, T2V
from storymem_dist.weights.settings import ModelSettings

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
SHOTS = (("480p", 0), ("480p", 10), ("720p", 10))
LAYOUTS = (
    ParallelSettings(),
    ParallelSettings(cfg=2),
    ParallelSettings(ulysses=2),
    ParallelSettings(ulysses=4),
    ParallelSettings(ulysses=8),
    ParallelSettings(ring=2),
    ParallelSettings(ring=4),
    ParallelSettings(ring=8),
    ParallelSettings(ring=2, ulysses=4),
    ParallelSettings(cfg=2, ulysses=4),
)
SHARDED = (
    ParallelSettings(ulysses=2, weights="fsdp"),
    ParallelSettings(ulysses=4, weights="fsdp"),
    ParallelSettings(ulysses=8, weights="fsdp"),
    ParallelSettings(ulysses=8, weights="fsdp", prefetch_blocks=2),
    ParallelSettings(cfg=2, weights="fsdp"),
    ParallelSettings(cfg=2, ulysses=4, weights="fsdp", shard_over="sequence"),
    ParallelSettings(ring=2, ulysses=4, weights="fsdp"),
)
NUM_BLOCKS = 4
VAE_FRAMES = 17


def counted_bytes(
    parallel: ParallelSettings, config: DiTConfig, grid: LatentGrid, *, linears: str = "exact", rank: int = 0
) -> tuple[int, int]:
    """Bytes of an expert's weights on one rank, and the peak of one forward next to them, on tensors without data."""
    cfg, ring, ulysses = parallel.axes
    layout = Layout(cfg=cfg, ring=ring, ulysses=ulysses, ranks_per_node=parallel.ranks_per_replica)
    with (
        simulated_ranks(parallel.ranks_per_replica, rank, layout, shard_over=parallel.shard_over) as mesh,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        dit = WanDiT(config)
        quantize_linears(dit.blocks, linears)
        parallelize(dit, mesh, replace(parallel, compile=False))
        weights = sum(
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes
            for parameter in dit.parameters()
        )
        inputs = forward_inputs(config, grid)
        forward = round(peak_gib(lambda: dit(*inputs, grid.temporal_positions()), CPU) * GIB)
    gc.collect()
    return weights, forward


def compare(parallel: ParallelSettings, size: str, num_memory: int, *, num_blocks: int = NUM_BLOCKS) -> dict[str, Any]:
    """One row: predicted and counted bytes of weights and forward of one expert."""
    height, width = SIZES[size]
    grid = LatentGrid(num_frames=81, height=height, width=width, num_memory=num_memory)
    config = replace(WAN22_A14B.i2v if num_memory else WAN22_A14B.t2v, num_layers=num_blocks)
    weights, forward = counted_bytes(parallel, config, grid)
    predicted = rank_memory(
        replace(parallel, compile=False),
        ModelSettings(experts="resident"),
        config,
        SamplerSettings(height=height, width=width),
        num_keyframes=num_memory,
        kinds=(M2V,) if num_memory else (T2V,),
    )
    (phase,) = (one for one in predicted.phases if one.phase == DENOISE)
    total = phase.weights // len(EXPERTS) + phase.activations + phase.collectives
    cfg, ring, ulysses = parallel.axes
    return row(
        f"{parallel.weights}{'' if parallel.prefetch_blocks == 1 else f', {parallel.prefetch_blocks} ahead'}",
        f"cfg {cfg} ring {ring} ulysses {ulysses}",
        size,
        num_memory,
        total,
        weights + forward,
    )


def row(part: str, layout: str, size: str, num_memory: int, predicted: int, counted: int) -> dict[str, Any]:
    """A row of the table."""
    return {
        "part": part,
        "layout": layout,
        "size": size,
        "K": num_memory,
        "predicted GiB": f"{predicted / GIB:.2f}",
        "counted GiB": f"{counted / GIB:.2f}",
        "difference": f"{100 * (predicted / counted - 1):+.1f}%",
    }


def stream_rows() -> list[dict[str, Any]]:
    """Whole experts of 40 blocks, streamed into cards of 24 and 32 GB."""
    rows = []
    for card in ("24 GB", "32 GB"):
        for size, num_memory in SHOTS[:2]:
            height, width = SIZES[size]
            grid = LatentGrid(num_frames=81, height=height, width=width, num_memory=num_memory)
            free = int(CARDS[card] * GIB)
            found = streamed_forward(grid, "exact", free)
            predicted = rank_memory(
                ParallelSettings(compile=False),
                ModelSettings(experts="stream"),
                WAN22_A14B.i2v if num_memory else WAN22_A14B.t2v,
                SamplerSettings(height=height, width=width),
                num_keyframes=num_memory,
                kinds=(M2V,) if num_memory else (T2V,),
                room=free,
            )
            (phase,) = (one for one in predicted.phases if one.phase == DENOISE)
            total = phase.weights + phase.activations + phase.vae
            rows.append(row(f"stream, {card}", "1 rank", size, num_memory, total, int(found["most of both"] * GIB)))
    return rows


def vae_bytes(
    num_ranks: int, height: int, width: int, *, what: str, rank: int = 0, num_frames: int = VAE_FRAMES
) -> int:
    """The peak of encoding or decoding ``num_frames`` frames on one rank, weights excluded."""
    grid = LatentGrid(num_frames=num_frames, height=height, width=width)
    with simulated_ranks(num_ranks, rank) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        vae = WanVae(AutoencoderKLWan())
        if mesh.shard.group is not None:
            parallelize_vae(vae, mesh.shard.group)
        if what == "encode":
            clip = torch.empty(3, num_frames, height, width)
            return round(clip.nbytes + peak_gib(lambda: vae.encode(clip), CPU) * GIB)
        latents = torch.empty(16, grid.num_latents, grid.latent_height, grid.latent_width)
        return round(peak_gib(lambda: vae.decode(latents), CPU) * GIB)


def vae_rows() -> list[dict[str, Any]]:
    """Encoding and decoding on 1 to 8 ranks; the second rank has neighbours on both sides."""
    rows, workspace = [], CONV_WORKSPACE_MIB * 2**20
    for what, formula in (("encode", encode_bytes), ("decode", decode_bytes)):
        for num_ranks in (1, 2, 4, 8):
            height, width = SIZES["480p"]
            counted = vae_bytes(num_ranks, height, width, what=what, rank=min(1, num_ranks - 1))
            predicted = formula(height, width, num_frames=VAE_FRAMES, num_ranks=num_ranks) - workspace
            rows.append(
                row(f"VAE {what}", f"{num_ranks} rank{'s' if num_ranks > 1 else ''}", "480p", 0, predicted, counted)
            )
    return rows


def main() -> None:
    """Print the table."""
    parser = make_parser("planner_memory", __doc__)
    parser.add_argument("--only", nargs="+", choices=("forward", "fsdp", "stream", "vae"))
    args = parser.parse_args()
    wanted = args.only or ("forward", "fsdp", "stream", "vae")
    rows: list[dict[str, Any]] = []
    for name, layouts in (("forward", LAYOUTS), ("fsdp", SHARDED)):
        if name in wanted:
            rows += [compare(parallel, size, num_memory) for parallel in layouts for size, num_memory in SHOTS]
    if "stream" in wanted:
        rows += stream_rows()
    if "vae" in wanted:
        rows += vae_rows()
    print_table(rows)
    write_json(args.json, "planner_memory", {"rows": rows}, CPU)


if __name__ == "__main__":
    main()
