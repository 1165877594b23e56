"""Exact spatial parallelism for the Wan VAE, applied to a finished instance from outside.

Every rank of a group calls ``encode`` and ``decode`` with the same input and receives the same full result; each rank
computes one strip of the picture. The networks keep their weights, their forwards and their own zero padding: hooks cut
the strip on the way in, exchange the neighbours' columns in between and join the strips on the way out. There are no
tiles and no blending: the result is that of one device, up to the rounding of sums in another order.

How it stays exact with few messages: besides its own columns, a rank carries a few *ghost* columns that belong to its
neighbours. A convolution of width 3 makes the outermost ghost column on either side inexact, because it reads padding
beyond it; the inner columns stay exact. One exchange (both sides, all frames in one message) refreshes the ghosts only
when the next layer would read beyond the last exact one: once per residual block instead of once per convolution.
Feature caches of earlier frames are taken from the same strips and need no message of their own. At the border of the
picture a strip has no ghosts, and the networks' zero padding is correct.

This module does not know what a latent means, and normalizes nothing. It knows the layers of diffusers'
``AutoencoderKLWan`` (Wan2.1 VAE) and refuses a network that holds any other.

Tensor names: B batch, C channels, T frames, H rows, W columns, N tokens of one frame. "Columns" are rows when the
picture is higher than wide: the longer side is split.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanDecoder3d,
    WanEncoder3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    WanUpBlock,
    WanUpsample,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from storymem_dist.errors import LayoutError
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.clock import CollectiveClock, timed

RESIDUAL_REACH = 2  # columns that a residual block reads on either side: two convolutions of width 3
ENTRY_GHOSTS = 1 + RESIDUAL_REACH  # the first convolution and the first residual block run on the input's own columns
ATTENTION_GHOSTS = 2 * RESIDUAL_REACH  # attention has the whole frame: the two blocks after it need no exchange
MIN_OWN_COLUMNS = RESIDUAL_REACH  # a neighbour's ghosts come from one rank

_KNOWN_LAYERS = (
    *(WanEncoder3d, WanDecoder3d, WanMidBlock, WanUpBlock, nn.ModuleList, nn.Sequential),  # they only call other layers
    *(WanRMS_norm, nn.SiLU, nn.Dropout, nn.Identity),  # they read one pixel
    *(WanResidualBlock, WanResample, WanUpsample, nn.ZeroPad2d, WanAttentionBlock),  # _Strip has a rule for them
)


class SpatialParallelVae:
    """A VAE whose encoder and decoder are split over a group, until ``remove`` is called.

    Made by ``parallelize_vae``. All ranks of the group must call ``encode`` and ``decode`` together, with equal inputs.
    """

    def __init__(self, autoencoder: AutoencoderKLWan, group: dist.ProcessGroup, clock: CollectiveClock | None) -> None:
        self._hooks: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for network in (autoencoder.encoder, autoencoder.decoder):
            _refuse_unknown_layers(network)
        for network in (autoencoder.encoder, autoencoder.decoder):
            self._split(network, _Strip(group, clock))

    def remove(self) -> None:
        """Remove all hooks and put replaced layers back: the VAE is as before."""
        for hook in self._hooks:
            hook.remove()
        for network, name, original in self._replaced:
            network.set_submodule(name, original)
        self._hooks.clear()
        self._replaced.clear()

    def _split(self, network: nn.Module, strip: "_Strip") -> None:
        num_halvings = sum(
            isinstance(layer, WanResample) and layer.mode.startswith("down") for layer in network.modules()
        )
        self._before(network, lambda x: strip.enter(x, columns_per_unit=2**num_halvings))
        self._hooks.append(network.register_forward_hook(lambda _module, _args, out: strip.gather(out)))
        for name, layer in list(network.named_modules()):
            if isinstance(layer, WanAttentionBlock):
                self._replaced.append((network, name, layer))
                network.set_submodule(name, _SplitQueryAttention(layer, strip))
            elif isinstance(layer, WanResidualBlock):
                self._before(layer, lambda x: strip.before_convolutions(x, reach=RESIDUAL_REACH))
            elif isinstance(layer, WanResample) and layer.mode != "none":
                self._before(layer, strip.before_halving if layer.mode.startswith("down") else strip.before_doubling)
            elif name in ("conv_in", "norm_out"):  # not conv_out: its feature cache is taken between norm_out and it
                self._before(layer, lambda x: strip.before_convolutions(x, reach=1))

    def _before(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Let ``change`` rewrite the first argument of every call of ``layer``."""
        hook = layer.register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))
        self._hooks.append(hook)


def parallelize_vae(vae: WanVae, group: dist.ProcessGroup, clock: CollectiveClock | None = None) -> SpatialParallelVae:
    """Split every later ``encode`` and ``decode`` of ``vae`` over the ranks of ``group``; ``remove()`` ends that.

    The longer side of the picture is cut into strips of whole latent columns, as even as possible; the width need
    not divide. A strip has at least two latent columns. If the picture is too narrow for all ranks, the surplus ranks
    repeat the last strip and receive the result like all others. ``clock`` counts the time in collectives.

    Raises ``LayoutError`` if the networks hold a layer that this module has no rule for.
    """
    return SpatialParallelVae(vae.autoencoder, group, clock)


class _Ghosts(NamedTuple):
    """Columns of the neighbours that a strip carries on its left and right (above and below where rows are split)."""

    left: int
    right: int


class _Strip:
    """This rank's part of the picture while one chunk of frames passes through a network.

    ``_exact`` counts the ghosts on either side, from the own columns outwards, that still hold what their owner holds.
    It follows from the layers passed alone, so all ranks agree on when to exchange.
    """

    def __init__(self, group: dist.ProcessGroup, clock: CollectiveClock | None) -> None:
        self._group = group
        self._clock = clock
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self._dim = -1
        self._units: list[int] = []  # latent columns of every part; surplus ranks have none of their own
        self._columns_per_unit = 1
        self._ghosts = _Ghosts(0, 0)
        self._exact = 0

    # ---- for the layers

    def enter(self, full_BCTHW: Tensor, columns_per_unit: int) -> Tensor:
        """Cut this rank's strip out of a network's input; ``columns_per_unit`` input columns make one latent column."""
        height, width = full_BCTHW.shape[-2:]
        self._dim = -1 if width >= height else -2
        num_units, rest = divmod(max(height, width), columns_per_unit)
        if rest:
            raise ValueError(f"a picture of {height} x {width} cannot be split in units of {columns_per_unit} columns")
        num_parts = max(1, min(self._world_size, num_units // MIN_OWN_COLUMNS))
        self._units = [num_units // num_parts + (part < num_units % num_parts) for part in range(num_parts)]
        self._columns_per_unit = columns_per_unit
        return self.cut(full_BCTHW, ghosts=ENTRY_GHOSTS)

    def cut(self, full: Tensor, ghosts: int) -> Tensor:
        """This rank's columns of a tensor that is whole on every rank, with ``ghosts`` on either side. A view."""
        before = sum(self._units[: self._part]) * self._columns_per_unit
        after = full.shape[self._dim] - before - self._num_own
        self._ghosts = _Ghosts(min(ghosts, before), min(ghosts, after))
        self._exact = ghosts
        return full.narrow(self._dim, before - self._ghosts.left, self._num_own + sum(self._ghosts))

    def gather(self, x: Tensor) -> Tensor:
        """The whole tensor, from all ranks' own columns. Strips of different width travel padded to the widest."""
        widths = [units * self._columns_per_unit for units in self._units]
        padding = max(widths) - self._num_own
        own = F.pad(self._own(x), (0, padding) if self._dim == -1 else (0, 0, 0, padding)).contiguous()
        parts = [torch.empty_like(own) for _ in range(self._world_size)]
        with timed(self._clock):
            dist.all_gather(parts, own, group=self._group)
        return torch.cat(
            [part.narrow(self._dim, 0, width) for part, width in zip(parts, widths, strict=False)], self._dim
        )

    def before_convolutions(self, x: Tensor, reach: int) -> Tensor:
        """Let a layer that reads ``reach`` columns on either side compute this rank's own columns exactly."""
        if self._exact < reach:
            x = self._with_ghosts(x, _Ghosts(reach, reach), exchange=True)
            self._exact = reach
        self._exact -= reach
        return x

    def before_halving(self, x: Tensor) -> Tensor:
        """Prepare ``x`` for columns 2i, 2i+1 and 2i+2 to become column i: one ghost in on the right, none out."""
        x = self._with_ghosts(x, _Ghosts(0, 1), exchange=self._exact < 1)
        self._columns_per_unit //= 2
        self._ghosts = _Ghosts(0, 0)
        self._exact = 0
        return x

    def before_doubling(self, x: Tensor) -> Tensor:
        """Prepare ``x`` for each column to become two, then a convolution: one ghost in, two out, one of them exact."""
        x = self._with_ghosts(x, _Ghosts(1, 1), exchange=self._exact < 1)
        self._columns_per_unit *= 2
        self._ghosts = _Ghosts(2 * self._ghosts.left, 2 * self._ghosts.right)
        self._exact = 1
        return x

    # ---- where this rank is

    @property
    def _part(self) -> int:
        """The part this rank computes. Surplus ranks repeat the last one without neighbours; it is not used."""
        return min(self._rank, len(self._units) - 1)

    @property
    def _num_own(self) -> int:
        return self._units[self._part] * self._columns_per_unit

    @property
    def _has_left(self) -> bool:
        return 0 < self._rank < len(self._units)

    @property
    def _has_right(self) -> bool:
        return self._rank < len(self._units) - 1

    def _own(self, x: Tensor) -> Tensor:
        return x.narrow(self._dim, self._ghosts.left, self._num_own)

    # ---- data movement

    def _with_ghosts(self, x: Tensor, wanted: _Ghosts, *, exchange: bool) -> Tensor:
        """``x`` with the ``wanted`` ghosts (none at the picture's border), new from the neighbours on ``exchange``."""
        own, present = self._own(x), self._ghosts
        self._ghosts = _Ghosts(wanted.left * self._has_left, wanted.right * self._has_right)
        received = self._exchange(own, wanted) if exchange else None
        spare = _Ghosts(present.left - self._ghosts.left, present.right - self._ghosts.right)
        if received and min(spare) < 0:
            return torch.cat([received[0], own, received[1]], self._dim)
        x = x.narrow(self._dim, spare.left, self._num_own + sum(self._ghosts))
        if received:  # written in place: the layer before has just created x, and its own columns need no copy
            x.narrow(self._dim, 0, self._ghosts.left).copy_(received[0])
            x.narrow(self._dim, self._ghosts.left + self._num_own, self._ghosts.right).copy_(received[1])
        return x

    def _exchange(self, own: Tensor, wanted: _Ghosts) -> tuple[Tensor, Tensor]:
        """Send both neighbours their ghosts and receive own ones, in one collective; none without a neighbour."""
        num_to_left, num_to_right = wanted.right * self._has_left, wanted.left * self._has_right
        to_left = own.narrow(self._dim, 0, num_to_left)
        to_right = own.narrow(self._dim, self._num_own - num_to_right, num_to_right)
        outbox = torch.cat([to_left.flatten(), to_right.flatten()])
        column = own.numel() // self._num_own
        incoming = [self._ghosts.left * column, self._ghosts.right * column]
        inbox = outbox.new_empty(sum(incoming))
        splits = self._by_rank(*incoming), self._by_rank(to_left.numel(), to_right.numel())
        with timed(self._clock):
            dist.all_to_all_single(inbox, outbox, *splits, group=self._group)
        shape = list(own.shape)
        shape[self._dim] = -1
        from_left, from_right = inbox.split(incoming)
        return from_left.view(shape), from_right.view(shape)

    def _by_rank(self, left: int, right: int) -> list[int]:
        """Message sizes for all ranks of the group: these two for the neighbours, nothing for the others."""
        sizes = [0] * self._world_size
        if self._has_left:
            sizes[self._rank - 1] = left
        if self._has_right:
            sizes[self._rank + 1] = right
        return sizes


class _SplitQueryAttention(nn.Module):
    """The attention of a ``WanAttentionBlock``: keys and values of the whole frame, queries of this rank's strip.

    It replaces the block and keeps its layers under their names, so the state dict does not change. With hooks alone
    every rank would compute the queries of the whole frame, the one cost that grows with the square of its size.
    """

    def __init__(self, block: WanAttentionBlock, strip: _Strip) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = block.norm, block.to_qkv, block.proj
        self._strip = strip

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Attend within each frame. The strip comes out with ghosts for the layers that follow."""
        full = self._strip.gather(x_BCTHW)
        frames = full.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(frames)).chunk(3, dim=1)
        q = self._strip.cut(q, ghosts=ATTENTION_GHOSTS)
        attended = F.scaled_dot_product_attention(_tokens(q), _tokens(k), _tokens(v))
        attended = self.proj(attended.squeeze(1).transpose(1, 2).unflatten(2, q.shape[-2:]))
        x_BCTHW = self._strip.cut(full, ghosts=ATTENTION_GHOSTS)
        return x_BCTHW + attended.unflatten(0, (full.shape[0], -1)).transpose(1, 2)


def _tokens(frames_BCHW: Tensor) -> Tensor:
    """One head's tokens ``[B, 1, N, C]`` of frames ``[B, C, H, W]``."""
    return frames_BCHW.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


def _refuse_unknown_layers(network: nn.Module) -> None:
    """Raise ``LayoutError`` at the first layer for whose reach sideways ``_Strip`` has no rule."""
    strides = {network.conv_in: 1, network.conv_out: 1}
    for layer in network.modules():
        if isinstance(layer, WanResidualBlock):
            strides |= {layer.conv1: 1, layer.conv2: 1}
        elif isinstance(layer, WanResample) and layer.mode != "none":
            strides[layer.resample[1]] = 2 if layer.mode.startswith("down") else 1
    for name, layer in network.named_modules():
        known = isinstance(layer, _KNOWN_LAYERS)
        if isinstance(layer, WanCausalConv3d | nn.Conv2d):
            looks = (layer.kernel_size[-2:], layer.stride[-2:], layer.dilation[-2:])
            stride = strides.get(layer)
            known = looks == ((1, 1), (1, 1), (1, 1)) or looks == ((3, 3), (stride, stride), (1, 1))
        if not known:
            raise LayoutError(
                f"the VAE cannot be split over ranks: it is unknown how many columns {type(network).__name__}.{name} "
                f"({layer}) reads on either side. Use the layers of the Wan2.1 VAE, or run this VAE on a single rank"
            )
