"""How large is the error of each lossy setting, in a whole denoise and in one transformer block of A14B's full width?

    python -m benchmarks.lossy_errors                       # the generated tiny model, on the CPU
    python -m benchmarks.lossy_errors --parts denoise --steps 4 --thresholds 0.4      # quick
    python -m benchmarks.lossy_errors --parts pictures      # a trained model: what do its pictures still show?
    python -m benchmarks.lossy_errors --checkpoint weights/Wan2.2-I2V-A14B --lora weights/StoryMem \
        --device cuda --reference bfloat16 --frames 81 --size 480 832 --images a.png b.png

An error is |found - exact| / |exact|. The exact value is the same computation with exact layers in ``--reference``.
"latent error" compares the clip's latents at the end of a denoise with the same noise. "block error" compares the
update that a block adds to its tokens. The row "exact" shows the error of the number format ``--dtype`` alone; all
other rows include it. The block has random weights. Its tokens have channels of equal size, or a few outlier channels
30 times larger, as in trained transformers.

The tiny model also has random weights. Its errors show that a setting works and how settings compare; they do not show
the loss of a trained model. "pictures" do: memory shots of the nano model, whose memory is drawn. "right" is the share
of what they should show (colour, shape, motion, background) that a judge with fixed rules sees; "dB" compares their
pixels with those of the exact computation. Times are shown only for formats that the device computes natively: CPUs
emulate float8.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness import device_name, make_parser, print_table, write_json
from benchmarks.lossy_pictures import GUIDANCE, Pictures
from benchmarks.lossy_pictures import STEPS as PICTURE_STEPS
from storymem_dist.diffusion.conditioning import ConditionBuilder
from storymem_dist.diffusion.denoise import PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.host_swap import HostMemory, HostSwap, HostWeights
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.seeds import initial_noise
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.diffusion.solver import Solver
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.models.quantized_linear import LINEARS, QuantizedLinear, quantize_linears
from storymem_dist.models.rope import rope_tables
from storymem_dist.models.wan.dit import WanBlock, WanDiT
from storymem_dist.models.wan.presets import EXPERTS, WAN22_A14B
from storymem_dist.weights.bundle import packed_model
from storymem_dist.weights.checkpoints import WanCheckpoint, open_checkpoint
from storymem_dist.weights.loading import StateDictSource, TensorSource, WeightDelta, load_dit_weights
from storymem_dist.weights.lora import storymem_lora
from storymem_dist.weights.random_weights import random_weight
from storymem_dist.weights.text_encoder import load_text_encoder
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint
from storymem_dist.weights.vae import load_vae

OUTLIER_EVERY, OUTLIER_SIZE = 512, 30.0
STORED_FLOAT8 = "weights prepared as float8"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to compute, compared with the exact way."""

    name: str
    dtype: torch.dtype
    linears: str = "exact"
    stored_float8: bool = False
    step_cache_threshold: float = 0.0
    guidance_interval: tuple[float, ...] = ()

    @property
    def quantizes(self) -> str:
        """The format that the weights of the blocks were quantized to."""
        return "float8" if self.stored_float8 else self.linears


def main() -> None:
    """Measure all variants; print and write the results."""
    args = parse_arguments()
    device = torch.device(args.device)
    variants = make_variants(args)
    rows: dict[str, dict[str, Any]] = {variant.name: {"setting": variant.name} for variant in variants}
    if "denoise" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            if args.checkpoint is None:
                tiny = generate_tiny_checkpoint(Path(folder) / "tiny")
                args.checkpoint, args.lora = tiny.i2v_dir, tiny.lora_dir
            measure_denoises(variants, args, rows)
    if "pictures" in args.parts:
        measure_pictures(variants, args, rows)
    for outliers in (False, True) if "block" in args.parts else ():
        measure_block(variants, args, "block error, outliers" if outliers else "block error", outliers, rows)
    print(f"{device_name(device)}, torch {torch.__version__}, {args.dtype}, {args.solver}, {args.steps} steps")
    shown = {key for row in rows.values() for key in row if "error" in key}
    print_table([{**one, **{key: f"{one[key]:.1e}" for key in shown if key in one}} for one in rows.values()])
    facts = {"steps": args.steps, "dtype": args.dtype, "reference": args.reference}
    write_json(args.json, "lossy_errors", {**facts, "rows": list(rows.values())}, device)


def make_variants(args: argparse.Namespace) -> list[Variant]:
    """All variants; the exact one is the first."""
    exact = Variant(name="exact", dtype=getattr(torch, args.dtype))
    return [
        exact,
        replace(exact, name=STORED_FLOAT8, stored_float8=True),
        *(replace(exact, name=f"model.linears={one}", linears=one) for one in LINEARS[1:]),
        *(
            replace(exact, name=f"sampler.step_cache_threshold={one}", step_cache_threshold=one)
            for one in args.thresholds
        ),
        *(
            replace(exact, name=f"sampler.guidance_interval=[{start}, {end}]", guidance_interval=(start, end))
            for start, end in args.intervals
        ),
    ]


# ---- whole denoises


def measure_denoises(variants: list[Variant], args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Error, reused steps and time of a whole denoise with each variant."""
    device, settings = torch.device(args.device), SamplerSettings()
    checkpoint = open_checkpoint(args.checkpoint, "i2v")
    images = read_images(args)
    grid = LatentGrid(num_frames=args.frames, height=args.size[0], width=args.size[1], num_memory=len(images))
    condition = ConditionBuilder(load_vae(checkpoint.vae_path, device), device).build("m2v", grid, images)
    prompt = encode(checkpoint, args.prompt, settings.negative_prompt, device)
    noise = initial_noise(args.seed, grid.latent_shape)
    solver = Solver(args.solver, num_steps=args.steps, flow_shift=settings.flow_shift_m2v)

    def run(experts: ExpertPair, variant: Variant) -> tuple[Tensor, int, float]:
        infos: list[StepInfo] = []
        start = time.perf_counter()
        latents = denoise(
            experts,
            LocalGuidance(),
            solver,
            noise,
            condition,
            prompt,
            grid,
            device=device,
            on_step=infos.append,
            guided_steps=guided_steps(variant, args.steps),
        )
        return grid.clip_latents(latents).cpu(), sum(info.reused for info in infos), time.perf_counter() - start

    reference = Variant(name="reference", dtype=getattr(torch, args.reference))
    exact, _, _ = run(load_experts(reference, args, checkpoint), reference)
    loaded, experts = reference, None
    exact_seconds = 0.0
    for variant in variants:
        weights = replace(variant, name="", step_cache_threshold=0.0, guidance_interval=())
        if experts is None or weights != loaded:
            if experts is not None:
                experts.release()
            loaded, experts = weights, load_experts(variant, args, checkpoint)
            run(with_threshold(experts, 0.0, args), weights)  # warm-up
        latents, num_reused, seconds = run(with_threshold(experts, variant.step_cache_threshold, args), variant)
        exact_seconds = exact_seconds or seconds
        row = rows[variant.name]
        row["latent error"] = relative_error(latents, exact)
        row["steps reused"] = f"{num_reused} of {args.steps}"
        if device.type != "cpu" or variant.linears == "exact":
            row |= {"s": seconds, "speed-up": exact_seconds / seconds}


def measure_pictures(variants: list[Variant], args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """What clips of the nano model still show with each variant, and how near they are to the exact ones."""
    folders = packed_model("nano")
    checkpoint = open_checkpoint(folders.i2v_dir, "i2v")
    args = argparse.Namespace(**{**vars(args), "lora": folders.lora_dir, "guidance": GUIDANCE})
    pictures = Pictures(checkpoint, args.pictures, args.seed, torch.device(args.device))
    experts = load_experts(Variant(name="reference", dtype=torch.float32), args, checkpoint)
    pictures.render_exact(with_threshold(experts, 0.0, args))
    experts.release()
    for variant in variants:
        experts = load_experts(variant, args, checkpoint)
        rows[variant.name] |= pictures.compare(
            with_threshold(experts, variant.step_cache_threshold, args), guided_steps(variant, PICTURE_STEPS)
        )
        experts.release()


def guided_steps(variant: Variant, num_steps: int) -> range:
    """The steps in which ``variant`` is guided."""
    settings = SamplerSettings(num_inference_steps=num_steps, guidance_interval=list(variant.guidance_interval))
    return settings.guided_steps


def with_threshold(experts: ExpertPair, threshold: float, args: argparse.Namespace) -> ExpertPair:
    """The same experts with another threshold."""
    return experts.with_sampling(
        boundary_ratio=SamplerSettings().boundary_ratio_m2v,
        guidance_scale_high=args.guidance,
        guidance_scale_low=args.guidance,
        step_cache_threshold=threshold,
    )


def load_experts(variant: Variant, args: argparse.Namespace, checkpoint: WanCheckpoint) -> ExpertPair:
    """Both experts with StoryMem's LoRA and a step cache; one at a time on the device."""
    loras = storymem_lora(args.lora, "mi2v") if args.lora else {}
    dits: dict[str, WanDiT] = {}
    device = torch.device(args.device)
    memory, waiting = HostMemory(device), {}
    for name in EXPERTS:
        with torch.device("meta"):
            dit = WanDiT(checkpoint.dit_config, dtype=variant.dtype).eval().requires_grad_(False)
        load(dit, dit.blocks, variant, checkpoint.expert(name), [loras[name]] if loras else [], device)
        attach_step_cache(dit)
        dits[name], waiting[name] = dit, HostWeights(dit, memory, device)
    return ExpertPair(
        high_noise=dits["high_noise"],
        low_noise=dits["low_noise"],
        boundary_ratio=SamplerSettings().boundary_ratio_m2v,
        guidance_scale_high=args.guidance,
        guidance_scale_low=args.guidance,
        residency=HostSwap(waiting),
    )


def load(
    model: nn.Module,
    blocks: nn.Module,
    variant: Variant,
    source: TensorSource,
    deltas: list[WeightDelta],
    device: torch.device,
) -> None:
    """Load weights into ``model``, which is on the meta device, and quantize its ``blocks`` as ``variant`` says."""
    quantize_linears(blocks, variant.quantizes)
    model.to_empty(device=device)
    load_dit_weights(model, source, deltas)
    if variant.stored_float8:  # as prepared weights: rounded numbers, products in the usual type
        for parent in list(blocks.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, QuantizedLinear):
                    setattr(parent, name, plain_linear(layer, variant.dtype))


def plain_linear(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """The layer with its weight back in ``dtype``."""
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, dtype=dtype).requires_grad_(False)
    weight = layer.weight.float() * layer.row_scale[:, None]
    plain.load_state_dict({"weight": weight.to(dtype), "bias": layer.bias}, assign=True)
    return plain


def encode(checkpoint: WanCheckpoint, prompt: str, negative: str, device: torch.device) -> PromptEmbeds:
    """Prompt embeddings from the checkpoint's own text encoder."""
    embeds = load_text_encoder(checkpoint, device, torch.bfloat16).encode([prompt, negative])
    return PromptEmbeds(prompt_LE=embeds[0], negative_LE=embeds[1])


def read_images(args: argparse.Namespace) -> list[Tensor]:
    """The memory keyframes: from files, or two colour gradients."""
    if args.images:
        return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in args.images]
    height, width = args.size
    rows = torch.linspace(0, 255, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 255, width)[None].expand(height, width)
    return [torch.stack([rows, columns, 255 - rows]).byte(), torch.stack([columns, 255 - rows, columns]).byte()]


# ---- one block of full width


def measure_block(
    variants: list[Variant], args: argparse.Namespace, column: str, outliers: bool, rows: dict[str, dict[str, Any]]
) -> None:
    """Error of a block's update of its tokens, for each variant that changes a block."""
    reference = Variant(name="reference", dtype=getattr(torch, args.reference))
    exact = block_update(reference, args, outliers)
    for variant in variants:
        if not variant.step_cache_threshold and not variant.guidance_interval:
            rows[variant.name][column] = relative_error(block_update(variant, args, outliers), exact)


@torch.no_grad()
def block_update(variant: Variant, args: argparse.Namespace, outliers: bool) -> Tensor:
    """The update that a block with A14B's sizes and random weights adds to ``--tokens`` random tokens."""
    config, device = WAN22_A14B.t2v, torch.device(args.device)
    with torch.device("meta"):
        block = WanBlock(config, variant.dtype, "auto").eval().requires_grad_(False)
    shapes = {name: parameter.shape for name, parameter in block.named_parameters()}
    weights = {name: random_weight(args.seed, "block", name, shape) for name, shape in shapes.items()}
    load(block, block, variant, StateDictSource("random", weights), [], device)
    generator = torch.Generator().manual_seed(args.seed)
    frames, height, width = args.tokens
    tokens = torch.randn(1, frames * height * width, config.dim, generator=generator)
    if outliers:
        tokens[..., ::OUTLIER_EVERY] *= OUTLIER_SIZE
    tokens = tokens.to(device)
    modulation = 0.3 * torch.randn(1, 6, config.dim, generator=generator).to(device)
    text = torch.randn(1, config.text_len, config.dim, generator=generator).to(device, variant.dtype)
    tables = rope_tables(torch.arange(frames, device=device), height, width, config.head_dim, device=device)
    return (block(tokens, *tables, modulation, text) - tokens).cpu()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found - exact).norm() / exact.norm()).item()


def interval(text: str) -> tuple[float, float]:
    """The value of ``--intervals``."""
    start, end = map(float, text.split(","))
    return start, end


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("lossy_errors", __doc__)
    parts = ["denoise", "block", "pictures"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--pictures", type=int, default=10, metavar="CLIPS", help="clips of the part pictures")
    parser.add_argument(
        "--checkpoint", type=Path, help="Wan2.2-I2V-A14B, either layout (default: a generated tiny one)"
    )
    parser.add_argument("--lora", type=Path, help="folder with StoryMem's LoRA folders")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8])
    parser.add_argument(
        "--intervals",
        type=interval,
        nargs="*",
        default=[(0.0, 0.75), (0.0, 0.5), (0.0, 0.25), (0.25, 1.0)],
        metavar="START,END",
        help="shares of the steps that are guided",
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--solver", default="unipc", choices=["unipc", "dpmpp", "euler"])
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, nargs=2, default=[96, 160], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="memory keyframes (default: two gradients)")
    parser.add_argument("--prompt", default="A lighthouse keeper climbs the stairs at dusk, lantern in hand.")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs=3,
        default=[4, 8, 10],
        metavar=("FRAMES", "HEIGHT", "WIDTH"),
        help="size of the block's input",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--reference", default="float32", choices=["float32", "bfloat16"], help="number format of the exact runs"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
