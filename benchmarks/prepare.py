"""How much time does it take to prepare weights, compared with the time saved at every start?

    python -m benchmarks.prepare
    python -m benchmarks.prepare --blocks 4 --dtypes bfloat16      # quick: a tenth of the weights, one format

The benchmark writes an I2V base model with A14B's names and 40 blocks, but narrower (two experts of 2.3 GB, FP32), and
a LoRA of rank 128 for both experts. It prepares this model in each format. Then it loads the high-noise expert from the
original (and merges the LoRA) and from each prepared folder. Every load runs in a new process. A "cold" load reads from
the disk: the files are dropped from the page cache first. A "warm" load reads from the page cache.

"over model" is the peak of anonymous memory, less the loaded parameters; when preparing, less the memory at the start.
"equal" compares every loaded weight with the weight of the original, loaded in the same type.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.narrow_model import LORA_FILE, write_narrow_model
from benchmarks.ranks import MemoryPeak, report, reporting_rank, run_ranks
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_loras
from storymem_dist.weights.prepare import prepare_checkpoint
from storymem_dist.weights.prepared import STORED_DTYPES

EXPERT = "high_noise"
MIB = 2**20
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}


def main() -> None:
    """Parse the command line; in a started process, do one step and report."""
    args = parse_arguments()
    if reporting_rank() is not None:
        report(prepare(args) if args.step == "prepare" else load(args))
        return
    with tempfile.TemporaryDirectory(prefix="prepare-benchmark-", dir=args.scratch) as scratch:
        folder = Path(scratch)
        original = write_narrow_model(folder / "original", args.blocks)
        rows = []
        for dtype in args.dtypes:
            prepared = folder / dtype
            (written,) = step("prepare", original, dtype, "--output", prepared)
            rows.append({"what": f"prepare {dtype}", **written, "equal": ""})
            loaded = {}
            for source in (original, prepared):
                for cache in ("cold", "warm"):
                    if cache == "cold":
                        drop_from_cache(folder)
                    (found,) = step("load", source, dtype)
                    loaded[source] = found.pop("digest")
                    rows.append({"what": f"load {dtype if source == prepared else 'original'} ({cache})", **found})
            rows[-1]["equal"] = loaded[original] == loaded[prepared]
    print_table(rows)
    write_json(args.json, "prepare", {"rows": rows}, torch.device("cpu"))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("prepare", __doc__)
    parser.add_argument("--blocks", type=int, default=40, help="blocks of the generated experts")
    parser.add_argument("--dtypes", nargs="+", default=list(STORED_DTYPES), choices=STORED_DTYPES, help="formats")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (14 GB with 40 blocks)")
    for hidden in ("--step", "--source", "--dtype", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def step(name: str, source: Path, dtype: str, *further: object) -> list[dict[str, Any]]:
    """Run one step in a new process; return its report."""
    return run_ranks("benchmarks.prepare", 1, ["--step", name, "--source", source, "--dtype", dtype, *further])


def loras_of(folder: Path) -> dict[str, list[ScaledLora]]:
    """The original's LoRA for each expert; an empty list for a prepared folder."""
    path = folder / LORA_FILE
    settings = [LoraSettings(path=str(path), scale_rule="rslora")] if path.exists() else []
    return {expert: open_loras(settings, expert) for expert in EXPERTS}


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare both experts."""
    source, output = Path(args.source), Path(args.output)
    checkpoint, loras = open_checkpoint(source, "i2v"), loras_of(source)
    start = time.perf_counter()
    with MemoryPeak() as memory:
        manifest = prepare_checkpoint(checkpoint, loras, output, dtype=args.dtype)
    written = sum(facts["num_bytes"] for facts in manifest.files.values())
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "read MB": round(sum(source.bytes_read for source in checkpoint.sources.values()) / 1e6),
        "written MB": round(written / 1e6),
        "over model MiB": round(memory.grown_bytes / MIB),
    }


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Load one expert as a job does, in the type that it computes with."""
    source = Path(args.source)
    start = time.perf_counter()
    checkpoint, loras = open_checkpoint(source, "i2v"), loras_of(source)
    with MemoryPeak() as memory:
        with torch.device("meta"):
            dit = WanDiT(checkpoint.dit_config, dtype=COMPUTE_DTYPES[args.dtype])
        dit.to_empty(device="cpu")
        loaded = load_dit_weights(dit, checkpoint.expert(EXPERT), loras[EXPERT])
    seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for parameter in dit.parameters():
        digest.update(parameter.detach().view(torch.uint8).numpy().data)
    model = sum(parameter.nbytes for parameter in dit.parameters())
    return {
        "seconds": round(seconds, 1),
        "read MB": round(loaded.bytes_read / 1e6),
        "over model MiB": round((memory.grown_bytes - model) / MIB),
        "digest": digest.hexdigest(),
    }


def drop_from_cache(folder: Path) -> None:
    """Make the next read of every file under ``folder`` come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
