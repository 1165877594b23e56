"""Our transformer's forward against diffusers' ``WanTransformer3DModel``: same weights, same inputs, same process.

    python benchmarks/dit_forward.py                              # small, on the CPU: about 3,000 tokens
    python benchmarks/dit_forward.py --device cuda --preset wan22_a14b --dtype bfloat16 --latents 21 60 104

Speed-up is diffusers' time over ours (1.0 or more: we are as fast), median over interleaved rounds.
"""

import argparse
from pathlib import Path

import torch
from harness import device_name, interleaved_seconds, median_ratio, peak_gib, print_table, write_json
from rivals import make_diffusers, make_inputs, make_ours, run_diffusers, run_ours, small_config

from storymem_dist.models.wan.presets import PRESETS


def main() -> None:
    """Build both, time them in turn, print and write what came out."""
    args = parse_arguments()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = PRESETS[args.preset].i2v if args.preset else small_config(args.dim, args.heads, args.layers, args.in_dim)
    ours = make_ours(config, dtype, device)
    theirs = make_diffusers(ours)
    inputs = make_inputs(config, tuple(args.latents), device)

    rivals = [lambda: run_ours(ours, inputs), lambda: run_diffusers(theirs, inputs, dtype)]
    difference = ((rivals[0]() - rivals[1]()).norm() / rivals[0]().norm()).item()
    peaks = [peak_gib(rival, device) for rival in rivals]
    rounds = interleaved_seconds(rivals, repeats=args.repeats, device=device, clock=args.clock)
    best = [min(times[i] for times in rounds) for i in range(2)]
    speedup = median_ratio(rounds, numerator=1, denominator=0)

    print(f"{device_name(device)}, torch {torch.__version__}, {args.dtype}")
    print(f"dim {config.dim}, {config.num_heads} heads, {config.num_layers} layers, {inputs.num_tokens} tokens")
    print_table(
        [
            {"model": name, "best seconds": best[i], "peak GiB": peaks[i]}
            for i, name in enumerate(("storymem_dist", "diffusers"))
        ]
    )
    print(f"speed-up {speedup:.3f} (diffusers / ours, median of {args.repeats}); outputs differ by {difference:.1e}")
    results = {
        "benchmark": "dit_forward",
        "dtype": args.dtype,
        "clock": args.clock,
        "dim": config.dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "num_tokens": inputs.num_tokens,
        "ours_seconds": best[0],
        "diffusers_seconds": best[1],
        "speedup": speedup,
        "ours_peak_gib": peaks[0],
        "diffusers_peak_gib": peaks[1],
        "relative_difference": difference,
    }
    write_json(args.json, results, device)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="full sizes instead of --dim, --heads, --layers")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--in-dim", type=int, default=36, choices=[16, 36])
    parser.add_argument("--latents", type=int, nargs=3, default=[8, 30, 50], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: this process's own seconds")
    parser.add_argument("--json", type=Path, help="write the results here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
