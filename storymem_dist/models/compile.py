"""Compiles a transformer block by block, so that one compilation serves every block, every expert and every length.

Eager execution stays the reference; compilation changes only the order of the arithmetic. Knows nothing about ranks:
parallel code replaces attention before compilation and shards weights after it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from storymem_dist.models.wan.dit import WanDiT

_MOST_GRAPHS = 32
"""Graphs of a block before torch would run it uncompiled. A shot's LoRAs need one more for each form of changes
(``adapters.set_adapters``), each with the text or with its kept keys and values; torch's own limit is 8."""


LATE_WAITS = {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": ["sink_waits"]}
"""Options of torch.compile with which a message is waited for just before it is used. Without them, Inductor saves the
memory of messages under way: it waits for each at once, and nothing runs meanwhile."""


def compile_blocks(dit: WanDiT, *, has_messages: bool = False) -> None:
    """Compile each block of ``dit`` in place, on its first forward; parameter names do not change.

    All blocks of both experts share one compiled graph (their weights are its inputs). Sizes are symbolic from the
    start: the number of tokens depends on the number of memory frames and so changes from shot to shot. A graph for
    each number would cost a compilation (half a minute or more) in the middle of a story. The graph fuses passes over
    memory that eager code runs one by one: norms with modulation, query/key norms with rotation, gated residuals,
    activations.

    In this process, sizes that are equal by chance are not taken for one size: a graph must serve all numbers of
    tokens, also where the first one equals the length of the text. ``has_messages``: ranks exchange tensors inside the
    blocks, while others are computed.
    """
    from torch._dynamo import config as limits  # here, since it takes a second to import

    torch.fx.experimental._config.use_duck_shape = False
    limits.recompile_limit = max(limits.recompile_limit, _MOST_GRAPHS)
    for block in dit.blocks:
        block.compile(dynamic=True, options=LATE_WAITS if has_messages else None)


def is_compiled(block: nn.Module) -> bool:
    """Whether ``compile_blocks`` has made ``block`` one that is compiled."""
    return getattr(block, "_compiled_call_impl", None) is not None


@contextmanager
def uncompiled(dit: WanDiT) -> Iterator[None]:
    """Run the blocks of ``dit`` in eager mode while the body runs; what was compiled is used again afterwards."""
    compiled = [(block, block._compiled_call_impl) for block in dit.blocks if is_compiled(block)]
    for block, _ in compiled:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in compiled:
            block._compiled_call_impl = call


@contextmanager
def compilations_marked(stage: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """While the body runs, open ``stage("compile")`` whenever the compiler works; eager code never does."""
    dynamo = sys.modules.get("torch._dynamo")  # imported where blocks are compiled
    if dynamo is None:
        yield
        return
    from torch._dynamo.callback import callback_handler

    under_way = ExitStack()

    def begin(*_: object) -> None:
        under_way.enter_context(stage("compile"))

    def end(*_: object) -> None:
        under_way.close()

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)
