"""Rotary position tables over (time, height, width), and their application to queries and keys.

Knows nothing about memory, frames or ranks: the caller gives the temporal positions, which may be negative and may have
gaps. A table has one row per token.

Legend: B batch, T latent frames, L tokens (t, h, w order, w fastest), N heads, H head width, P = H/2 pairs.
"""

import torch
from torch import Tensor

ROPE_THETA = 10000.0
"""Base of the rotary frequencies (Wan2.2 model code)."""


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head for (time, height, width), e.g. (44, 42, 42) of 128. All even when ``head_dim`` is even."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_tables(
    temporal_positions_T: Tensor, height: int, width: int, head_dim: int, *, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotation angles, each fp32 ``[T * height * width, head_dim / 2]``.

    ``temporal_positions_T`` is int64 ``[T]``, one position per latent frame; ``height`` and ``width`` count tokens
    (latent size / patch size) and are numbered from 0. Angles are computed in fp64. Positions on another device than
    ``device`` are copied; on CUDA, the host waits for this copy. The tables are no views: compiled code would depend on
    the sizes of what they view, and be compiled again for a number of frames that equals the height.
    """
    axes_positions = (
        temporal_positions_T.to(device=device, dtype=torch.float64),
        torch.arange(height, dtype=torch.float64, device=device),
        torch.arange(width, dtype=torch.float64, device=device),
    )
    shape = [len(positions) for positions in axes_positions]
    angles = []
    for axis, (positions, channels) in enumerate(zip(axes_positions, rope_split(head_dim), strict=True)):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        axis_angles = positions[:, None] * ROPE_THETA**-exponents
        view = [1, 1, 1, channels // 2]
        view[axis] = len(positions)
        angles.append(axis_angles.view(view))
    # Cosine and sine in fp64 on the three short axes; only their fp32 results are expanded to all tokens.
    cos = torch.cat([a.cos().float().expand(*shape, -1).flatten(0, 2) for a in angles], dim=-1)
    sin = torch.cat([a.sin().float().expand(*shape, -1).flatten(0, 2) for a in angles], dim=-1)
    return cos, sin


def apply_rope(x_BLNH: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor:
    """Rotate adjacent channel pairs ``(2k, 2k+1)`` of every head, in fp32; returns fp32 ``[B, L, N, H]``.

    Eager code runs one complex product, a single pass over memory. torch.compile does not compile complex numbers, so a
    compiled region gets the same formula in real numbers, which torch.compile fuses with the operations around it.
    """
    pairs_BLNP2 = x_BLNH.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        return _rotate_real(pairs_BLNP2, cos_LP[:, None], sin_LP[:, None]).flatten(-2)
    rotation_L1P = torch.complex(cos_LP, sin_LP)[:, None]
    return torch.view_as_real(torch.view_as_complex(pairs_BLNP2) * rotation_L1P).flatten(-2)


def _rotate_real(pairs_BLNP2: Tensor, cos_L1P: Tensor, sin_L1P: Tensor) -> Tensor:
    even_BLNP, odd_BLNP = pairs_BLNP2.unbind(-1)
    rotated_even_BLNP = even_BLNP * cos_L1P - odd_BLNP * sin_L1P
    rotated_odd_BLNP = even_BLNP * sin_L1P + odd_BLNP * cos_L1P
    return torch.stack([rotated_even_BLNP, rotated_odd_BLNP], dim=-1)
