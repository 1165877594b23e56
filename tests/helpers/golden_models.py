"""Our models, filled with the fixtures' weights by our own loaders."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.text_encoder import TextEncoder, empty_text_encoder
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.weights.loading import StateDictSource, load_dit_weights
from storymem_dist.weights.lora import ScaledLora, open_lora
from storymem_dist.weights.state_dict import assign_state_dict
from storymem_dist.weights.text_encoder import text_encoder_config, transformers_t5_key
from storymem_dist.weights.vae import load_vae
from tests.helpers.golden import load_golden, strip_prefix


def golden_dit(config: dict[str, Any], weights: dict[str, Tensor], lora_file: Path | None = None) -> WanDiT:
    """A float32 DiT with native weights; an rsLoRA file is merged while loading."""
    with torch.device("meta"):
        dit = WanDiT(DiTConfig.from_json(config), dtype=torch.float32)
    dit.to_empty(device="cpu")
    deltas = [ScaledLora(open_lora(lora_file), scale_rule="rslora")] if lora_file else []
    load_dit_weights(dit, StateDictSource("fixture", weights), deltas)
    return dit


def write_lora(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def golden_vae(folder: Path) -> WanVae:
    """The fixtures' VAE, through a native .pth file."""
    tensors, _ = load_golden("vae")
    path = folder / "Wan2.1_VAE.pth"
    torch.save(strip_prefix(tensors, "w."), path)
    return load_vae(path)


class TokensByName:
    """Stands for a tokenizer: a text is the name of a list of token ids."""

    def __init__(self, ids: dict[str, list[int]]):
        self._ids = ids

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._ids[text]}


def golden_text_encoder(weights: dict[str, Tensor], ids: dict[str, list[int]]) -> TextEncoder:
    """The fixtures' T5 in float32, for "texts" that are names in ``ids``."""
    state = {transformers_t5_key(key): value for key, value in weights.items()}
    model = empty_text_encoder(text_encoder_config({key: value.shape for key, value in state.items()}))
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    assign_state_dict(model, state, where="fixture")
    return TextEncoder(model, TokensByName(ids))
