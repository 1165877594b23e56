"""What preparing weights costs, and what it saves at every start.

Writes an I2V base model with A14B's names and 40 blocks, narrower (two experts of 2.3 GB, FP32), and a LoRA of rank 128
for both experts. Prepares it in each format, then loads the high-noise expert from the original (LoRA merged while
loading) and from each prepared folder, every time in a fresh process, once with the files dropped from the page
cache ("cold") and once with them in it ("warm").

    python benchmarks/prepare.py --json prepare.json

"over model" is the peak of anonymous memory above the loaded parameters; for preparing, above the start. "equal"
compares every loaded weight with those of the original, loaded in the same type.
"""

import argparse
import hashlib
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import print_table, write_json
from ranks import MemoryPeak, report, reporting_rank, run_ranks
from safetensors.torch import save_file

from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS, TINY, WAN22_A14B
from storymem_dist.weights.checkpoints import dit_shapes, open_checkpoint
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_loras
from storymem_dist.weights.prepare import prepare_checkpoint
from storymem_dist.weights.prepared import STORED_DTYPES
from storymem_dist.weights.tiny_checkpoint import LORA_TARGETS, generate_checkpoint

EXPERT = "high_noise"
LORA_RANK = 128
NARROW = replace(WAN22_A14B.i2v, dim=1024, num_heads=8, ffn_dim=2816)
MIB = 2**20
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}


def main() -> None:
    """Parse the command line; in a process of ours, do one step and report."""
    args = parse_arguments()
    if reporting_rank() is not None:
        report(prepare(args) if args.step == "prepare" else load(args))
        return
    with tempfile.TemporaryDirectory(prefix="prepare-benchmark-", dir=args.scratch) as scratch:
        folder = Path(scratch)
        original = write_checkpoint(folder / "original")
        rows = []
        for dtype in STORED_DTYPES:
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
    write_json(args.json, {"rows": rows}, torch.device("cpu"))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (needs 14 GB)")
    parser.add_argument("--json", type=Path)
    for hidden in ("--step", "--source", "--dtype", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def step(name: str, source: Path, dtype: str, *further: object) -> list[dict[str, Any]]:
    """Run one step in a process of its own; what it reported."""
    return run_ranks(__file__, 1, ["--step", name, "--source", source, "--dtype", dtype, *further])


def write_checkpoint(folder: Path) -> Path:
    """A narrow I2V base model in the native layout, and ``lora.safetensors`` inside it."""
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


def loras_of(folder: Path) -> dict[str, list[ScaledLora]]:
    """The original's LoRA for each expert; nothing for a prepared folder."""
    path = folder / "lora.safetensors"
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
    """Load one expert as a job would, in the type it computes with."""
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
