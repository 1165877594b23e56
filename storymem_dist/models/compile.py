"""Compiles a transformer block by block, so that one compilation serves every block, every expert and every length.

Eager execution stays the reference; compilation changes only the order of the arithmetic. Knows nothing about ranks:
parallel code replaces attention before compilation and shards weights after it.
"""

from storymem_dist.models.wan.dit import WanDiT


def compile_blocks(dit: WanDiT) -> None:
    """Compile each block of ``dit`` in place, on its first forward; parameter names do not change.

    All blocks of both experts share one compiled graph (their weights are its inputs). Sizes are symbolic from the
    start: the number of tokens depends on the number of memory frames and so changes from shot to shot. A graph for
    each number would cost a compilation (half a minute or more) in the middle of a story. The graph fuses passes over
    memory that eager code runs one by one: norms with modulation, query/key norms with rotation, gated residuals,
    activations.
    """
    for block in dit.blocks:
        block.compile(dynamic=True)
