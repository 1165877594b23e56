"""A generated base model with A14B's names and a LoRA, narrower than A14B, for the benchmarks that load weights."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from storymem_dist.models.wan.presets import TINY, WAN22_A14B
from storymem_dist.weights.checkpoints import dit_shapes
from storymem_dist.weights.tiny_checkpoint import LORA_TARGETS, generate_checkpoint

LORA_FILE = "lora.safetensors"
_LORA_RANK = 128
_NARROW = replace(WAN22_A14B.i2v, dim=1024, num_heads=8, ffn_dim=2816)


def write_narrow_model(folder: Path, num_blocks: int) -> Path:
    """Write an I2V base model in the native layout, with a LoRA of rank 128 in ``LORA_FILE``; return ``folder``.

    With 40 blocks each of the two experts has 2.3 GB in FP32.
    """
    config = replace(_NARROW, num_layers=num_blocks)
    generate_checkpoint(folder, replace(TINY, i2v=config), "i2v")
    shapes = dit_shapes(config)
    halves: dict[str, torch.Tensor] = {}
    for block in range(num_blocks):
        for target in LORA_TARGETS:
            rows, columns = shapes[f"blocks.{block}.{target}.weight"]
            key = f"base_model.model.blocks.{block}.{target}"
            halves[f"{key}.lora_A.weight"] = torch.randn(_LORA_RANK, columns) / math.sqrt(columns)
            halves[f"{key}.lora_B.weight"] = torch.randn(rows, _LORA_RANK) * 1e-3
    save_file(halves, folder / LORA_FILE)
    return folder
