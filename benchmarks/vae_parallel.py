"""How much faster is the VAE when N ranks share a picture?

    python -m benchmarks.vae_parallel                              # 1, 2, 4, 8 and 16 ranks, 480p and 720p
    python -m benchmarks.vae_parallel --sizes 480p --ranks 1 8     # quick
    python -m benchmarks.vae_parallel --measure --ranks 1 2        # seconds of real gloo ranks here, with a small clip

Without a GPU, the benchmark counts for a clip of 81 frames at full size: the FLOPs of a rank, its messages, and the
bytes that it sends. The FLOPs include ghost columns and the part of attention that every rank repeats. "efficiency" is
the FLOPs of one rank alone, divided by the FLOPs of all ranks together. The modelled time is the FLOPs at ``--tflops``
plus the messages at ``--latency-us``.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.ranks import CPU, report, reporting_rank, run_ranks, simulated_ranks
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.vae import parallelize_vae

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
NUM_FRAMES = 81
SMALL_CLIP = (5, 64, 128)
REPEATS = 3


def main() -> None:
    """Parse the command line; count, or measure on real ranks."""
    args = parse_arguments()
    if reporting_rank() is not None:
        report(measure_on_this_rank())
        return
    rows = measure(args.ranks) if args.measure else count_all(args)
    print_table(rows)
    write_json(args.json, "vae_parallel", {"rows": rows}, CPU)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("vae_parallel", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--latency-us", type=float, default=30.0, help="modelled time of one message")
    parser.add_argument("--tflops", type=float, default=300.0, help="modelled speed of a rank (TF32 on an H100)")
    parser.add_argument("--measure", action="store_true", help="measure real ranks instead of counting")
    return parser.parse_args()


# ---- counting


def count_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each size, direction and number of ranks."""
    rows = []
    for size in args.sizes:
        for what in ("encode", "decode"):
            alone = 0.0
            for num_ranks in args.ranks:
                counts = count(what, num_ranks, *SIZES[size])
                tflop = counts["flops"] / 1e12
                alone = alone or tflop * num_ranks
                seconds = tflop / args.tflops + counts["messages"] * args.latency_us * 1e-6
                rows.append(
                    {
                        "size": size,
                        "what": what,
                        "ranks": num_ranks,
                        "TFLOP/rank": round(tflop, 2),
                        "attention": round(counts["attention"] / 1e12, 2),
                        "efficiency": round(alone / tflop / num_ranks, 3),
                        "exchanges": counts["exchanges"],
                        "gathers": counts["gathers"],
                        "exchanged MB": round(counts["exchanged_bytes"] / 1e6, 1),
                        "gathered MB": round(counts["gathered_bytes"] / 1e6, 1),
                        "modelled s": round(seconds, 3),
                        "modelled speed-up": round(alone / args.tflops / seconds, 2),
                    }
                )
    return rows


def count(what: str, num_ranks: int, height: int, width: int, num_frames: int = NUM_FRAMES) -> Counter[str]:
    """FLOPs, messages and sent bytes of rank 1 (it has two neighbours) for one clip."""
    counts: Counter[str] = Counter()
    with simulated_ranks(num_ranks, rank=min(1, num_ranks - 1)) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        vae = WanVae(AutoencoderKLWan())
        if mesh.shard.group is not None:
            parallelize_vae(vae, mesh.shard.group)
        run = runner(vae, what, num_frames, height, width)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops, _MessageCounter(counts):
            run()
    by_operator = flops.get_flop_counts()["Global"]
    counts["flops"] = flops.get_total_flops()
    counts["attention"] = sum(n for operator, n in by_operator.items() if "attention" in str(operator))
    counts["messages"] = counts["exchanges"] + counts["gathers"]
    return counts


def runner(vae: WanVae, what: str, num_frames: int, height: int, width: int) -> Callable[[], Tensor]:
    """Encode or decode a clip of this size."""
    if what == "encode":
        clip = torch.zeros(3, num_frames, height, width)
        return lambda: vae.encode(clip)
    latents = torch.zeros(16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
    return lambda: vae.decode(latents)


def _attention_flops(q: Any, k: Any, v: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class _MessageCounter(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank sends in them."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            self._counts["exchanges"] += 1
            self._counts["exchanged_bytes"] += args[1].nbytes
        elif func is torch.ops.c10d.allgather_.default:
            self._counts["gathers"] += 1
            self._counts["gathered_bytes"] += args[1][0].nbytes
        return func(*args, **(kwargs or {}))


# ---- measuring


def measure(ranks: list[int]) -> list[dict[str, Any]]:
    """For a small clip, of the slowest rank: seconds, and processor time, which other processes disturb less."""
    rows: list[dict[str, Any]] = []
    alone: dict[str, float] = {}
    for num_ranks in ranks:
        reports = run_ranks("benchmarks.vae_parallel", num_ranks, ["--measure"])
        slowest = {name: max(one[name] for one in reports) for name in reports[0]}
        alone = alone or slowest
        rows.append(
            {"ranks": num_ranks}
            | {name: round(seconds, 2) for name, seconds in slowest.items()}
            | {f"{name}: speed-up": round(alone[name] / slowest[name], 2) for name in slowest}
        )
    frames, height, width = SMALL_CLIP
    print(f"one thread per rank, {frames} frames of {height} x {width}")
    return rows


def measure_on_this_rank() -> dict[str, float]:
    """Best seconds of encoding and decoding the small clip; all ranks start together."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    vae = WanVae(AutoencoderKLWan())
    everyone = dist.group.WORLD
    assert everyone is not None
    parallelize_vae(vae, everyone)
    best = {}
    for what in ("encode", "decode"):
        run = runner(vae, what, *SMALL_CLIP)
        run()
        rounds = []
        for _ in range(REPEATS):
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            rounds.append((time.perf_counter() - start, time.process_time() - start_cpu))
        best[f"{what} s"], best[f"{what} CPU s"] = (min(seconds) for seconds in zip(*rounds, strict=True))
    dist.destroy_process_group()
    return best


if __name__ == "__main__":
    main()
