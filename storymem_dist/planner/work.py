"""Counts the work of a shot: FLOP of every part, bytes that pass through memory, and bytes over links.

Exact for matrix products, attention and convolutions (a test compares with torch's counter); bytes of all else in a
block were counted on fake tensors. Knows no machine.

Legend: L tokens, D width, S text tokens.
"""

import math
from dataclasses import dataclass

from storymem_dist.diffusion.latent_grid import VAE_TIME_STRIDE
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import WAN22_A14B, TextEncoderConfig, VaeConfig

ELEMENTWISE_BYTES = {
    "exact": (71.0, 160.0),
    "float8": (100.0, 422.0),
    "float8_fast": (100.0, 422.0),
    "int8": (110.0, 714.0),
}
"""Bytes of one token and channel that a block reads and writes outside of products, by ``model.linears``: compiled
(every fused pass once), and eager (counted on fake tensors, with CUDA's fused RMS norm)."""

_ENCODE_FLOP = (6_656_864, 20_011_424)
_DECODE_FLOP = (10_748_168, 33_779_528)
"""Convolutions of Wan2.1's VAE per pixel: of the first frame, and of each four frames after it."""

_VAE_ATTENTION_WIDTH = 4  # times ``base_dim``: the one attention layer of encoder and decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardWork:
    """FLOP and bytes of one forward of an expert, over all ranks.

    ``linear``: matrix products of the blocks. ``exact_linear``: those outside of them, which no format changes.
    ``attention``: self-attention; ``cross``: attention to the text. ``elementwise``: bytes read and written.
    """

    linear: float
    exact_linear: float
    attention: float
    cross: float
    elementwise: float

    @property
    def flop(self) -> float:
        """All FLOP."""
        return self.linear + self.exact_linear + self.attention + self.cross


def forward_work(config: DiTConfig, num_tokens: float, *, linears: str = "exact", compiled: bool = True) -> ForwardWork:
    """Return the work of one forward over ``num_tokens`` tokens."""
    d, f, n, s = config.dim, config.ffn_dim, config.num_layers, config.text_len
    patch = math.prod(config.patch_size)
    per_token = 6 * d * d + 2 * d * f  # q, k, v, o; q, o of the text; feed-forward
    ends = num_tokens * d * patch * (config.in_dim + config.out_dim)
    texts = s * d * (config.text_dim + d)
    time = d * (config.freq_dim + d + 6 * d)
    return ForwardWork(
        linear=2.0 * n * (num_tokens * per_token + 2 * s * d * d),
        exact_linear=2.0 * (ends + texts + time),
        attention=4.0 * n * d * num_tokens**2,
        cross=4.0 * n * d * num_tokens * s,
        elementwise=ELEMENTWISE_BYTES[linears][0 if compiled else 1] * num_tokens * d * n,
    )


def decode_flop(num_frames: int, height: int, width: int, vae: VaeConfig = WAN22_A14B.vae) -> float:
    """Return the FLOP of decoding a clip."""
    return _vae_flop(_DECODE_FLOP, num_frames, height, width, vae)


def encode_flop(num_frames: int, height: int, width: int, vae: VaeConfig = WAN22_A14B.vae) -> float:
    """Return the FLOP of encoding a clip, or (one frame) an image."""
    return _vae_flop(_ENCODE_FLOP, num_frames, height, width, vae)


def _vae_flop(per_pixel: tuple[int, int], num_frames: int, height: int, width: int, vae: VaeConfig) -> float:
    later = (num_frames - 1) // VAE_TIME_STRIDE
    convolutions = float(height * width) * (per_pixel[0] + later * per_pixel[1])
    convolutions *= (vae.base_dim / WAN22_A14B.vae.base_dim) ** 2
    cells = height * width // 64
    return convolutions + 4.0 * (later + 1) * cells**2 * _VAE_ATTENTION_WIDTH * vae.base_dim


def text_flop(num_texts: int, text_len: int, config: TextEncoderConfig = WAN22_A14B.text_encoder) -> float:
    """Return the FLOP of encoding ``num_texts`` texts of ``text_len`` tokens."""
    layer = 4 * config.dim * config.attention_dim + 3 * config.dim * config.ffn_dim
    scores = 4 * config.attention_dim * text_len
    return float(num_texts * text_len * config.num_layers * (2 * layer + scores))


def exchanged_bytes(config: DiTConfig, num_tokens: float, ulysses: int, itemsize: int = 2) -> tuple[float, float]:
    """Bytes that one rank of a Ulysses group sends in one block: queries and keys, then values or the output.

    ``num_tokens`` are those of the group. The values travel while queries and keys are computed, so nothing waits for
    them; the output travels alone.
    """
    mine = num_tokens / ulysses * config.dim * itemsize * (ulysses - 1) / ulysses
    return 2 * mine, mine


def passed_on_bytes(config: DiTConfig, num_tokens: float, ring: int, ulysses: int, itemsize: int = 2) -> float:
    """Bytes of the keys and values that one rank sends in each of the ``ring - 1`` rounds of a block."""
    return 2 * num_tokens / ring / ulysses * config.dim * itemsize
