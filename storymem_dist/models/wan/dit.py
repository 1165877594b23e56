"""The diffusion transformer of Wan2.2-A14B, with the checkpoint's own parameter names.

Predicts the flow-matching velocity of video latents. One timestep serves all tokens (its embedding is one row,
broadcast). Temporal positions are an argument (those of memory frames are negative). Knows nothing about ranks, memory,
guidance or where weights come from.

Parallel code has two places to change. It may replace ``SelfAttention.attend``. All else from the output of
``patch_embedding`` through ``blocks`` (one call, tokens to tokens) to the output of ``head`` works token by token, so
hooks may split tokens and rotary tables along L and gather the tokens later.

Precision: matmuls and attention in the model's ``dtype``; residual stream, norms, modulation, time embedding and head
in fp32; rotary angles in fp64, their tables and the rotation in fp32.

Legend: B batch, C channels, T latent frames, h/w latent height and width, L tokens, S text tokens, D width, N heads,
H head width, P = H/2 rotary pairs, E text width. ``modulation_B6D`` rows: shift, scale, gate of self-attention, then of
the feed-forward.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storymem_dist.errors import CheckpointError, ConfigError
from storymem_dist.models.attention import Attend
from storymem_dist.models.rope import apply_rope, rope_tables

TextKeys = tuple[Tensor, Tensor]
"""Keys and values ``[B, S, N, H]`` of the text in one block's cross-attention: the same at every step of a prompt."""

_DIFFUSERS_NAMES = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}
_JSON_DEFAULTS = {"out_dim": 16, "text_dim": 4096, "text_len": 512, "patch_size": (1, 2, 2), "eps": 1e-6}
_JSON_REQUIRED = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "in_dim")


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a ``WanDiT``. Query/key RMS norm and the cross-attention layer norm are always on, as in every expert.

    ``in_dim`` is 16 (T2V: noise) or 36 (noise 16, mask 4, condition 16). ``text_len`` is the fixed number of text
    tokens that are attended to. Raises ``ConfigError`` for sizes that cannot work together.
    """

    dim: int
    ffn_dim: int
    freq_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    text_dim: int
    text_len: int
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "ffn_dim",
            "freq_dim",
            "num_heads",
            "num_layers",
            "in_dim",
            "text_dim",
            "text_len",
            "out_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not allowed; it must be a positive whole number")
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ConfigError(
                f"dim={self.dim} with num_heads={self.num_heads} is not allowed; dim / num_heads must be an even whole "
                f"number of at least 6 (rotary pairs for three axes)"
            )
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim={self.freq_dim} is not allowed; it must be even (cosine and sine halves)")
        is_triple = isinstance(self.patch_size, tuple) and len(self.patch_size) == 3
        if not is_triple or any(not isinstance(p, int) or p < 1 for p in self.patch_size):
            raise ConfigError(f"patch_size={self.patch_size!r} is not allowed; it must be three positive whole numbers")
        if not isinstance(self.eps, float) or not self.eps > 0:
            raise ConfigError(f"eps={self.eps!r} is not allowed; it must be a positive number")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "config.json") -> "DiTConfig":
        """Read a native ``config.json`` or diffusers' ``transformer/config.json``.

        Sizes that native files leave out get A14B's values. Raises ``CheckpointError`` (naming ``where``) when a size
        is missing or the file describes another architecture.
        """
        renamed = {_DIFFUSERS_NAMES.get(key, key): value for key, value in values.items()}
        if "attention_head_dim" in values and "num_attention_heads" in values:
            renamed["dim"] = values["num_attention_heads"] * values["attention_head_dim"]
        missing = [name for name in _JSON_REQUIRED if name not in renamed]
        if missing:
            raise CheckpointError(
                f"{where}: not the configuration of a Wan2.2 transformer; missing {', '.join(missing)}"
            )
        expected_kinds = {
            "qk_norm": (True, "rms_norm_across_heads"),
            "cross_attn_norm": (True,),
            "image_dim": (None,),
            "added_kv_proj_dim": (None,),
            "model_type": ("t2v", "i2v"),
        }
        for name, allowed in expected_kinds.items():
            if name in values and values[name] not in allowed:
                raise CheckpointError(
                    f"{where}: {name}={values[name]!r} is another architecture than Wan2.2-A14B; "
                    f"allowed: {', '.join(map(repr, allowed))}"
                )
        sizes = {name: renamed.get(name, default) for name, default in _JSON_DEFAULTS.items()}
        sizes |= {name: renamed[name] for name in _JSON_REQUIRED}
        if isinstance(sizes["patch_size"], list):
            sizes["patch_size"] = tuple(sizes["patch_size"])
        try:
            return cls(**sizes)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None


def timestep_sinusoid(timestep_B: Tensor, freq_dim: int) -> Tensor:
    """Cosines, then sines of ``t * 10000^(-i / (freq_dim / 2))``, t in 0..1000: fp32 ``[B, freq_dim]``, from fp64."""
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep_B.device) / half
    angles = timestep_B.double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def modulated_norm(tokens_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """``layer_norm(tokens) * (1 + scale) + shift`` in fp32. A batch of one takes a single pass over memory."""
    width = tokens_BLD.shape[-1:]
    if tokens_BLD.shape[0] == 1:
        return F.layer_norm(tokens_BLD, width, 1 + scale_BD[0], shift_BD[0], eps)
    return torch.addcmul(shift_BD[:, None], F.layer_norm(tokens_BLD, width, eps=eps), 1 + scale_BD[:, None])


def gated_residual(tokens_BLD: Tensor, update_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """``tokens + update * gate`` in fp32, whatever the dtype of ``update``."""
    return torch.addcmul(tokens_BLD, update_BLD, gate_BD[:, None])


class PatchEmbedding(nn.Conv3d):
    """Cuts latents into patches and embeds each: ``[B, C, T, h, w] -> [B, L, D]`` (t, h, w order, w fastest).

    The convolution's stride is its kernel, so it is one matrix product over rearranged patches.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: tuple[int, int, int], dtype: torch.dtype):
        super().__init__(in_dim, dim, patch_size, patch_size, dtype=dtype)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Return tokens in the weight's dtype; sizes must be divisible by the patch."""
        return F.linear(self.patches(x_BCTHW), self.weight.flatten(1), self.bias)

    def patches(self, x_BCTHW: Tensor) -> Tensor:
        """The values of each patch ``[B, L, C * patch_t * patch_h * patch_w]`` in the weight's dtype."""
        batch, channels, *sizes = x_BCTHW.shape
        (t, pt), (h, ph), (w, pw) = ((size // p, p) for size, p in zip(sizes, self.kernel_size, strict=True))
        patches = x_BCTHW.to(self.weight.dtype).view(batch, channels, t, pt, h, ph, w, pw)
        return patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, t * h * w, channels * pt * ph * pw)


class SelfAttention(nn.Module):
    """Rotary self-attention with RMS-normalized queries and keys (over the full width, before the split into heads)."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, attention_backend: str):
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim, dtype=dtype) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps, dtype=torch.float32)
        self.norm_k = nn.RMSNorm(config.dim, config.eps, dtype=torch.float32)
        self.attend = Attend(attention_backend)

    def forward(self, x_BLD: Tensor, rope_cos_LP: Tensor, rope_sin_LP: Tensor) -> Tensor:
        """``x_BLD`` in the matmul dtype, rotary tables fp32; returns the output projection in the matmul dtype."""
        v_BLNH = self.attend.begin(self.v(x_BLD).unflatten(-1, (self.num_heads, -1)))
        q_BLNH = self._rotate(self.norm_q(self.q(x_BLD).float()), rope_cos_LP, rope_sin_LP).to(x_BLD.dtype)
        k_BLNH = self._rotate(self.norm_k(self.k(x_BLD).float()), rope_cos_LP, rope_sin_LP).to(x_BLD.dtype)
        return self.o(self.attend(q_BLNH, k_BLNH, v_BLNH).flatten(2))

    def _rotate(self, x_BLD: Tensor, rope_cos_LP: Tensor, rope_sin_LP: Tensor) -> Tensor:
        return apply_rope(x_BLD.unflatten(-1, (self.num_heads, -1)), rope_cos_LP, rope_sin_LP)


class CrossAttention(nn.Module):
    """Attention of video tokens to all ``text_len`` text tokens (padding too, as in training), without rotation."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, attention_backend: str):
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim, dtype=dtype) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, config.eps, dtype=torch.float32)
        self.norm_k = nn.RMSNorm(config.dim, config.eps, dtype=torch.float32)
        self.attend = Attend(attention_backend)

    def forward(self, x_BLD: Tensor, text: TextKeys) -> Tensor:
        """``x_BLD`` in the matmul dtype, ``text`` from ``text_keys``; the result is in the matmul dtype."""
        k_BSNH, v_BSNH = text
        q_BLNH = self.norm_q(self.q(x_BLD).float()).to(v_BSNH.dtype).unflatten(-1, (self.num_heads, -1))
        return self.o(self.attend(q_BLNH, k_BSNH, v_BSNH).flatten(2))

    def text_keys(self, context_BSD: Tensor) -> TextKeys:
        """Keys and values of the text, in the matmul dtype."""
        v_BSNH = self.v(context_BSD).unflatten(-1, (self.num_heads, -1))
        k_BSNH = self.norm_k(self.k(context_BSD).float()).to(v_BSNH.dtype).unflatten(-1, (self.num_heads, -1))
        return k_BSNH, v_BSNH


class FeedForward(nn.Sequential):
    """Linear, tanh-GELU, linear. The activation overwrites its input, the widest tensor of a block."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype):
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim, dtype=dtype),
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Input and result in the matmul dtype."""
        expand, activate, reduce = self
        return reduce(torch.ops.aten.gelu_(expand(x_BLD), approximate=activate.approximate))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward around one fp32 residual stream."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, attention_backend: str):
        super().__init__()
        self.eps = config.eps
        self.dtype = dtype
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config, dtype, attention_backend)
        self.norm3 = nn.LayerNorm(config.dim, config.eps, dtype=torch.float32)
        self.cross_attn = CrossAttention(config, dtype, attention_backend)
        self.ffn = FeedForward(config, dtype)

    def forward(
        self,
        tokens_BLD: Tensor,
        rope_cos_LP: Tensor,
        rope_sin_LP: Tensor,
        modulation_B6D: Tensor,
        context: Tensor | TextKeys,
        keep_text: bool = False,
    ) -> Tensor | tuple[Tensor, TextKeys]:
        """Tokens, tables and modulation are fp32, context is in the matmul dtype; returns fp32 tokens.

        ``context`` is the embedded text ``[B, S, D]``, or its keys and values in this block. An earlier call with
        ``keep_text`` returned these next to the tokens.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulated(modulation_B6D).unbind(1)
        # Intermediates get no names here: they would stay in memory while the next layers run.
        tokens_BLD = gated_residual(
            tokens_BLD, self.self_attn(self._normed(tokens_BLD, shift1, scale1), rope_cos_LP, rope_sin_LP), gate1
        )
        text = self.cross_attn.text_keys(context) if isinstance(context, Tensor) else context
        tokens_BLD = tokens_BLD + self.cross_attn(self.norm3(tokens_BLD).to(self.dtype), text)
        tokens_BLD = gated_residual(tokens_BLD, self.ffn(self._normed(tokens_BLD, shift2, scale2)), gate2)
        return (tokens_BLD, text) if keep_text else tokens_BLD

    def modulated(self, modulation_B6D: Tensor) -> Tensor:
        """Shifts, scales and gates ``[B, 6, D]`` of this block, fp32."""
        return self.modulation + modulation_B6D

    def _normed(self, tokens_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
        return modulated_norm(tokens_BLD, shift_BD, scale_BD, self.eps).to(self.dtype)


def run_block(block: nn.Module, tokens_BLD: Tensor, *shared: Tensor) -> Tensor:
    """Call one block of a stack with the arguments that all blocks share: rotary tables, modulation, text."""
    tokens: Tensor = block(tokens_BLD, *shared)
    return tokens


class BlockStack(nn.ModuleList):
    """All blocks as one call, whose first three arguments parallel code may split along L.

    ``run_block`` calls one block; a text cache replaces it, to pass the text's keys instead of the text.
    ``before_block`` is called before each block, for example to wait for its weights. Parameter names stay
    ``blocks.N.*``.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.run_block: Callable[..., Tensor] = run_block
        self.before_block: Callable[[nn.Module], None] | None = None

    def forward(
        self, tokens_BLD: Tensor, rope_cos_LP: Tensor, rope_sin_LP: Tensor, modulation_B6D: Tensor, context_BSD: Tensor
    ) -> Tensor:
        """``tokens_BLD`` fp32 residual stream, tables fp32 ``[L, P]``; returns the stream after the last block."""
        return self.run(self, tokens_BLD, rope_cos_LP, rope_sin_LP, modulation_B6D, context_BSD)

    def run(self, blocks: Iterable[nn.Module], tokens_BLD: Tensor, *shared: Tensor) -> Tensor:
        """The tokens after ``blocks``, run in order with ``before_block``."""
        for block in blocks:
            if self.before_block is not None:
                self.before_block(block)
            tokens_BLD = self.run_block(block, tokens_BLD, *shared)
        return tokens_BLD


class Head(nn.Module):
    """Modulated norm and projection of every token to the values of its patch, in fp32."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim, dtype=torch.float32)

    def forward(self, tokens_BLD: Tensor, time_BD: Tensor) -> Tensor:
        """Return ``[B, L, patch_t * patch_h * patch_w * out_dim]``, channel fastest."""
        shift_BD, scale_BD = self.modulated(time_BD[:, None]).unbind(1)
        return self.head(modulated_norm(tokens_BLD, shift_BD, scale_BD, self.eps))

    def modulated(self, time_B1D: Tensor) -> Tensor:
        """Shift and scale ``[B, 2, D]``, fp32."""
        return self.modulation + time_B1D


class WanDiT(nn.Module):
    """Velocity of noisy video latents, given a timestep, text and temporal positions.

    ``dtype`` is that of matmuls and attention, ``attention_backend`` one of ``models.attention.BACKENDS``. Built under
    ``torch.device("meta")`` it has all names and shapes and no memory; there are no buffers.
    """

    def __init__(self, config: DiTConfig, *, dtype: torch.dtype = torch.bfloat16, attention_backend: str = "auto"):
        super().__init__()
        self.config = config
        self.dtype = dtype
        dim, fp32 = config.dim, torch.float32
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size, dtype)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dim, dim, dtype=dtype),
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim, dtype=fp32), nn.SiLU(), nn.Linear(dim, dim, dtype=fp32)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, dtype=fp32))
        self.blocks = BlockStack(WanBlock(config, dtype, attention_backend) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(self, x_BCTHW: Tensor, timestep_B: Tensor, context_BSE: Tensor, temporal_positions_T: Tensor) -> Tensor:
        """Return the velocity, fp32 ``[B, out_dim, T, h, w]``.

        ``x_BCTHW``: ``[B, in_dim, T, h, w]``, any float dtype. ``timestep_B``: 0..1000. ``context_BSE``: at most
        ``text_len`` rows, padded here with zero rows *before* the text MLP; padding is attended to.
        ``temporal_positions_T``: int64 ``[T]``. Raises ``ValueError`` when a shape does not fit the model.
        """
        self._check_shapes(x_BCTHW, context_BSE, temporal_positions_T)
        grid = [size // patch for size, patch in zip(x_BCTHW.shape[2:], self.config.patch_size, strict=True)]
        rope_cos_LP, rope_sin_LP = rope_tables(
            temporal_positions_T, grid[1], grid[2], self.config.head_dim, device=x_BCTHW.device
        )
        time_BD = self.time_embedding(timestep_sinusoid(timestep_B, self.config.freq_dim))
        modulation_B6D = self.time_projection(time_BD).unflatten(1, (6, -1))
        padding = self.config.text_len - context_BSE.shape[1]
        context_BSD = self.text_embedding(F.pad(context_BSE.to(self.dtype), (0, 0, 0, padding)))
        tokens_BLD = self.patch_embedding(x_BCTHW).float()
        tokens_BLD = self.blocks(tokens_BLD, rope_cos_LP, rope_sin_LP, modulation_B6D, context_BSD)
        return self._unpatchify(self.head(tokens_BLD, time_BD), grid)

    def _unpatchify(self, values_BLX: Tensor, grid: list[int]) -> Tensor:
        pt, ph, pw = self.config.patch_size
        t, h, w = grid
        values = values_BLX.view(-1, t, h, w, pt, ph, pw, self.config.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return values.reshape(-1, self.config.out_dim, t * pt, h * ph, w * pw)

    def _check_shapes(self, x_BCTHW: Tensor, context_BSE: Tensor, temporal_positions_T: Tensor) -> None:
        config = self.config
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != config.in_dim:
            raise ValueError(f"x has shape {tuple(x_BCTHW.shape)}; expected [B, {config.in_dim}, T, h, w]")
        if any(size % patch for size, patch in zip(x_BCTHW.shape[2:], config.patch_size, strict=True)):
            raise ValueError(
                f"latent size {tuple(x_BCTHW.shape[2:])} is not divisible by the patch {config.patch_size}"
            )
        if temporal_positions_T.shape != (x_BCTHW.shape[2] // config.patch_size[0],):
            raise ValueError(
                f"temporal_positions has shape {tuple(temporal_positions_T.shape)}; expected one position for each of "
                f"{x_BCTHW.shape[2] // config.patch_size[0]} latent frames"
            )
        if context_BSE.ndim != 3 or context_BSE.shape[2] != config.text_dim or context_BSE.shape[1] > config.text_len:
            expected = f"[B, at most {config.text_len}, {config.text_dim}]"
            raise ValueError(f"context has shape {tuple(context_BSE.shape)}; expected {expected}")
