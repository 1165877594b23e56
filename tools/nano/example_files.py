"""Draws the files of ``examples/keys``: a filmed clip, two pictures, and a LoRA of both experts for the nano model.

    python -m tools.nano.example_files examples/keys

The clip has another size and rate than the model's. The LoRA is not trained: it shows the form of one, and changes the
picture a little.
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.artifacts.video import VideoSettings, write_clip, write_png
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.resources import packed_weights
from tools.nano import world
from tools.nano.cast import as_frames

_FILMED_FPS = 24
_LORA_STD = 0.02


def drawn(colour: str, shape: str, motion: str, background: str, g: torch.Generator) -> Tensor:
    """A clip ``[F, 3, H, W]``, uint8."""
    wanted = {"colour": colour, "shape": shape, "motion": motion, "background": background}
    numbers = {kind: torch.tensor([world.KINDS[kind].index(name)]) for kind, name in wanted.items()}
    while True:
        clips = world.sample_clips(1, g, colour=numbers["colour"], shape=numbers["shape"])
        if clips.motion == numbers["motion"] and clips.background == numbers["background"]:
            return as_frames(world.render(clips)[0][0])


def lora(g: torch.Generator) -> dict[str, Tensor]:
    """A change of rank 1 to the queries of the nano transformer's self-attention."""
    tensors = {}
    with safe_open(str(packed_weights("nano.safetensors")), "pt") as packed:
        for name in sorted(packed.keys()):
            if not (name.startswith("dit.") and name.endswith("self_attn.q.weight")):
                continue
            out_dim, in_dim = packed.get_slice(name).get_shape()
            module = name.removeprefix("dit.").removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = _LORA_STD * torch.randn(1, in_dim, generator=g)
            tensors[f"{module}.lora_B.weight"] = _LORA_STD * torch.randn(out_dim, 1, generator=g)
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def main() -> None:
    """Draw the files into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    g = torch.Generator().manual_seed(17)
    for name in ("references", "sway"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    filmed = drawn("red", "ball", "right", "meadow", g)
    twice = filmed.repeat_interleave(2, 0).repeat_interleave(2, 2).repeat_interleave(2, 3)
    write_clip(folder / "filmed.mp4", twice, _FILMED_FPS, VideoSettings(crf=23))
    write_png(folder / "references" / "box.png", drawn("blue", "box", "still", "snow", g)[0])
    write_png(folder / "desert.png", drawn("red", "ball", "left", "desert", g)[0])
    for expert in EXPERTS:
        save_file(lora(g), folder / "sway" / f"backbone_{expert}.safetensors")


if __name__ == "__main__":
    main()
