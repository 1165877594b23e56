"""Device memory that a rank needs besides weights, from sizes alone; and how many blocks that leaves room for.

The numbers per token and per pixel were counted on fake tensors of full size (``benchmarks/planner_memory.py``) for
this project's own code, by the moment at which a forward or the VAE holds the most; they are no lower bounds: see
``clip_memory`` for what no implementation can do without. The planner and the checks at the start of a job both use
this module. Moves nothing.

Legend: L tokens of the whole sequence, l tokens per rank, D width of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storymem_dist.diffusion.latent_grid import VAE_SPACE_STRIDE
from storymem_dist.diffusion.step_cache import step_cache_of
from storymem_dist.diffusion.text_cache import text_cache_of
from storymem_dist.hardware import GIB, free_device_memory_bytes
from storymem_dist.models.compile import is_compiled
from storymem_dist.models.precision import CONV_WORKSPACE_MIB
from storymem_dist.models.quantized_linear import ROWS_AT_ONCE, format_of
from storymem_dist.models.wan.dit import DiTConfig, WanBlock, WanDiT
from storymem_dist.parallel.sequence import token_split_of

RESERVE_BYTES = 3 * GIB
"""Left free: libraries, workspaces of kernels, fragmentation, latents between two steps."""

VAE_BYTES = GIB // 2
"""The VAE's weights, which stay on the device."""

_NORMS = {2: 26, 4: 32}
"""Bytes of l x D at the normed queries of cross-attention, by bytes per number. Measured with a compiler: 21."""

_EXCHANGE = {2: 24, 4: 44}
"""The same where queries, keys and values are traded for heads (Ulysses)."""

_RING = {2: 34, 4: 44}
"""The same where partial results of a ring of two are merged. A longer ring, and Ulysses next to a ring, add a message
of keys and values each."""

_COMPILED_INT8_BYTES_PER_CHANNEL = 30.0
"""A compiler does not cut rows into parts, so that the int32 sums of all tokens exist at once."""

_INT8_BYTES_PER_HIDDEN_CHANNEL = 27
"""Of one of the rows that an int8 layer takes at a time, in the second layer of the feed-forward."""

_DECODE_BYTES_PER_PIXEL = {torch.float32: 19_520, torch.bfloat16: 10_160}
_ENCODE_BYTES_PER_PIXEL = {torch.float32: 14_090, torch.bfloat16: 7_490}
_VAE_WIDTH = 96
"""``VaeConfig.base_dim`` of the VAE for which bytes per pixel were counted."""

_GHOST_COLUMNS = 4
"""Columns of each neighbour that a rank's strip carries through the widest layers of the VAE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardMemory:
    """Bytes at the widest moment of one forward on one rank, without the weights that stay there.

    ``activations``: what one device would need for this rank's tokens. ``messages``: of ranks that share the tokens, in
    addition. ``gathered``: weights that FSDP2 has gathered.
    """

    activations: int
    messages: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return self.activations + self.messages + self.gathered


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathering:
    """What FSDP2 gathers: the bytes of a whole ``block``, of all ``outside`` the blocks, ``ahead`` blocks early.

    ``shards``: parts that weights are cut into. ``from_host``: a shard is copied to the device first.
    """

    block: int
    outside: int
    ahead: int = 1
    shards: int = 1
    from_host: bool = False


def forward_memory(
    config: DiTConfig,
    num_tokens: int,
    *,
    ring: int = 1,
    ulysses: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    linears: str = "exact",
    compiled: bool = False,
    gathering: Gathering | None = None,
) -> ForwardMemory:
    """Return what one forward over ``num_tokens`` tokens needs on each of the ``ring`` x ``ulysses`` ranks.

    ``linears`` is the format of the blocks' layers; only int8 makes a difference. The widest moment is one of a block,
    or (with many ranks) the patch embedding, which every rank computes for all tokens.
    """
    num_ranks, e = ring * ulysses, dtype.itemsize
    mine = -(-num_tokens // num_ranks)
    tables = 4 * config.head_dim * (num_tokens + (mine if num_ranks > 1 else 0))
    rows = 4 * (4 * mine + 4 * 6 * config.dim)  # statistics of norms, modulations
    kept = tables + 3 * config.text_len * config.dim * e + rows
    alone = mine * config.dim * _NORMS[e] if linears != "int8" else _int8_bytes(config, mine, compiled)
    widest = alone
    if ulysses > 1:
        widest = max(widest, mine * config.dim * _EXCHANGE[e])
    if ring > 1:
        messages = (ring > 2) + (ulysses > 1)
        widest = max(widest, mine * config.dim * (_RING[e] + 2 * e * messages))
    patch = num_tokens * e * (config.dim + config.in_dim * _product(config.patch_size))
    gathered_by_block = gathered_at_start = 0
    if gathering is not None:
        shards = gathering.block // gathering.shards if gathering.from_host else 0
        gathered_by_block = (gathering.ahead + 2) * gathering.block + (gathering.ahead + 1) * shards
        gathered_at_start = 2 * gathering.outside
    if num_ranks > 1 and patch + gathered_at_start > widest + gathered_by_block:
        return ForwardMemory(activations=kept + patch, gathered=gathered_at_start)
    return ForwardMemory(activations=kept + alone, messages=widest - alone, gathered=gathered_by_block)


def forward_bytes(
    config: DiTConfig,
    num_tokens: int,
    *,
    ring: int = 1,
    ulysses: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    linears: str = "exact",
    compiled: bool = False,
) -> int:
    """Return the peak of one forward over ``num_tokens`` tokens, weights excluded: see ``forward_memory``."""
    return forward_memory(
        config, num_tokens, ring=ring, ulysses=ulysses, dtype=dtype, linears=linears, compiled=compiled
    ).total


def _int8_bytes(config: DiTConfig, num_tokens: int, compiled: bool) -> int:
    widest = num_tokens * config.dim * _NORMS[2]
    if compiled:
        return int(num_tokens * config.dim * _COMPILED_INT8_BYTES_PER_CHANNEL)
    rows = min(num_tokens, ROWS_AT_ONCE) * _INT8_BYTES_PER_HIDDEN_CHANNEL * config.ffn_dim
    return max(widest, num_tokens * (6 * config.dim + 2 * config.ffn_dim) + rows)


def _product(sizes: tuple[int, int, int]) -> int:
    return sizes[0] * sizes[1] * sizes[2]


def decode_bytes(
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_frames: int = 81,
    num_ranks: int = 1,
    vae_width: int = _VAE_WIDTH,
) -> int:
    """Return the peak of decoding a clip on one of ``num_ranks`` ranks, with a VAE in ``dtype``.

    Every rank holds all decoded frames. Includes the largest workspace that convolutions may take.
    """
    strip = _strip_pixels(height, width, num_ranks) * _DECODE_BYTES_PER_PIXEL[dtype] * vae_width // _VAE_WIDTH
    decoded = 3 * max(0, num_frames - 4) * height * width * dtype.itemsize
    at_the_end = 3 * num_frames * height * width * (dtype.itemsize + 4)  # joined with the last ones, or made fp32
    return max(strip + decoded, at_the_end) + CONV_WORKSPACE_MIB * 2**20


def encode_bytes(
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_frames: int = 81,
    num_ranks: int = 1,
    vae_width: int = _VAE_WIDTH,
) -> int:
    """Return the peak of encoding a clip on one of ``num_ranks`` ranks, the clip and workspaces included."""
    clip = 3 * num_frames * height * width * (4 + (2 if dtype == torch.bfloat16 else 0))
    strip = _strip_pixels(height, width, num_ranks) * _ENCODE_BYTES_PER_PIXEL[dtype] * vae_width // _VAE_WIDTH
    return clip + strip + CONV_WORKSPACE_MIB * 2**20


def _strip_pixels(height: int, width: int, num_ranks: int) -> int:
    """Pixels of the widest strip of a picture that ranks share, with what it carries of its neighbours."""
    short, long = sorted((height, width))
    own = -(-(long // VAE_SPACE_STRIDE) // num_ranks) * VAE_SPACE_STRIDE
    return short * min(long, own + _GHOST_COLUMNS * min(2, num_ranks - 1))


def blocks_that_fit(expert: WanDiT, tokens_BLD: Tensor) -> int:
    """The ``BlocksThatFit`` of a device: by what is free on it now, less what a forward over these tokens needs.

    0 for a CPU, whose memory holds the weights in any case.
    """
    free = free_device_memory_bytes(tokens_BLD.device)
    return 0 if free is None else blocks_within(free, expert, tokens_BLD)


def blocks_within(free: int, expert: WanDiT, tokens_BLD: Tensor) -> int:
    """Return how many blocks of ``expert`` fit into ``free`` bytes next to a forward whose tokens are there already."""
    split = token_split_of(expert)
    ring, ulysses = (1, 1) if split is None else (split.ring.size, split.ulysses.size)
    work = forward_bytes(
        expert.config,
        tokens_BLD.shape[0] * tokens_BLD.shape[1] * ring * ulysses,
        ring=ring,
        ulysses=ulysses,
        dtype=expert.dtype,
        linears=format_of(_first_linear(expert)),
        compiled=is_compiled(expert.blocks[0]),
    )
    block_bytes = sum(parameter.nbytes for parameter in expert.blocks[0].parameters())
    room = free + tokens_BLD.nbytes - work - _cache_bytes(expert, tokens_BLD) - RESERVE_BYTES
    return max(0, room // block_bytes)


def _cache_bytes(expert: WanDiT, tokens_BLD: Tensor) -> int:
    step_cache = step_cache_of(expert)
    return cache_bytes(
        expert.config,
        tokens_BLD.shape[0] * tokens_BLD.shape[1],
        expert.dtype,
        steps=step_cache is not None and step_cache.enabled,
        texts=text_cache_of(expert) is not None,
    )


def cache_bytes(config: DiTConfig, num_tokens: int, dtype: torch.dtype, *, steps: bool, texts: bool) -> int:
    """Return what step cache (of ``num_tokens`` on this rank) and text cache hold for both guidance passes."""
    residuals = 2 * 2 * num_tokens * config.dim * dtype.itemsize if steps else 0
    return residuals + (2 * 2 * config.num_layers * config.text_len * config.dim * dtype.itemsize if texts else 0)


def _first_linear(expert: WanDiT) -> nn.Module:
    block = expert.blocks[0]
    assert isinstance(block, WanBlock)
    return block.self_attn.q
