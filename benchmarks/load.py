"""What loading an expert costs each rank: peak memory above its own shard, and bytes read.

Writes a checkpoint with A14B's names and 40 blocks, narrower (two experts of 2.3 GB, FP32), and a LoRA. Then loads
the high-noise expert in bf16 with the LoRA merged, in each of these ways:

    sharded      one replica over all ranks: every rank reads and merges just its rows (the project's way)
    whole        every rank loads the whole expert, then shards it (the usual way; what the first avoids)
    replicas     one replica per rank, one of them reads for the node and broadcasts (the project's way)
    separate     one replica per rank, each reads for itself (what ``share_reads`` avoids)

    python benchmarks/load.py --ranks 1 2 4

"over shard" is the peak of anonymous memory (mapped file pages do not count) above the parameters the rank keeps. The
issue's bound for it is the largest tensor plus 200 MB; for "read" it is 1.1 times the rank's share.
"""

import argparse
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import print_table, write_json
from ranks import MemoryPeak, report, reporting_rank, run_ranks
from safetensors.torch import save_file

from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import TINY, WAN22_A14B
from storymem_dist.parallel.loading import build_expert, local_part
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.checkpoints import WanCheckpoint, dit_shapes, open_checkpoint
from storymem_dist.weights.loading import LoadReport, load_dit_weights
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_loras
from storymem_dist.weights.tiny_checkpoint import LORA_TARGETS, generate_checkpoint

EXPERT = "high_noise"
LORA_RANK = 128
NARROW = replace(WAN22_A14B.i2v, dim=1024, num_heads=8, ffn_dim=2816)
MIB = 2**20
ALLOWED_OVER_LARGEST = 200 * 10**6


def main() -> None:
    """Parse the command line; on a rank of ours, load one way and report."""
    args = parse_arguments()
    if reporting_rank() is not None:
        report(load_on_this_rank(args.way, args.checkpoint))
        return
    with tempfile.TemporaryDirectory(prefix="load-benchmark-", dir=args.scratch) as folder:
        checkpoint = args.checkpoint or write_checkpoint(Path(folder))
        rows = []
        for num_ranks in args.ranks:
            ways = ("sharded", "whole", *(("replicas", "separate") if num_ranks > 1 else ()))
            for way in ways:
                reports = run_ranks(__file__, num_ranks, ["--way", way, "--checkpoint", checkpoint])
                rows.append(summary(way, reports))
    print_table(rows)
    write_json(args.json, {"rows": rows}, torch.device("cpu"))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--scratch", type=Path, help="folder for the generated checkpoint (needs 6 GB)")
    parser.add_argument("--checkpoint", type=Path, help="a folder that an earlier run has kept; default: generate one")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def write_checkpoint(folder: Path) -> Path:
    """A narrow I2V base model in the native layout, and ``lora.safetensors`` beside it."""
    generate_checkpoint(folder, replace(TINY, i2v=NARROW), "i2v")
    shapes = dit_shapes(NARROW)
    halves: dict[str, torch.Tensor] = {}
    for block in range(NARROW.num_layers):
        for target in LORA_TARGETS:
            rows, columns = shapes[f"blocks.{block}.{target}.weight"]
            key = f"base_model.model.blocks.{block}.{target}"
            halves[f"{key}.lora_A.weight"] = torch.randn(LORA_RANK, columns) / math.sqrt(columns)
            halves[f"{key}.lora_B.weight"] = torch.randn(rows, LORA_RANK) * 1e-3
    save_file(halves, folder / "lora.safetensors")
    return folder


def summary(way: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from the reports of all ranks; memory is that of the rank that needed most."""
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
    """Load the expert in one way; bytes and seconds of this rank."""
    checkpoint = open_checkpoint(folder, "i2v")
    loras = open_loras([LoraSettings(path=str(folder / "lora.safetensors"), scale_rule="rslora")], EXPERT)
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
    """The expert, with this rank's part of the weights, and what loading it took."""
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
