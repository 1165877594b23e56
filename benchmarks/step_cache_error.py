"""What reusing steps costs and saves: a whole denoise per threshold, against the exact one with the same noise.

    python benchmarks/step_cache_error.py                       # the generated tiny model, on the CPU
    python benchmarks/step_cache_error.py --checkpoint weights/Wan2.2-I2V-A14B --lora weights/StoryMem \
        --device cuda --dtype bfloat16 --frames 81 --size 480 832 --images a.png b.png

Error is |latents - exact| / |exact| over the clip's latents at the end. The weights of the tiny model are random, so
its errors show that the cache works and what its threshold means, not what a trained model loses.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import device_name, print_table, write_json
from PIL import Image
from torch import Tensor

from storymem_dist.diffusion.conditioning import ConditionBuilder
from storymem_dist.diffusion.denoise import PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import EXPERTS, ExpertPair, HostSwap
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.seeds import initial_noise
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.diffusion.solver import Solver
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.models.loading import load_dit_weights
from storymem_dist.models.wan.checkpoints import WanCheckpoint, open_checkpoint
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.lora import storymem_lora
from storymem_dist.models.wan.text_encoder import load_text_encoder
from storymem_dist.models.wan.tiny_checkpoint import generate_tiny_checkpoint
from storymem_dist.models.wan.vae import load_vae


def main() -> None:
    """Denoise once exactly and once per threshold; print and write what came out."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if args.checkpoint is None:
            tiny = generate_tiny_checkpoint(Path(folder) / "tiny")
            args.checkpoint, args.lora = tiny.i2v_dir, tiny.lora_dir
        rows = measure(args)
    device = torch.device(args.device)
    print(f"{device_name(device)}, torch {torch.__version__}, {args.dtype}, {args.solver}, {args.steps} steps")
    print_table([{**one, "relative error": f"{one['relative error']:.1e}"} for one in rows])
    write_json(args.json, {"benchmark": "step_cache_error", "steps": args.steps, "rows": rows}, device)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per threshold, the exact run first."""
    device, settings = torch.device(args.device), SamplerSettings()
    checkpoint = open_checkpoint(args.checkpoint, "i2v")
    images = read_images(args)
    grid = LatentGrid(num_frames=args.frames, height=args.size[0], width=args.size[1], num_memory=len(images))
    condition = ConditionBuilder(load_vae(checkpoint.vae_path, device), device).build("m2v", grid, images)
    prompt = encode(checkpoint, args.prompt, settings.negative_prompt, device)
    noise = initial_noise(args.seed, grid.latent_shape)
    experts = load_experts(args, checkpoint, settings)
    solver = Solver(args.solver, num_steps=args.steps, flow_shift=settings.flow_shift_m2v)

    def run(threshold: float) -> tuple[Tensor, int, float]:
        infos: list[StepInfo] = []
        pair = experts.with_sampling(
            boundary_ratio=settings.boundary_ratio_m2v,
            guidance_scale_high=args.guidance,
            guidance_scale_low=args.guidance,
            step_cache_threshold=threshold,
        )
        start = time.perf_counter()
        latents = denoise(
            pair, LocalGuidance(), solver, noise, condition, prompt, grid, device=device, on_step=infos.append
        )
        return grid.clip_latents(latents), sum(info.reused for info in infos), time.perf_counter() - start

    run(0.0)  # warm-up
    exact, _, exact_seconds = run(0.0)
    rows = [row(0.0, 0, args.steps, 0.0, exact_seconds, exact_seconds)]
    for threshold in args.thresholds:
        latents, num_reused, seconds = run(threshold)
        error = ((latents - exact).norm() / exact.norm()).item()
        rows.append(row(threshold, num_reused, args.steps, error, seconds, exact_seconds))
    return rows


def row(
    threshold: float, num_reused: int, num_steps: int, error: float, seconds: float, exact_seconds: float
) -> dict[str, Any]:
    """One line of the table."""
    return {
        "threshold": threshold,
        "steps reused": num_reused,
        "hit rate": num_reused / num_steps,
        "relative error": error,
        "seconds": seconds,
        "speed-up": exact_seconds / seconds,
    }


def load_experts(args: argparse.Namespace, checkpoint: WanCheckpoint, settings: SamplerSettings) -> ExpertPair:
    """Both experts with StoryMem's LoRA and a step cache; one at a time on the device."""
    loras = storymem_lora(args.lora, "mi2v") if args.lora else {}
    dits: dict[str, WanDiT] = {}
    for name in EXPERTS:
        with torch.device("meta"):
            dit = WanDiT(checkpoint.dit_config, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
        dit.to_empty(device="cpu")
        load_dit_weights(dit, checkpoint.expert(name), [loras[name]] if loras else [])
        attach_step_cache(dit)
        dits[name] = dit
    return ExpertPair(
        high_noise=dits["high_noise"],
        low_noise=dits["low_noise"],
        boundary_ratio=settings.boundary_ratio_m2v,
        guidance_scale_high=args.guidance,
        guidance_scale_low=args.guidance,
        residency=HostSwap(dits, args.device),
    )


def encode(checkpoint: WanCheckpoint, prompt: str, negative: str, device: torch.device) -> PromptEmbeds:
    """Embeddings from the checkpoint's own text encoder."""
    embeds = load_text_encoder(checkpoint, device, torch.bfloat16).encode([prompt, negative])
    return PromptEmbeds(prompt_LE=embeds[0], negative_LE=embeds[1])


def read_images(args: argparse.Namespace) -> list[Tensor]:
    """The memory keyframes: files, or two colour gradients."""
    if args.images:
        return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in args.images]
    height, width = args.size
    rows = torch.linspace(0, 255, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 255, width)[None].expand(height, width)
    return [torch.stack([rows, columns, 255 - rows]).byte(), torch.stack([columns, 255 - rows, columns]).byte()]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, help="Wan2.2-I2V-A14B, either layout (default: a generated tiny one)"
    )
    parser.add_argument("--lora", type=Path, help="folder with StoryMem's LoRA folders")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--solver", default="unipc", choices=["unipc", "dpmpp", "euler"])
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, nargs=2, default=[96, 160], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="memory keyframes (default: two gradients)")
    parser.add_argument("--prompt", default="A lighthouse keeper climbs the stairs at dusk, lantern in hand.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the results here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
