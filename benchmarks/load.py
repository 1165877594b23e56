"""How much memory and reading does it take each rank to load an expert?

    python -m benchmarks.load                          # 1, 2 and 4 ranks
    python -m benchmarks.load --ranks 2 --blocks 4     # quick: a tenth of the weights

The benchmark writes a checkpoint with A14B's names and 40 blocks, but narrower (two experts of 2.3 GB, FP32), and a
LoRA. Then it loads the high-noise expert in bf16 and merges the LoRA, in each of these ways:

    sharded      one replica over all ranks; every rank reads and merges only its own rows (the project's way)
    whole        every rank loads the whole expert, then shards it (the usual way, for comparison with "sharded")
    replicas     one replica per rank; one rank reads for the node and broadcasts (the project's way)
    separate     one replica per rank; each rank reads for itself (for comparison with "replicas")

"over shard" is the peak of anonymous memory, less the parameters that the rank keeps. Pages of mapped files do not
count. "allowed" is the largest tensor plus 200 MB. "most read / share" should be at most 1.1.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.narrow_model import LORA_FILE, write_narrow_model
from benchmarks.ranks import MemoryPeak, report, reporting_rank, run_ranks
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.loading import build_expert, local_part
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.checkpoints import WanCheckpoint, open_checkpoint
from storymem_dist.weights.loading import LoadReport, load_dit_weights
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_loras

EXPERT = "high_noise"
MIB = 2**20
ALLOWED_OVER_LARGEST = 200 * 10**6


def main() -> None:
    """Parse the command line; in a started rank, load in one way and report."""
    args = parse_arguments()
    if reporting_rank() is not None:
        report(load_on_this_rank(args.way, args.checkpoint))
        return
    with tempfile.TemporaryDirectory(prefix="load-benchmark-", dir=args.scratch) as folder:
        checkpoint = args.checkpoint or write_narrow_model(Path(folder), args.blocks)
        rows = []
        for num_ranks in args.ranks:
            ways = ("sharded", "whole", *(("replicas", "separate") if num_ranks > 1 else ()))
            for way in ways:
                reports = run_ranks("benchmarks.load", num_ranks, ["--way", way, "--checkpoint", checkpoint])
                rows.append(summary(way, reports))
    print_table(rows)
    write_json(args.json, "load", {"rows": rows}, torch.device("cpu"))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("load", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the generated experts")
    parser.add_argument("--scratch", type=Path, help="folder for the generated checkpoint (6 GB with 40 blocks)")
    for hidden, kind in (("--way", str), ("--checkpoint", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def summary(way: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from the reports of all ranks; memory is that of the rank that needed the most."""
    largest = reports[0]["largest_tensor"]
    over = max(one["peak"] - one["shard"] for one in reports)
    read = [one["bytes_read"] for one in reports]
    share = reports[0]["expert_bytes"] / len(reports)
    return {
        "way": way,
        "ranks": len(reports),
        "shard MiB": round(max(one["shard"] for one in reports) / MIB),
        "peak MiB": round(max(one["peak"] for one in reports) / MIB),
        "over shard MiB": round(over / MIB),
        "allowed MiB": round((largest + ALLOWED_OVER_LARGEST) / MIB),
        "read by all / expert": round(sum(read) / reports[0]["expert_bytes"], 3),
        "most read / share": round(max(read) / share, 3),
        "seconds": round(max(one["seconds"] for one in reports), 1),
    }


def load_on_this_rank(way: str, folder: Path) -> dict[str, Any]:
    """Load the expert in one way; return bytes and seconds of this rank."""
    checkpoint = open_checkpoint(folder, "i2v")
    loras = open_loras([LoraSettings(path=str(folder / LORA_FILE), scale_rule="rslora")], EXPERT)
    source = checkpoint.expert(EXPERT)
    keys = source.keys()
    sizes = [source.shape(key).numel() * source.dtype(key).itemsize for key in keys]
    with start_session(settings_of(way)) as session:
        dist.barrier()
        with MemoryPeak() as memory:
            dit, loaded = load(way, checkpoint, loras, session)
        return {
            "peak": memory.grown_bytes,
            "shard": sum(local_part(name, parameter).tensor.nbytes for name, parameter in dit.named_parameters()),
            "largest_tensor": max(sizes),
            "expert_bytes": sum(sizes),
            "bytes_read": loaded.bytes_read,
            "seconds": loaded.elapsed_seconds,
        }


def settings_of(way: str) -> ParallelSettings:
    """The layout over all started ranks."""
    if way in ("replicas", "separate"):
        return ParallelSettings(weights="replicated", share_reads=way == "replicas")
    return ParallelSettings(ulysses=int(os.environ["WORLD_SIZE"]), weights="fsdp")


def load(way: str, checkpoint: WanCheckpoint, loras: list[ScaledLora], session: Session) -> tuple[WanDiT, LoadReport]:
    """The expert with this rank's part of the weights, and the report of its loading."""
    if way != "whole":
        return build_expert(
            checkpoint.dit_config, checkpoint.expert(EXPERT), loras, session=session, settings=settings_of(way)
        )
    start = time.perf_counter()
    dit = WanDiT(checkpoint.dit_config)
    loaded = load_dit_weights(dit, checkpoint.expert(EXPERT), loras)
    parallelize(dit, session.mesh, settings_of(way))
    return dit, replace(loaded, elapsed_seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
