"""Compiles a transformer block by block, so that one compilation serves every block, every expert and every length.

Eager execution stays the oracle; nothing but the arithmetic's order changes. Knows nothing about ranks: parallel code
rewires attention before and shards weights after.
"""

from storymem_dist.models.wan.dit import WanDiT


def compile_blocks(dit: WanDiT) -> None:
    """Compile each block of ``dit`` in place, on its first forward; parameter names do not change.

    All blocks share one compiled graph (their weights are its inputs), and so do both experts of a pair. Sizes are
    symbolic from the start: the number of tokens changes from shot to shot with the number of memory frames, and a
    graph for each would cost a compilation (half a minute or more) in the middle of a story. Inside a graph the
    passes over memory are fused that eager makes one by one: norms with modulation, query/key norms with rotation,
    gated residuals, activations.
    """
    for block in dit.blocks:
        block.compile(dynamic=True)
