"""Weights, frames and words that are formulas, so that two environments have the same ones without a file.

Imports torch alone: ``tests/fixtures/vbench/make.py`` runs where this project is not installed.
"""

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

MERGES = ("t h", "th e</w>", "a n", "an d</w>", "s h", "i p</w>", "sh ip</w>", "i n", "in g</w>", "l i", "r e", "o n")
NUM_TOKENS = 2 * 256 + len(MERGES) + 2
CONTEXT = 16

TEXTS = (
    "The ship.",
    "A SHIP and  the   sea; re-lighting &amp; shining in 1987, it's late",
    "ein Schiff und \u00fcber dem Meer \u2026 \u6d77 " * 3,
    "",
)


def sines(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of parameter ``name``: small and all different; near 1 for the weights of norms."""
    count, phase = math.prod(shape), zlib.crc32(name.encode()) % 9973
    waves = torch.sin(torch.arange(count, dtype=torch.float64) * 1.37 + phase) * torch.cos(
        torch.arange(count, dtype=torch.float64) * 0.0713 + 2 * phase
    )
    is_norm = "ln_" in name and name.endswith("weight")
    return (1 + 0.1 * waves if is_norm else 0.1 * waves).float().reshape(shape)


def sine_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: sines(name, tuple(shape)) for name, shape in shapes.items()}


def wave_frames(num_frames: int, height: int, width: int, speed: float = 0.3) -> Tensor:
    """``uint8 [F, 3, H, W]``: coloured waves that move, with edges."""
    frame, row, column = torch.meshgrid(
        *(torch.arange(size, dtype=torch.float64) for size in (num_frames, height, width)), indexing="ij"
    )
    waves = [torch.sin(row / (7 + c) + frame * speed) + torch.cos(column / (11 - c) - frame * speed) for c in range(3)]
    edges = ((row + frame).remainder(23) < 5).double()
    return torch.stack([(127 + 60 * wave - 40 * edges).clamp(0, 255) for wave in waves], dim=1).round().to(torch.uint8)


def write_words(path: Path) -> None:
    """A file of merges in the format of CLIP's."""
    path.write_bytes(gzip.compress("\n".join(["#version: tiny", *MERGES]).encode(), mtime=0))
