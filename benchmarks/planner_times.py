"""How well does the planner's time model predict published times?

    python -m benchmarks.planner_times           # predicted against published, as it stands in docs/planning.md
    python -m benchmarks.planner_times --fit     # the factor of each device that makes its one fitted figure exact

Nothing is measured. The shipped constants (``planner/constants.json``) take the shares of peak rates that public
kernels reach, times one factor a device. That factor is fitted on one published figure; all other rows are predictions.
"""

from dataclasses import dataclass, replace

import torch

from benchmarks.harness import make_parser, print_table, write_json
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.calibration import Constants, load_shipped
from storymem_dist.planner.hardware import known_hardware
from storymem_dist.planner.timing import TimeModel
from storymem_dist.planner.work import ELEMENTWISE_BYTES
from storymem_dist.story.modes import T2V
from storymem_dist.weights.settings import ModelSettings

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
CONFIG = WAN22_A14B.t2v
FP32_TFLOPS = {"h100_80g": 67.0, "a100_80g": 19.5}
"""Of fp32 products without tensor cores, from data sheets; 80% of them are reached."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a program does in addition to ours, or otherwise; from its published code.

    ``extra_bytes``: of a token and channel in every block, outside of products. ``embeds_tokens``: it computes the time
    embedding in fp32 for every token instead of once. ``decodes_alone``: one rank decodes while the others wait.
    ``whole_clip``: its figures hold prompts and decoding, not denoising alone.
    """

    compiled: bool = True
    extra_bytes: float = 0.0
    embeds_tokens: bool = False
    decodes_alone: bool = False
    whole_clip: bool = False


WAN = Program(compiled=False, extra_bytes=200.0, embeds_tokens=True, decodes_alone=True, whole_clip=True)
"""The code released with Wan2.2. Six fp32 numbers of modulation for every token and channel are added up, read and
written in every block (88 bytes); queries and keys are rotated as fp64 complex numbers (112 bytes more than ours)."""

SERVER = Program()
"""A serving engine with fused or compiled blocks."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published time: of a clip, of all denoising (``steps`` steps), or of one step (``steps`` 1)."""

    source: str
    device: str
    size: str
    parallel: ParallelSettings
    steps: int
    seconds: float
    program: Program
    fitted: bool = False


def figure(
    source: str,
    device: str,
    size: str,
    steps: int,
    seconds: float,
    program: Program,
    fitted: bool = False,
    ulysses: int = 1,
    cfg: int = 1,
) -> Figure:
    """A ``Figure`` whose weights are sharded where the program's are."""
    weights = "fsdp" if program is WAN and ulysses > 1 else "replicated"
    parallel = ParallelSettings(cfg=cfg, ulysses=ulysses, weights=weights, compile=program.compiled)
    return Figure(
        source=source,
        device=device,
        size=size,
        parallel=parallel,
        steps=steps,
        seconds=seconds,
        program=program,
        fitted=fitted,
    )


FIGURES = (
    figure("Wan2.2", "h100_80g", "480p", 40, 326.9, WAN, fitted=True),
    figure("Wan2.2", "h100_80g", "480p", 40, 91.7, WAN, ulysses=4),
    figure("Wan2.2", "h100_80g", "480p", 40, 51.5, WAN, ulysses=8),
    figure("Wan2.2", "h100_80g", "720p", 40, 1041.5, WAN),
    figure("Wan2.2", "h100_80g", "720p", 40, 288.7, WAN, ulysses=4),
    figure("Wan2.2", "h100_80g", "720p", 40, 155.1, WAN, ulysses=8),
    figure("Wan2.2", "a100_80g", "480p", 40, 785.7, WAN, fitted=True),
    figure("Wan2.2", "a100_80g", "480p", 40, 215.2, WAN, ulysses=4),
    figure("Wan2.2", "a100_80g", "480p", 40, 119.9, WAN, ulysses=8),
    figure("Wan2.2", "a100_80g", "720p", 40, 2735.7, WAN),
    figure("SGLang", "h200", "480p", 1, 5.14, SERVER, fitted=True),
    figure("TensorRT-LLM", "b200", "720p", 40, 370.8, SERVER, fitted=True),
    figure("TensorRT-LLM", "b200", "720p", 40, 180.0, SERVER, cfg=2),
    figure("SGLang, Wan2.1", "h100_80g", "480p", 1, 6.13, SERVER),
    figure("LightX2V, Wan2.1", "h100_80g", "480p", 1, 5.18, SERVER),
)


def predicted_seconds(one: Figure, constants: Constants | None = None) -> float:
    """What the time model says for a published figure, with the program's own extra work."""
    hardware = known_hardware(one.device)
    constants = constants or load_shipped(hardware)
    times, model, program = TimeModel(hardware=hardware, constants=constants), ModelSettings(), one.program
    height, width = SIZES[one.size]
    sampler = SamplerSettings(num_inference_steps=one.steps, height=height, width=width)
    tokens = LatentGrid(num_frames=81, height=height, width=width).num_tokens
    step = times.step_seconds(one.parallel, model, CONFIG, tokens)
    ranks = one.parallel.sequence
    extra = step.elementwise * program.extra_bytes / ELEMENTWISE_BYTES["exact"][1]
    if program.embeds_tokens:
        flop = 2 * tokens * CONFIG.dim * (CONFIG.freq_dim + 7 * CONFIG.dim)
        extra += 2 * flop / ranks / (0.8e12 * FP32_TFLOPS[one.device])
    seconds = one.steps * (step.total + extra)
    if program.whole_clip:
        alone = replace(one.parallel, cfg=1, ring=1, ulysses=1, weights="replicated")
        shot = times.shot_seconds(
            alone if program.decodes_alone else one.parallel, model, CONFIG, sampler, T2V, num_keyframes=0
        )
        seconds += 2 * shot.text + shot.decode
    return seconds


def fitted_scale(one: Figure) -> float:
    """The factor on the kernels' shares with which the prediction of ``one`` is exact."""
    shipped, low, high = load_shipped(known_hardware(one.device), scaled=False), 0.2, 3.0
    for _ in range(60):
        scale = (low + high) / 2
        if predicted_seconds(one, shipped.scaled(scale)) > one.seconds:
            low = scale
        else:
            high = scale
    return low


def rows() -> list[dict[str, object]]:
    """The table of all figures."""
    table: list[dict[str, object]] = []
    for one in FIGURES:
        seconds = predicted_seconds(one)
        table.append(
            {
                "source": one.source,
                "device": one.device,
                "size": one.size,
                "GPUs": one.parallel.ranks_per_replica,
                "figure": "clip" if one.program.whole_clip else "step" if one.steps == 1 else "denoising",
                "published s": f"{one.seconds:.1f}" if one.seconds > 20 else f"{one.seconds:.2f}",
                "predicted s": f"{seconds:.1f}" if one.seconds > 20 else f"{seconds:.2f}",
                "difference": "fitted" if one.fitted else f"{100 * (seconds / one.seconds - 1):+.0f}%",
            }
        )
    return table


def main() -> None:
    """Print the table, or the fitted factors."""
    parser = make_parser("planner_times", __doc__)
    parser.add_argument("--fit", action="store_true", help="print the factor of each device")
    args = parser.parse_args()
    if args.fit:
        print_table([{"device": one.device, "scale": f"{fitted_scale(one):.4f}"} for one in FIGURES if one.fitted])
        return
    print_table(rows())
    write_json(args.json, "planner_times", {"rows": rows()}, torch.device("cpu"))


if __name__ == "__main__":
    main()
