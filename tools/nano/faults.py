"""Faults of a renderer that the judge should see in nano's memory shots, each as a context that has the fault."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import MASK_CHANNELS, ConditionBuilder
from storymem_dist.diffusion.latent_grid import LatentGrid


@dataclass(frozen=True, kw_only=True)
class Fault:
    """``shown_instead`` is the argument of ``Exam.remembered_drawings``; the rest of the fault is in ``context``."""

    shown_instead: int = 0
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def _without_mask(condition: Tensor, num_memory: int) -> Tensor:
    condition[:MASK_CHANNELS, :num_memory] = 0
    return condition


def _mask_after_latents(condition: Tensor, _: int) -> Tensor:
    return torch.cat([condition[MASK_CHANNELS:], condition[:MASK_CHANNELS]])


def _with_condition(change: Callable[[Tensor, int], Tensor]) -> Fault:
    @contextmanager
    def changed() -> Iterator[None]:
        build = ConditionBuilder.build

        def wrong(builder: ConditionBuilder, mode: str, grid: LatentGrid, images: Any, **given: Any) -> Tensor:
            return change(build(builder, mode, grid, images, **given), grid.num_memory)

        with patch.object(ConditionBuilder, "build", wrong):
            yield

    return Fault(context=changed)


def _run_on(grid: LatentGrid) -> Tensor:
    return torch.arange(grid.num_latents, dtype=torch.int64)


FAULTS: Mapping[str, Fault] = {
    "another character's memory": Fault(shown_instead=1),
    "the mask is dropped": _with_condition(_without_mask),
    "mask and latents are swapped": _with_condition(_mask_after_latents),
    "positions run on": Fault(context=lambda: patch.object(LatentGrid, "temporal_positions", _run_on)),
}
"""The first three are seen in the colours, the last one in the motions: positions 0, 1, 2, ... over memory and clip."""

SEEN_IN = {name: "motion" if name == "positions run on" else "colour" for name in FAULTS}
"""The column that shows a fault."""
