"""Text cache: keys and values of the text in every block's cross-attention, computed once per prompt (exact, opt-in).

They depend only on the prompt and the weights, so all steps of a shot share them. Saves 0.13% of A14B's FLOPs at
832x480 on one rank, and a larger part when ranks share the tokens (every rank projects the whole text). Takes 0.42 GB
per guidance branch in bf16. Each expert has its own cache. Knows nothing about ranks or prompts.
"""

from torch import Tensor, nn

from storymem_dist.diffusion.branch import ByBranch
from storymem_dist.models.wan.dit import TextKeys, WanDiT


class TextCache(ByBranch):
    """Keys and values of the running shot's texts in one expert's blocks, by guidance branch."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[str, nn.Module], TextKeys] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._kept.values())

    def forget(self) -> None:
        """Clear the cache: the next shot has other texts."""
        self._kept.clear()

    def run_block(self, block: nn.Module, tokens_BLD: Tensor, *shared: Tensor) -> Tensor:
        """As ``dit.run_block``; from the second call on with the kept keys and values instead of the text."""
        *tables, context_BSD = shared
        place = (self.branch, block)
        if place in self._kept:
            tokens: Tensor = block(tokens_BLD, *tables, self._kept[place])
        else:
            tokens, self._kept[place] = block(tokens_BLD, *tables, context_BSD, keep_text=True)
        return tokens


def attach_text_cache(dit: WanDiT) -> TextCache:
    """Give ``dit`` a text cache and return it. Call it after ``attach_step_cache``, which makes a new stack."""
    cache = TextCache()
    dit.blocks.run_block = cache.run_block
    return cache


def text_cache_of(module: nn.Module) -> TextCache | None:
    """The cache that ``attach_text_cache`` put on an expert, if any."""
    cache = getattr(getattr(getattr(module, "blocks", None), "run_block", None), "__self__", None)
    return cache if isinstance(cache, TextCache) else None
