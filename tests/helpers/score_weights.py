"""Tiny ViCLIP, CLIP ViT-L/14 and LAION head in the formats of the published files; ``sine_models`` has the numbers."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.models.viclip import ViClip, ViClipConfig
from tests.helpers.sine_models import CONTEXT, NUM_TOKENS, sine_state, write_words

EXPECTED = Path(__file__).parents[1] / "fixtures" / "vbench" / "expected.json"
VICLIP = ViClipConfig(
    image_size=224,
    patch_size=56,
    num_frames=8,
    vision_dim=128,
    vision_layers=2,
    text_dim=64,
    text_layers=2,
    embed_dim=32,
    context=CONTEXT,
    vocabulary=NUM_TOKENS,
)


@cache
def expected() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(EXPECTED.read_text())
    return values


def viclip_state() -> dict[str, Tensor]:
    """With the key that only training uses, as in the published file."""
    shapes = {key: tuple(value.shape) for key, value in ViClip(VICLIP).state_dict().items()}
    return sine_state({**shapes, "temp": ()})


def write_viclip(folder: Path, *, as_pth: bool = False) -> Path:
    folder.mkdir(parents=True)
    if as_pth:
        torch.save({"model": viclip_state()}, folder / "ViClip-InternVid-10M-FLT.pth")
    else:
        save_file(viclip_state(), folder / "model.safetensors")
    write_words(folder / "bpe_simple_vocab_16e6.txt.gz")
    return folder


def clip_names(key: str) -> str:
    """transformers' name of a parameter of the image half of OpenAI's CLIP (the packed projections: see below)."""
    for old, new in (
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("visual.proj", "visual_projection.weight"),
        ("visual.conv1", "vision_model.embeddings.patch_embedding"),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        (".ln_1.", ".layer_norm1."),
        (".ln_2.", ".layer_norm2."),
        (".mlp.c_fc.", ".mlp.fc1."),
        (".mlp.c_proj.", ".mlp.fc2."),
        (".attn.", ".self_attn."),
    ):
        key = key.replace(old, new)
    return key


def write_clip_l(folder: Path) -> Path:
    """The image half that ``expected.json`` was made with, as transformers saves it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    state: dict[str, Tensor] = {}
    for key, value in sine_state(expected()["image_shapes"]).items():
        if "in_proj" in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[clip_names(key).replace("in_proj_", f"{part}_proj.")] = rows.contiguous()
        else:
            state[clip_names(key)] = value.T.contiguous() if key == "visual.proj" else value
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=224,
        patch_size=56,
        projection_dim=32,
    )
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def write_aesthetic(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(sine_state({"weight": (1, 32), "bias": (1,)}), folder / "sa_0_4_vit_l_14_linear.pth")
    return folder
