"""The device keeps as many blocks of the expert that computes as fit; the others arrive ahead of their use.

A ``BlockStream`` is the general form of ``host_swap``: one expert at a time is on the device, whole or in part. Where
it is in part, some of its blocks are *streamed*: each has device memory only while it, or a block shortly before it,
computes. They are spread evenly, so that a copy has the time of several blocks. Before a block computes, the memory of
the streamed blocks behind it is freed, the next ones get memory, and their copies are queued behind that point; the
block itself waits for its own copy only. So at most ``num_ahead + 1`` streamed blocks are on the device.

Values and kernels are those of resident weights, so results have the same bits. Knows nothing about prompts or ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from storymem_dist.diffusion.host_swap import HostMemory, HostSwap, HostWeights
from storymem_dist.models.wan.dit import WanDiT

BlocksThatFit = Callable[[WanDiT, Tensor], int]
"""Number of whole blocks for which the device has room, given an expert and the tokens ``[B, L, D]`` of this rank.

Asked once for each expert and shot, when its layers before the blocks have run.
"""


class StreamedWeights(HostWeights):
    """``HostWeights`` of an expert of which the device may hold a part of the blocks. ``num_ahead``: see the module."""

    def __init__(self, module: WanDiT, memory: HostMemory, device: torch.device, *, num_ahead: int = 1) -> None:
        super().__init__(module, memory, device)
        self._expert = module
        self._num_ahead = num_ahead
        self._blocks = list(module.blocks)
        self._index = {block: index for index, block in enumerate(self._blocks)}
        self._here: set[int] = set()
        self._streamed: set[int] = set()
        self._that_fit: BlocksThatFit | None = None
        module.blocks.before_block = self._before_block
        module.blocks.register_forward_pre_hook(self._before_blocks)

    def enter_in_part(self, that_fit: BlocksThatFit) -> None:
        """Queue the copies of all weights outside the blocks and wait for them; each block follows ahead of its use."""
        self._that_fit = that_fit
        self._streamed = set(range(len(self._blocks)))
        self._bring([self._module])
        self._wait_for(self._module)

    def enter_device(self) -> None:
        """See ``HostWeights``: the whole expert."""
        self._that_fit, self._streamed, self._here = None, set(), set(range(len(self._blocks)))
        super().enter_device()

    def leave_device(self) -> None:
        """See ``HostWeights``."""
        super().leave_device()
        self._here.clear()

    def _before_blocks(self, _stack: nn.Module, tokens_and_more: tuple[Tensor, ...]) -> None:
        """Decide at an expert's first forward which blocks are streamed."""
        if self._that_fit is not None:
            fit, self._that_fit = self._that_fit(self._expert, tokens_and_more[0]), None
            self._streamed = streamed_blocks(len(self._blocks), fit, num_ahead=self._num_ahead)

    def _before_block(self, block: nn.Module) -> None:
        index = self._index[block]
        wanted = {index, *self._next_after(index)}
        for behind in sorted((self._here & self._streamed) - wanted):
            self._drop(self._blocks[behind])
            self._here.discard(behind)
        coming = [self._blocks[one] for one in self._in_order(index) if one in wanted and one not in self._here]
        if coming:
            self._bring(coming)
            self._here |= wanted
        self._wait_for(block)

    def _next_after(self, index: int) -> Iterator[int]:
        """The ``num_ahead`` blocks after ``index`` that must be copied; the first blocks follow the last one."""
        _, *later = self._in_order(index)
        missing = [one for one in later if one in self._streamed or one not in self._here]
        yield from missing[: self._num_ahead]

    def _in_order(self, index: int) -> Iterator[int]:
        return chain(range(index, len(self._blocks)), range(index))


class BlockStream(HostSwap[StreamedWeights]):
    """A ``HostSwap`` that may hold a part of the active expert only.

    ``that_fit`` says how much of it; None: all of it. After ``idle`` no block stays on the device longer than it is
    needed, until the shot that follows has ended.
    """

    def __init__(self, weights: Mapping[str, StreamedWeights], that_fit: BlocksThatFit | None) -> None:
        super().__init__(weights)
        self._that_fit = that_fit
        self._spare = False

    def end_shot(self) -> None:
        """See ``HostSwap``; the next shot may use all of the device's room again."""
        super().end_shot()
        self._spare = False

    def idle(self) -> None:
        """Free the device, and let the next shot use as little of it as can be."""
        super().idle()
        self._spare = True

    def _enter(self, weights: StreamedWeights) -> None:
        that_fit = no_block if self._spare else self._that_fit
        if that_fit is None:
            weights.enter_device()
        else:
            weights.enter_in_part(that_fit)


def no_block(_expert: WanDiT, _tokens_BLD: Tensor) -> int:
    """The ``BlocksThatFit`` of a device without room to spare."""
    return 0


def streamed_blocks(num_blocks: int, num_fit: int, *, num_ahead: int) -> set[int]:
    """Which of ``num_blocks`` blocks are streamed where ``num_fit`` fit: none, or as few as can be, spread evenly."""
    num_kept = num_fit - num_ahead - 1
    if num_fit >= num_blocks:
        return set()
    num_streamed = num_blocks - max(0, num_kept)
    return {place * num_blocks // num_streamed for place in range(num_streamed)}
