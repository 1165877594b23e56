"""diffusers' transformer with the weights of ours, for the benchmarks that compare them."""

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.own_dit import Inputs
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.weights.key_maps import diffusers_dit_key


def make_diffusers(ours: WanDiT) -> WanTransformer3DModel:
    """diffusers' transformer with the weights of ``ours``, in the types that its own loader uses.

    Weights of the same type are shared, so both models fit on one device.
    """
    config = ours.config
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
        )
    kept = WanTransformer3DModel._keep_in_fp32_modules

    def type_of(key: str) -> torch.dtype:
        return torch.float32 if any(part in key.split(".") for part in kept) else ours.dtype

    state = {diffusers_dit_key(key): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict({key: value.to(type_of(key)) for key, value in state.items()}, strict=True, assign=True)
    device = ours.head.modulation.device
    with torch.device(device):  # the module computes its rotary tables when it is built
        theirs.rope = type(theirs.rope)(config.head_dim, config.patch_size, theirs.config.rope_max_seq_len)
    return theirs.requires_grad_(False).eval()


def run_diffusers(transformer: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """One forward of diffusers' transformer, with latents and text in the model's type, as its pipeline does it."""
    with torch.no_grad():
        latents, context = inputs.latents.to(dtype), inputs.context.to(dtype)
        return transformer(latents, inputs.timestep, context, return_dict=False)[0]
