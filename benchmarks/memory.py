"""How much memory does each rank need for A14B? Predicted without a GPU and without that memory.

    python -m benchmarks.memory                       # 1, 2, 4, 8 ranks (FSDP2 + Ulysses), 480p and 720p, K = 0 and 10
    python -m benchmarks.memory --ranks 1 --sizes 480p --memory 0      # quick: one row of the table
    python -m benchmarks.memory --linears float8      # with layers in eight bits, not compiled
    python -m benchmarks.memory --validate            # compare the prediction with a real small run on 2 gloo ranks

The project's own transformer and VAE run on tensors without data, parallelized over a process group that sends nothing.
torch's memory trackers add up the live bytes. They count weights, activations and the tensors that FSDP2 gathers. They
do not count the CUDA context, NCCL's buffers, scratch space of kernels, and fragmentation. K is the number of memory
keyframes.
"""

import argparse
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.harness import make_parser, peak_gib, print_table, write_json
from benchmarks.ranks import CPU, MemoryPeak, report, reporting_rank, run_ranks, simulated_ranks
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.hardware import GIB
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.loading import local_part
from storymem_dist.parallel.mesh import ReplicaMesh, build_mesh
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
NUM_FRAMES = 81
SMALL = DiTConfig(
    dim=1024, ffn_dim=4096, freq_dim=256, num_heads=8, num_layers=6, in_dim=36, text_dim=1024, text_len=512
)


@dataclass(frozen=True, kw_only=True)
class ForwardPeak:
    """Peak of one forward on the rank that needs the most, in bytes, and its parts."""

    weights: int
    gathered: int
    activations: int
    total: int


def main() -> None:
    """Parse the command line; predict, or validate the prediction."""
    args = parse_arguments()
    warnings.filterwarnings("ignore")
    if reporting_rank() is not None:
        report(run_small_model())
    elif args.validate:
        validate(args.json)
    else:
        predict_all(args)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("memory", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--memory", type=int, nargs="+", default=[0, 10], help="memory keyframes, K (0: T2V, else M2V)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--linears",
        choices=("exact", "float8"),
        default="exact",
        help="model.linears (int8 needs as much as float8; torch's tracker cannot follow integer weights)",
    )
    parser.add_argument("--validate", action="store_true", help="compare with a real run of a small model")
    return parser.parse_args()


# ---- prediction


def predict_all(args: argparse.Namespace) -> None:
    """Print the table: one row for each size, number of ranks and K."""
    rows = []
    for size in args.sizes:
        height, width = SIZES[size]
        for num_ranks in args.ranks:
            vae = predict_vae(num_ranks, height, width)
            for num_memory in args.memory:
                grid = LatentGrid(num_frames=NUM_FRAMES, height=height, width=width, num_memory=num_memory)
                config = WAN22_A14B.i2v if num_memory else WAN22_A14B.t2v
                peak = predict_forward(config, grid, num_ranks, args.linears)
                rows.append(
                    {
                        "size": size,
                        "linears": args.linears,
                        "K": num_memory,
                        "ranks": num_ranks,
                        "tokens": grid.num_tokens,
                        **{f"{part} GiB": round(num_bytes / GIB, 2) for part, num_bytes in asdict(peak).items()},
                        "both experts GiB": round((peak.total + peak.weights) / GIB, 2),
                        **{f"VAE {what} GiB": round(num_bytes / GIB, 2) for what, num_bytes in vae.items()},
                    }
                )
    print_table(rows)
    write_json(args.json, "memory", {"rows": rows}, CPU)


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
    if num_ranks > 1:
        tracker: Any = FSDPMemTracker(dit)
        tracker.track_inputs(inputs)
    else:
        dit.requires_grad_(True)  # the tracker hooks gradients; no_grad below prevents their computation
        tracker = MemTracker()
        tracker.track_external(dit, *inputs)
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


# ---- validation


def validate(json_file: Path | None) -> None:
    """Print predicted, tracked and resident peaks of a small model on 2 real ranks."""
    predicted = asdict(predict_forward(SMALL, small_grid(), 2))
    first, _ = run_ranks("benchmarks.memory", 2, ["--validate"])
    mib = {name: round(num_bytes / 2**20, 1) for name, num_bytes in predicted.items()}
    rows = [
        {"how": "predicted with fake tensors", **mib},
        {"how": "tracked on real tensors", **{k: round(first["tracked"][k] / 2**20, 1) for k in predicted}},
        {"how": "resident memory (RssAnon)", **dict.fromkeys(mib, ""), "total": round(first["resident"] / 2**20, 1)},
    ]
    print_table(rows)
    ratio = first["resident"] / predicted["total"]
    print(f"resident / predicted: {ratio:.3f}")
    write_json(json_file, "memory", {"unit": "MiB", "rows": rows, "resident_over_predicted": ratio}, CPU)


def small_grid() -> LatentGrid:
    """The clip of the validation: 3,120 tokens."""
    return LatentGrid(num_frames=17, height=240, width=416, num_memory=3)


def run_small_model() -> dict[str, Any]:
    """On each of two real ranks: run a forward while its resident memory is sampled, then one under the tracker."""
    dist.init_process_group("gloo")
    mesh = build_mesh(Layout(ulysses=2, ranks_per_node=2), CPU)
    settings = ParallelSettings(ulysses=2, weights="fsdp")
    grid = small_grid()
    with MemoryPeak() as peak, torch.no_grad():
        with torch.device("meta"):
            dit = WanDiT(SMALL)
        parallelize(dit, mesh, settings).to_empty(device=CPU)
        for name, parameter in dit.named_parameters():
            local_part(name, parameter).tensor.normal_(std=0.02)
        dit(*forward_inputs(SMALL, grid), grid.temporal_positions())
    del dit
    tracked = tracked_forward(SMALL, grid, mesh)
    dist.destroy_process_group()
    return {"tracked": asdict(tracked), "resident": peak.grown_bytes}


if __name__ == "__main__":
    main()
