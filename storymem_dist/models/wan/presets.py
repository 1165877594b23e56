"""Sizes of the models this project renders with: Wan2.2-A14B, and a tiny counterpart of the same architecture.

Plain numbers; knows nothing about files or devices. The sizes of the A14B transformer and text encoder come from the
model cards and the published ``config.json`` files; the VAE is Wan2.1's.
"""

from dataclasses import dataclass, replace

from storymem_dist.models.wan.dit import DiTConfig


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of a umT5 encoder. ``num_buckets`` and ``max_distance`` shape its relative position bias."""

    vocab_size: int
    dim: int
    attention_dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Sizes of the causal video VAE (stride 4 in time, 8 in space)."""

    base_dim: int
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """Everything that has a size: both base transformers (each with two experts), the text encoder, the VAE."""

    t2v: DiTConfig
    i2v: DiTConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig


T2V_IN_DIM = 16
"""Input channels of a T2V expert: noise."""

I2V_IN_DIM = 36
"""Input channels of an I2V (and StoryMem M2V) expert: noise 16, mask 4, condition 16."""

_A14B_T2V = DiTConfig(
    dim=5120,
    ffn_dim=13824,
    freq_dim=256,
    num_heads=40,
    num_layers=40,
    in_dim=T2V_IN_DIM,
    text_dim=4096,
    text_len=512,
)

WAN22_A14B = ModelPreset(
    t2v=_A14B_T2V,
    i2v=replace(_A14B_T2V, in_dim=I2V_IN_DIM),
    text_encoder=TextEncoderConfig(
        vocab_size=256384, dim=4096, attention_dim=4096, ffn_dim=10240, num_heads=64, num_layers=24
    ),
    vae=VaeConfig(base_dim=96),
)

_TINY_T2V = DiTConfig(
    dim=64,
    ffn_dim=128,
    freq_dim=32,
    num_heads=4,
    num_layers=2,
    in_dim=T2V_IN_DIM,
    text_dim=32,
    text_len=512,
)

TINY = ModelPreset(
    t2v=_TINY_T2V,
    i2v=replace(_TINY_T2V, in_dim=I2V_IN_DIM),
    text_encoder=TextEncoderConfig(vocab_size=512, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=2),
    vae=VaeConfig(base_dim=4),
)

PRESETS = {"wan22_a14b": WAN22_A14B, "tiny": TINY}
"""Presets by the name of their ``model`` configuration."""


HIGH_NOISE = "high_noise"
LOW_NOISE = "low_noise"
EXPERTS = (HIGH_NOISE, LOW_NOISE)
"""The two experts of a base model, in the order in which a shot uses them."""
