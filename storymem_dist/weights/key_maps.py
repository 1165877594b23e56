"""Maps key names of Wan weights between native (Wan-AI's own files) and diffusers.

Each map is written once, as pairs, and applied in either direction. Knows nothing about tensors or files.
"""

import re

_DIT_RENAMES = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("head.head.", "proj_out."),
)
_BLOCK_RENAMES = (
    ("self_attn.norm_", "attn1.norm_"),
    ("cross_attn.norm_", "attn2.norm_"),
    *(
        (f"{native}.{letter}.", f"{diffusers}.{projection}.")
        for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for letter, projection in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    ),
    ("norm3.", "norm2."),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
)
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def native_dit_key(diffusers_key: str) -> str:
    """The native name of a key of diffusers' ``WanTransformer3DModel``; an unknown key is returned as it is."""
    if diffusers_key == "scale_shift_table":
        return "head.modulation"
    block = _BLOCK.fullmatch(diffusers_key)
    if block is None:
        return _rename(diffusers_key, _DIT_RENAMES, source=1)
    prefix, rest = block.groups()
    if rest == "scale_shift_table":
        return f"{prefix}modulation"
    return prefix + _rename(rest, _BLOCK_RENAMES, source=1)


def diffusers_dit_key(native_key: str) -> str:
    """The inverse of ``native_dit_key``."""
    if native_key == "head.modulation":
        return "scale_shift_table"
    block = _BLOCK.fullmatch(native_key)
    if block is None:
        return _rename(native_key, _DIT_RENAMES, source=0)
    prefix, rest = block.groups()
    if rest == "modulation":
        return f"{prefix}scale_shift_table"
    return prefix + _rename(rest, _BLOCK_RENAMES, source=0)


def _rename(key: str, pairs: tuple[tuple[str, str], ...], *, source: int) -> str:
    for pair in pairs:
        if key.startswith(pair[source]):
            return pair[1 - source] + key.removeprefix(pair[source])
    return key


_VAE_ENDS = (
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    ("encoder.head.0.", "encoder.norm_out."),
    ("decoder.head.0.", "decoder.norm_out."),
    ("encoder.head.2.", "encoder.conv_out."),
    ("decoder.head.2.", "decoder.conv_out."),
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
    *(
        (f"{side}.middle.{native}.", f"{side}.mid_block.{diffusers}.")
        for side in ("encoder", "decoder")
        for native, diffusers in (("0", "resnets.0"), ("1", "attentions.0"), ("2", "resnets.1"))
    ),
    ("encoder.downsamples.", "encoder.down_blocks."),
)
_VAE_RESIDUAL = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)
_VAE_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)")
# One flat list holds the native decoder's stages: three residual blocks, then an upsampler (not in the last stage).
_VAE_UP_STAGE = 4
_VAE_UP_RESNETS = 3


def native_vae_key(diffusers_key: str) -> str:
    """The native name of a key of diffusers' ``AutoencoderKLWan``: inverse of its ``convert_wan_vae_to_diffusers``."""
    up = _VAE_UP.fullmatch(diffusers_key)
    if up is not None:
        stage, kind, index, rest = int(up[1]), up[2], int(up[3]), up[4]
        position = stage * _VAE_UP_STAGE + (index if kind == "resnets" else _VAE_UP_RESNETS)
        return f"decoder.upsamples.{position}.{_rename(rest, _VAE_RESIDUAL, source=1)}"
    key = _rename(diffusers_key, _VAE_ENDS, source=1)
    for native, diffusers in _VAE_RESIDUAL:
        if f".{diffusers}" in key and ("downsamples" in key or "middle" in key):
            return key.replace(f".{diffusers}", f".{native}")
    return key
