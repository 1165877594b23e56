"""Step cache: skips most blocks of a forward when the first block's result has changed little (lossy, opt-in).

Method ("first-block cache"): compare the residual that the first block adds to the tokens with its residual in the last
step that was computed in full. If the relative change is small, add the other blocks' residual of that step again
instead of computing it. The reference is always a full step, so small changes cannot accumulate unnoticed.

Each expert has its own cache, with one entry per guidance pass. The conditional pass decides for both passes of a step.
Changes are summed over all ranks of the step (``add_over_ranks``), so every rank decides alike in every layout. Only
reading the decision makes the host wait for the device, and only while a threshold is set. Knows nothing about ranks,
prompts or solvers.

Legend: B batch, L tokens (of this rank), D width, P rotary pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storymem_dist.diffusion.branch import COND, ByBranch
from storymem_dist.models.wan.dit import BlockStack, WanDiT

AddOverRanks = Callable[[Tensor], Tensor]
"""Sums a small tensor over all ranks that run the same step together; every rank gets the sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """Residuals of one pass of the last full step: of the first block, and of all other blocks together."""

    first_BLD: Tensor
    rest_BLD: Tensor


class StepCache(ByBranch):
    """One expert's residuals of its last full step, and the decision whether a step reuses them."""

    def __init__(self, *, dtype: torch.dtype, add_over_ranks: AddOverRanks = lambda sums: sums) -> None:
        super().__init__()
        self._dtype = dtype
        self._add_over_ranks = add_over_ranks
        self._threshold = 0.0
        self._entries: dict[str, _Entry] = {}
        self._decision: bool | None = None

    @property
    def enabled(self) -> bool:
        """Whether steps may be reused at all."""
        return self._threshold > 0.0

    @property
    def reused(self) -> bool:
        """Whether the latest step reuses an earlier one (False until its first pass has decided)."""
        return bool(self._decision)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held: per guidance branch two tensors of this rank's tokens in the expert's dtype."""
        return sum(entry.first_BLD.nbytes + entry.rest_BLD.nbytes for entry in self._entries.values())

    def sum_with(self, add_over_ranks: AddOverRanks) -> AddOverRanks:
        """Sum over other ranks from here on; return what summed before. Between two shots only."""
        before, self._add_over_ranks = self._add_over_ranks, add_over_ranks
        return before

    def begin_shot(self, threshold: float) -> None:
        """Clear the cache for a new shot; reuse steps whose relative change is below ``threshold`` (0: never)."""
        self._threshold = threshold
        self.forget()

    def begin_step(self) -> None:
        """Begin a step; its first pass will decide."""
        self._decision = None

    def forget(self) -> None:
        """Clear the cache; the next step is computed in full."""
        self._entries.clear()
        self._decision = None

    def recall(self, first_BLD: Tensor) -> Tensor | None:
        """The stored residual ``[B, L, D]`` of the other blocks if this step reuses it, else None.

        ``first_BLD`` is the first block's residual in this pass. The step's first pass decides. Ranks that run the
        unconditional pass at the same time take part in the sum with zeros.
        """
        entry = self._entries.get(self.branch)
        if entry is None:
            self._decision = False
        elif self._decision is None:
            sums = torch.zeros(2, device=first_BLD.device)
            if self.branch == COND:
                change = (first_BLD - entry.first_BLD).abs().sum()
                sums = torch.stack([change, entry.first_BLD.abs().sum(dtype=torch.float32)])
            change_sum, norm = self._add_over_ranks(sums).tolist()
            self._decision = change_sum < self._threshold * norm
        return entry.rest_BLD if entry is not None and self._decision else None

    def renew(self, first_BLD: Tensor) -> Tensor:
        """Drop this branch's entry before a full step; return ``first_BLD`` in the dtype in which it is stored."""
        self._entries.pop(self.branch, None)
        return first_BLD.to(self._dtype)

    def remember(self, first_BLD: Tensor, rest_BLD: Tensor) -> None:
        """Store the residuals of a pass of a full step, in the expert's matmul dtype."""
        self._entries[self.branch] = _Entry(first_BLD=first_BLD.to(self._dtype), rest_BLD=rest_BLD.to(self._dtype))


class CachedBlockStack(BlockStack):
    """The blocks of an expert behind a step cache. Parameter names stay ``blocks.N.*``."""

    def __init__(self, blocks: BlockStack, cache: StepCache) -> None:
        super().__init__(blocks)
        self.cache = cache

    def forward(
        self, tokens_BLD: Tensor, rope_cos_LP: Tensor, rope_sin_LP: Tensor, modulation_B6D: Tensor, context_BSD: Tensor
    ) -> Tensor:
        """See ``BlockStack.forward``; with the cache disabled, exactly that."""
        shared = (rope_cos_LP, rope_sin_LP, modulation_B6D, context_BSD)
        if not self.cache.enabled:
            return super().forward(tokens_BLD, *shared)
        first_block, *other_blocks = self
        after_first_BLD = self.run([first_block], tokens_BLD, *shared)
        first_BLD = after_first_BLD - tokens_BLD
        rest_BLD = self.cache.recall(first_BLD)
        if rest_BLD is not None:
            return after_first_BLD + rest_BLD
        first_BLD = self.cache.renew(first_BLD)  # nothing else of the cache stays in memory while the other blocks run
        out_BLD = self.run(other_blocks, after_first_BLD, *shared)
        self.cache.remember(first_BLD, out_BLD - after_first_BLD)
        return out_BLD


def attach_step_cache(dit: WanDiT, add_over_ranks: AddOverRanks = lambda sums: sums) -> StepCache:
    """Put a step cache, disabled until a shot sets a threshold, around the blocks of ``dit`` and return it.

    Call it before hooks are put on the block stack (so before ``parallelize``): hooks would stay on the old stack, and
    a stack with hooks raises ``RuntimeError``. ``add_over_ranks`` must span all ranks that run a step together, those
    of both guidance branches included.
    """
    if dit.blocks._forward_hooks or dit.blocks._forward_pre_hooks:
        raise RuntimeError("a step cache must be attached before hooks are put on the block stack")
    cache = StepCache(dtype=dit.dtype, add_over_ranks=add_over_ranks)
    dit.blocks = CachedBlockStack(dit.blocks, cache)
    return cache


def step_cache_of(module: nn.Module) -> StepCache | None:
    """The cache that ``attach_step_cache`` put on an expert, if any."""
    blocks = getattr(module, "blocks", None)
    return blocks.cache if isinstance(blocks, CachedBlockStack) else None
