"""How fast is one denoising step (both guidance passes), compared with diffusers' transformer, eager and compiled?

    python -m benchmarks.step                                     # small, on the CPU: 4,000 tokens
    python -m benchmarks.step --dim 512 --layers 2 --latents 4 16 24 --no-compile --repeats 2      # quick
    python -m benchmarks.step --memory 0 10 --repeats 3           # with and without memory frames
    python -m benchmarks.step --device cuda --preset wan22_a14b --dtype bfloat16 --latents 21 60 104 --memory 0 10

All rivals have the same weights and inputs, and run in turn in one process. Compiled rivals are compiled block by
block, before the first timing. "speed-up" is the time of diffusers divided by the rival's time (median of the rounds);
"difference" compares the rival's velocity with that of diffusers. "utilisation" is relative to the device's published
bf16 peak; where this is unknown, to the speed of a large matrix product. "other time" is the share of a profiled step
outside matrix products and attention. "kernels" counts the launches of one block. With ``--linears float8`` on a CPU,
the seconds say nothing: CPUs emulate float8. ``--backends flash_attn_3`` runs in a process of its own, because it takes
the place of torch's flash kernel; its speed-up is against diffusers in that process, before it is activated.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.harness import (
    device_name,
    interleaved_seconds,
    make_parser,
    median_ratio,
    peak_gib,
    print_table,
    profile_run,
    write_json,
)
from benchmarks.own_dit import (
    Inputs,
    make_inputs,
    make_ours,
    make_quantized,
    run_ours,
    share_weights,
    small_config,
    step_tflop,
)
from benchmarks.rivals import make_diffusers, run_diffusers
from storymem_dist.errors import ConfigError
from storymem_dist.hardware import peak_tflops
from storymem_dist.models.attention import BACKENDS, Attend, start_backend
from storymem_dist.models.compile import compile_blocks
from storymem_dist.models.quantized_linear import LINEARS
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import PRESETS

GUIDANCE_SCALE = 3.5
FLASH_ATTN_3 = "flash_attn_3"
STORY = (1, 3, 6, 9, 10)  # memory frames of the shots of one story


def main() -> None:
    """Build the rivals, time them for each number of memory frames, print and write the results."""
    args = parse_arguments()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch._inductor.config.cpp.enable_kernel_profile = True  # shows the profiler fused loops on the CPU
    config = PRESETS[args.preset].i2v if args.preset else small_config(args.dim, args.heads, args.layers)
    peak = peak_tflops(device_name(device)) or measured_tflops(dtype, device, args.clock)
    try:
        if args.alone:
            rows = measure_flash_attn_3(config, peak, args, dtype, device)
            return write_json(args.json, "step", {"rows": rows}, device)
        of_flash_attn_3 = run_alone(sys.argv[1:]) if FLASH_ATTN_3 in args.backends else []
        rivals = make_rivals(config, args, dtype, device)
    except ConfigError as error:
        raise SystemExit(str(error)) from None

    print(f"{device_name(device)}, torch {torch.__version__}, {args.dtype}; 100% utilisation is {peak:.3g} TFLOP/s")
    print(f"dim {config.dim}, {config.num_heads} heads, {config.num_layers} layers")
    rows = []
    for num_memory in args.memory:
        frames, height, width = args.latents
        inputs = make_inputs(config, (frames + num_memory, height, width), device)
        measured = measure(rivals, inputs, step_tflop(config, inputs.num_tokens), peak, args, device)
        measured += [row for row in of_flash_attn_3 if row["num_tokens"] == inputs.num_tokens]
        rows += measured
        print(f"\n{num_memory} memory frames, {inputs.num_tokens} tokens")
        print_table([{key: value for key, value in row.items() if key != "num_tokens"} for row in measured])
    results: dict[str, Any] = {
        "dtype": args.dtype,
        "clock": args.clock,
        "peak_tflops": peak,
        "rows": rows,
    }
    if "ours compiled" in rivals:
        results["recompilations"] = count_recompilations(rivals["ours compiled"], config, args.latents, device)
        print(f"\nrecompilations over a story with {STORY} memory frames: {results['recompilations']}")
    write_json(args.json, "step", results, device)


class Rival:
    """One way to run the transformer."""

    def __init__(
        self, module: nn.Module, forward: Callable[[nn.Module, Inputs], Tensor], *, compiled: bool = False
    ) -> None:
        self.module = module
        self.compiled = compiled
        self._forward = forward

    def step(self, inputs: Inputs) -> Tensor:
        """Velocity under classifier-free guidance: two forwards."""
        conditional = self._forward(self.module, inputs)
        unconditional = self._forward(self.module, inputs.with_context(inputs.negative_context))
        return torch.lerp(unconditional, conditional, GUIDANCE_SCALE)

    def block_call(self, inputs: Inputs) -> Callable[[], Any]:
        """A call of the first block, with the arguments that it gets in a forward."""
        captured: dict[str, Any] = {}
        block = self.module.get_submodule("blocks.0")
        hook = block.register_forward_pre_hook(
            lambda _module, args, kwargs: captured.update(args=args, kwargs=kwargs), with_kwargs=True
        )
        self._forward(self.module, inputs)
        hook.remove()

        def call() -> Any:
            with torch.no_grad():
                return block(*captured["args"], **captured["kwargs"])

        call()
        return call


def make_rivals(
    config: DiTConfig, args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, Rival]:
    """All rivals, sharing one set of weights."""
    ours = make_ours(config, dtype, device)
    theirs = make_diffusers(ours)

    def diffusers_forward(module: nn.Module, inputs: Inputs) -> Tensor:
        return run_diffusers(module, inputs, dtype)

    rivals = {"diffusers": Rival(theirs, diffusers_forward), "ours": Rival(ours, run_ours)}
    for backend in args.backends:
        if backend != FLASH_ATTN_3:
            start_backend(backend, device=device, dtype=dtype, head_dim=config.head_dim)
            rivals[f"ours {backend}"] = Rival(with_attention(ours, backend), run_ours)
    for linears in args.linears:
        rivals[f"ours {linears}"] = Rival(make_quantized(ours, linears), run_ours)
    if args.compile:
        compiled_theirs = share_weights(theirs)
        compiled_theirs.compile_repeated_blocks(dynamic=True)
        compiled_ours = share_weights(ours)
        compile_blocks(compiled_ours)
        rivals["diffusers compiled"] = Rival(compiled_theirs, diffusers_forward, compiled=True)
        rivals["ours compiled"] = Rival(compiled_ours, run_ours, compiled=True)
        for linears in args.linears:
            quantized = share_weights(rivals[f"ours {linears}"].module)
            compile_blocks(quantized)
            rivals[f"ours {linears} compiled"] = Rival(quantized, run_ours, compiled=True)
    return rivals


def with_attention(ours: nn.Module, backend: str) -> nn.Module:
    """The same model with another attention kernel."""
    variant: nn.Module = share_weights(ours)
    for module in variant.modules():
        if isinstance(module, Attend):
            module.backend = backend
    return variant


def run_alone(arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of FlashAttention 3, from a process of its own. Raises ``ConfigError`` when that ends with an error."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.step", *arguments, "--alone", "--json", str(results)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError((done.stderr.strip().splitlines() or ["no error message"])[-1])
        rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
        return rows


def measure_flash_attn_3(
    config: DiTConfig, peak: float, args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each number of memory frames; diffusers runs first, then the kernel is activated in this process."""
    only = argparse.Namespace(**{**vars(args), "backends": [], "linears": [], "compile": False})
    rivals = make_rivals(config, only, dtype, device)
    frames, height, width = args.latents
    all_inputs = [make_inputs(config, (frames + num_memory, height, width), device) for num_memory in args.memory]
    theirs = []
    for inputs in all_inputs:
        step = rivals["diffusers"].step
        rounds = interleaved_seconds([partial(step, inputs)], repeats=args.repeats, device=device, clock=args.clock)
        theirs.append((min(rounds)[0], step(inputs)))
    start_backend(FLASH_ATTN_3, device=device, dtype=dtype, head_dim=config.head_dim)
    ours = Rival(with_attention(rivals["ours"].module, FLASH_ATTN_3), run_ours)
    rows = []
    for inputs, (seconds, velocity) in zip(all_inputs, theirs, strict=True):
        tflop = step_tflop(config, inputs.num_tokens)
        (row,) = measure({f"ours {FLASH_ATTN_3}": ours}, inputs, tflop, peak, args, device)
        row["speed-up"] = seconds / row["s/step"]
        found = ours.step(inputs)
        row["difference"] = ((found - velocity).norm() / velocity.norm()).item()
        rows.append(row)
    return rows


def measure(
    rivals: dict[str, Rival], inputs: Inputs, tflop: float, peak: float, args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """One row per rival; speed-up and difference are relative to the first rival."""
    steps = [lambda rival=rival: rival.step(inputs) for rival in rivals.values()]
    rounds = interleaved_seconds(steps, repeats=args.repeats, device=device, clock=args.clock)
    rows: list[dict[str, Any]] = []
    velocities: list[Tensor] = []
    for index, (name, rival) in enumerate(rivals.items()):
        best = min(times[index] for times in rounds)
        other_ratio = profile_run(steps[index], device).other_ratio
        num_kernels = profile_run(rival.block_call(inputs), device).num_kernels
        velocities.append(steps[index]())
        # On the CPU, live tensors are not counted in compiled code: the dispatch mode would turn compilation off.
        peak_memory = "" if rival.compiled and device.type == "cpu" else peak_gib(steps[index], device)
        rows.append(
            {
                "num_tokens": inputs.num_tokens,
                "rival": name,
                "s/step": best,
                "speed-up": median_ratio(rounds, numerator=0, denominator=index),
                "utilisation": tflop / best / peak,
                "other time": other_ratio,
                "kernels": num_kernels,
                "peak GiB": peak_memory,
                "difference": ((velocities[index] - velocities[0]).norm() / velocities[0].norm()).item(),
            }
        )
    return rows


def count_recompilations(rival: Rival, config: DiTConfig, latents: list[int], device: torch.device) -> int:
    """Number of graphs compiled while the number of memory frames changes from shot to shot."""
    before = counters["stats"]["unique_graphs"]
    frames, height, width = latents
    for num_memory in STORY:
        rival.step(make_inputs(config, (frames + num_memory, height, width), device))
    return counters["stats"]["unique_graphs"] - before


def measured_tflops(dtype: torch.dtype, device: torch.device, clock: str, size: int = 1536) -> float:
    """Best speed of a large matrix product, in TFLOP/s."""
    a = torch.randn(size, size, device=device).to(dtype)
    rounds = interleaved_seconds([lambda: torch.mm(a, a)], repeats=10, device=device, clock=clock)
    return 2 * size**3 / min(rounds)[0] / 1e12


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("step", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="full sizes instead of --dim, --heads, --layers")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latents", type=int, nargs=3, default=[10, 32, 50], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[0], metavar="FRAMES", help="memory frames before the clip"
    )
    parser.add_argument("--backends", nargs="*", default=[], choices=BACKENDS, help="attention backends to add")
    parser.add_argument("--linears", nargs="*", default=[], choices=LINEARS[1:], help="formats of layers to add")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the process of flash_attn_3
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time of this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
