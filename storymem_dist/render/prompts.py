"""Prompt embeddings for the shots of a job: from the run folder's cache, made by the ranks together where missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.parallel.text import Encoder, encode_prompts
from storymem_dist.parallel.text import Place as TextPlace


class CachedPrompts:
    """A ``PromptSource`` over the prompt cache of a run folder."""

    def __init__(self, cache: PromptCache, load_encoder: Callable[[], Encoder]) -> None:
        self._cache = cache
        self._load_encoder = load_encoder

    def ensure_together(self, prompts: Sequence[str], place: TextPlace) -> None:
        """Encode what is not cached of all prompts of a job, spread over its ranks. Collective over all of them."""
        encode_prompts(prompts, self._cache, self._load_encoder, place=place)

    def embeds(self, prompt: str) -> Tensor:
        """See ``PromptSource.embeds``; an entry that was lost meanwhile is made again."""
        embeds = self._cache.find(prompt)
        if embeds is None:
            encode_prompts([prompt], self._cache, self._load_encoder, place=_Alone())
            embeds = self._cache.find(prompt)
            assert embeds is not None, "an entry that was just written is there"
        return embeds


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    world_size: int = 1
