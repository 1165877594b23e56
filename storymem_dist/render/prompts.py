"""Provides prompt embeddings from the run folder's cache; the ranks encode missing ones together.

Knows nothing of stories or experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.parallel.text import Encoder, WorldRank, encode_prompts


class CachedPrompts:
    """A ``PromptSource`` over the prompt cache of a run folder."""

    def __init__(self, cache: PromptCache, load_encoder: Callable[[], Encoder]) -> None:
        self._cache = cache
        self._load_encoder = load_encoder

    def ensure_together(self, prompts: Sequence[str], place: WorldRank) -> None:
        """Encode the uncached prompts of a job, spread over its ranks. Collective over all ranks of the job."""
        encode_prompts(prompts, self._cache, self._load_encoder, place=place)

    def embeds(self, prompt: str) -> Tensor:
        """See ``PromptSource.embeds``; encodes a prompt again whose entry was lost."""
        embeds = self._cache.find(prompt)
        if embeds is None:
            encode_prompts([prompt], self._cache, self._load_encoder, place=_Alone())
            embeds = self._cache.find(prompt)
            assert embeds is not None, "an entry that was just written is there"
        return embeds


@dataclass(frozen=True)
class _Alone:
    """The ``WorldRank`` of a process that encodes alone."""

    rank: int = 0
    world_size: int = 1
