"""Shots with LoRAs of their own on the tiny model: files, latents in any form of holding weights, and what stayed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.diffusion.denoise import PromptEmbeds
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.shot_loras import OpenedLoras
from storymem_dist.events import LorasUsed
from storymem_dist.models.wan.presets import EXPERTS, TINY
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.build import Engine
from storymem_dist.render.clip import ClipRequest
from storymem_dist.weights.bundle import open_weights
from storymem_dist.weights.checkpoints import dit_shapes
from storymem_dist.weights.lora import lora_inputs, lora_key
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint

SAMPLER = SamplerSettings(
    num_frames=5, height=32, width=48, num_inference_steps=4, guidance_scale_high=3.0, guidance_scale_low=2.0
)
"""Three steps with the high-noise expert of T2V, one with the other."""

LINEARS = [
    name.removesuffix(".weight")
    for name, shape in dit_shapes(TINY.t2v).items()
    if name.endswith(".weight") and len(shape) == 2
]
Loras = Sequence[Mapping[str, Any]]


def write_lora(path: Path, seed: int, *, names: Sequence[str] = LINEARS, rank: int = 3, exact: bool = False) -> str:
    """A LoRA that moves the latents well; ``exact``: it also has changes that are no products. Returns its path."""
    shapes, generator = dit_shapes(TINY.t2v), torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        rows, columns = shapes[f"{name}.weight"]
        tensors[f"diffusion_model.{name}.lora_A.weight"] = 0.2 * torch.randn(rank, columns, generator=generator)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = 0.2 * torch.randn(rows, rank, generator=generator)
    if exact:
        for key, stored in (
            ("blocks.1.self_attn.norm_k.weight", "blocks.1.self_attn.norm_k.diff"),
            ("blocks.0.modulation", "blocks.0.diff_m"),
            ("blocks.0.ffn.2.bias", "blocks.0.ffn.2.diff_b"),
            ("head.modulation", "head.diff_m"),
        ):
            tensors[f"diffusion_model.{stored}"] = 0.2 * torch.randn(shapes[key], generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return str(path)


def write_backbones(folder: Path, seed: int) -> str:
    """A folder like StoryMem's: a file for each expert."""
    for offset, expert in enumerate(EXPERTS):
        write_lora(folder / f"backbone_{expert}.safetensors", seed + offset, rank=2)
    return str(folder)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Latents of each shot, what each cost, and whether all weights are as before, where they can be compared."""

    latents: list[Tensor]
    used: list[LorasUsed]
    num_reads: int
    num_loads: dict[str, int]
    weights_unchanged: bool


class KeepsLatents:
    """A VAE that decodes nothing."""

    def encode(self, pixels: Tensor) -> Tensor:
        raise AssertionError("T2V has no condition")

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def render(
    root: str,
    shots: Sequence[Loras],
    *,
    merged: Loras = (),
    model: Mapping[str, Any] | None = None,
    layout: Mapping[str, Any] | None = None,
    change: Any = None,
) -> Rendered:
    """Render T2V shots that differ only in their LoRAs, one after the other, on experts that are loaded once.

    ``merged`` are the job's. ``change(engine)`` is called once the experts are loaded.
    """
    torch.set_num_threads(1)
    folders = generate_tiny_checkpoint(Path(root))
    settings = ModelSettings(
        loras=list(merged), **{"t2v_checkpoint": str(folders.t2v_dir), "dtype": "float32", **(model or {})}
    )
    weights = open_weights(settings, ["t2v"], "none")
    opened = OpenedLoras(weights, getattr(torch, settings.dtype))
    engine = Engine.start(settings, weights, ParallelSettings(device="cpu", **(layout or {})), SAMPLER, loras=opened)
    try:
        engine.clips._vae = KeepsLatents()  # type: ignore[assignment]
        pair = engine.clips.prepare("t2v")
        before = _weights(pair)
        if change is not None:
            change(engine)
        latents, used = [], []
        for number, loras in enumerate(shots):
            latents.append(engine.clips.sample(request(loras, number)).clone())
            used.append(engine.clips.loras_used("story", "shot_01", len(loras), 0.0))
        after = _weights(pair)
        reads = engine.clips._read_loras
        assert reads is not None
        return Rendered(
            latents=latents,
            used=used,
            num_reads=reads.num_reads,
            num_loads=dict(engine.experts.num_loads),
            weights_unchanged=after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before),
        )
    finally:
        engine.close()


def request(loras: Loras, number: int = 0, **options: Any) -> ClipRequest:
    """A T2V clip with these LoRAs."""
    generator = torch.Generator().manual_seed(11)
    dim = TINY.t2v.text_dim
    prompt = PromptEmbeds(
        prompt_LE=torch.randn(9, dim, generator=generator), negative_LE=torch.randn(4, dim, generator=generator)
    )
    key = lora_key(lora_inputs(loras))
    made = ClipRequest(
        mode="t2v", prompt=prompt, seed=4, sampler=SAMPLER, fingerprint=str(number), loras=loras, lora_key=key
    )
    return replace(made, **options)


def _weights(pair: Any) -> dict[str, Tensor]:
    """Copies of the weights that this rank holds now; those without memory (they are on their way) are left out."""
    found = {}
    for name, expert in pair._experts.items():
        for key, parameter in expert.module.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if local.untyped_storage().nbytes():
                found[f"{name}.{key}"] = local.detach().clone()
    return found
