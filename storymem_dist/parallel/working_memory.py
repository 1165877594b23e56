"""Device memory that a rank needs besides weights, from sizes alone; and how many blocks that leaves room for.

The numbers per token and per pixel are predictions of ``benchmarks/memory.py`` for this project's own code (A14B in
bf16), not lower bounds: see ``clip_memory`` for what no implementation can do without. Moves nothing.
"""

import torch
from torch import Tensor, nn

from storymem_dist.diffusion.step_cache import step_cache_of
from storymem_dist.diffusion.text_cache import text_cache_of
from storymem_dist.hardware import GIB, free_device_memory_bytes
from storymem_dist.models.compile import is_compiled
from storymem_dist.models.precision import CONV_WORKSPACE_MIB
from storymem_dist.models.quantized_linear import ROWS_AT_ONCE, format_of
from storymem_dist.models.wan.dit import DiTConfig, WanBlock, WanDiT

RESERVE_BYTES = 3 * GIB
"""Left free: all-gathers, libraries, workspaces of kernels, fragmentation."""

VAE_BYTES = GIB // 2
"""The VAE's weights, which stay on the device."""

_BYTES_PER_CHANNEL = 26.5
"""Of a token, at the widest point of a forward: queries and keys in fp32. Measured with a compiler: 21 (float8: 22)."""

_COMPILED_INT8_BYTES_PER_CHANNEL = 30.0
"""A compiler does not cut rows into parts, so that the int32 sums of all tokens exist at once."""

_INT8_BYTES_PER_HIDDEN_CHANNEL = 27
"""Of one of the rows that an int8 layer takes at a time, in the second layer of the feed-forward."""

_DECODE_BYTES_PER_PIXEL = {torch.float32: 20_600, torch.bfloat16: 10_700}


def forward_bytes(config: DiTConfig, num_tokens: int, *, linears: str = "exact", compiled: bool = False) -> int:
    """Return the peak of one forward over ``num_tokens`` tokens of this rank, weights excluded.

    ``linears`` is the format of the blocks' layers; only int8 makes a difference.
    """
    widest = num_tokens * config.dim * _BYTES_PER_CHANNEL
    if linears == "int8" and compiled:
        widest = num_tokens * config.dim * _COMPILED_INT8_BYTES_PER_CHANNEL
    elif linears == "int8":
        rows = min(num_tokens, ROWS_AT_ONCE) * _INT8_BYTES_PER_HIDDEN_CHANNEL * config.ffn_dim
        widest = max(widest, num_tokens * (6 * config.dim + 2 * config.ffn_dim) + rows)
    return int(widest)


def decode_bytes(height: int, width: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the peak of decoding a clip on one rank, whatever its length, with a VAE in ``dtype``.

    Includes the largest workspace that convolutions may take.
    """
    return height * width * _DECODE_BYTES_PER_PIXEL[dtype] + CONV_WORKSPACE_MIB * 2**20


def blocks_that_fit(expert: WanDiT, tokens_BLD: Tensor) -> int:
    """The ``BlocksThatFit`` of a device: by what is free on it now, less what a forward over these tokens needs.

    0 for a CPU, whose memory holds the weights in any case.
    """
    free = free_device_memory_bytes(tokens_BLD.device)
    return 0 if free is None else blocks_within(free, expert, tokens_BLD)


def blocks_within(free: int, expert: WanDiT, tokens_BLD: Tensor) -> int:
    """Return how many blocks of ``expert`` fit into ``free`` bytes next to a forward whose tokens are there already."""
    num_tokens = tokens_BLD.shape[0] * tokens_BLD.shape[1]
    work = forward_bytes(
        expert.config, num_tokens, linears=format_of(_first_linear(expert)), compiled=is_compiled(expert.blocks[0])
    )
    block_bytes = sum(parameter.nbytes for parameter in expert.blocks[0].parameters())
    room = free + tokens_BLD.nbytes - work - _cache_bytes(expert, tokens_BLD) - RESERVE_BYTES
    return max(0, room // block_bytes)


def _cache_bytes(expert: WanDiT, tokens_BLD: Tensor) -> int:
    """What step cache and text cache will hold for both guidance passes."""
    config, total = expert.config, 0
    step_cache = step_cache_of(expert)
    if step_cache is not None and step_cache.enabled:
        total += 2 * 2 * tokens_BLD.numel() * expert.dtype.itemsize
    if text_cache_of(expert) is not None:
        total += 2 * 2 * config.num_layers * config.text_len * config.dim * expert.dtype.itemsize
    return total


def _first_linear(expert: WanDiT) -> nn.Module:
    block = expert.blocks[0]
    assert isinstance(block, WanBlock)
    return block.self_attn.q
