"""How much memory does each rank need for A14B? Predicted without a GPU and without that memory.

    python -m benchmarks.memory                       # 1, 2, 4, 8 ranks (FSDP2 + Ulysses), 480p and 720p, K = 0 and 10
    python -m benchmarks.memory --ranks 1 --sizes 480p --memory 0      # quick: one row of the table
    python -m benchmarks.memory --linears float8      # with layers in eight bits, not compiled
    python -m benchmarks.memory --cards --linears exact float8 int8    # what fits 24, 32, 48, 80 GB, part by part
    python -m benchmarks.memory --compiled --linears exact float8 int8       # what compiled blocks need (compiles)
    python -m benchmarks.memory --stream "24 GB" --sizes 480p --memory 10    # a whole expert, its blocks streamed
    python -m benchmarks.memory --validate            # compare the prediction with a real small run on 2 gloo ranks

The project's own transformer and VAE run on tensors without data, parallelized over a process group that sends nothing.
torch's memory trackers add up the live bytes. They count weights, activations and the tensors that FSDP2 gathers. They
do not count the CUDA context, NCCL's buffers, scratch space of kernels, and fragmentation. K is the number of memory
keyframes.
"""

import argparse
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.memory_cards import CARDS, card_tables, streamed_forward
from benchmarks.memory_compiled import bytes_per_channel
from benchmarks.memory_forward import NUM_FRAMES, forward_inputs, predict_forward, predict_vae, tracked_forward
from benchmarks.ranks import CPU, MemoryPeak, report, reporting_rank, run_ranks
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.hardware import GIB
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.loading import local_part
from storymem_dist.parallel.mesh import build_mesh
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.settings import ParallelSettings

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
SMALL = DiTConfig(
    dim=1024, ffn_dim=4096, freq_dim=256, num_heads=8, num_layers=6, in_dim=36, text_dim=1024, text_len=512
)


def main() -> None:
    """Parse the command line; predict, or validate the prediction."""
    args = parse_arguments()
    warnings.filterwarnings("ignore")
    if reporting_rank() is not None:
        report(run_small_model())
    elif args.validate:
        validate(args.json)
    elif args.compiled:
        measure_compiled(args)
    elif args.cards:
        predict_cards(args)
    elif args.stream:
        predict_streams(args)
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
        nargs="+",
        choices=("exact", "float8", "int8"),
        default=["exact"],
        help="model.linears (int8 for one rank and --cards only: torch's tracker cannot follow sharded integers)",
    )
    parser.add_argument("--cards", action="store_true", help="what fits cards of 24 to 80 GB, alone and eight together")
    parser.add_argument("--compiled", action="store_true", help="what a compiled forward needs per token and channel")
    parser.add_argument("--stream", metavar="CARD", choices=CARDS, help="stream a whole expert of full size into it")
    parser.add_argument("--validate", action="store_true", help="compare with a real run of a small model")
    args = parser.parse_args()
    others = args.cards or args.stream or args.compiled
    if "int8" in args.linears and not others and max(args.ranks) > 1:
        parser.error("--linears int8 needs --ranks 1, --cards, --stream or --compiled")
    return args


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
                for linears in args.linears:
                    peak = predict_forward(config, grid, num_ranks, linears)
                    rows.append(
                        {
                            "size": size,
                            "linears": linears,
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


def predict_cards(args: argparse.Namespace) -> None:
    """Print what fits which card, part by part, in GiB."""
    tables = card_tables({size: SIZES[size] for size in args.sizes}, args.memory, args.linears)
    for title, rows in tables.items():
        print(f"\n{title}")
        if rows:
            print_table(rows)
    write_json(args.json, "memory", tables, CPU)


def measure_compiled(args: argparse.Namespace) -> None:
    """Print the bytes per token and channel of a forward, compiled by this machine."""
    rows = [
        {"linears": name, "compiled, bytes per token and channel": round(bytes_per_channel(name, compiled=True), 2)}
        for name in args.linears
    ]
    print_table(rows)
    write_json(args.json, "memory", {"rows": rows}, CPU)


def predict_streams(args: argparse.Namespace) -> None:
    """Print what two streamed passes of a whole expert need, in GiB."""
    rows = []
    for size in args.sizes:
        height, width = SIZES[size]
        for num_memory in args.memory:
            grid = LatentGrid(num_frames=NUM_FRAMES, height=height, width=width, num_memory=num_memory)
            for linears in args.linears:
                found = streamed_forward(grid, linears, int(CARDS[args.stream] * GIB))
                rows.append({"card": args.stream, "size": size, "K": num_memory, "linears": linears, **found})
    print_table(rows)
    write_json(args.json, "memory", {"rows": rows}, CPU)


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
