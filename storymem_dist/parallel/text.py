"""Prompts encoded once: spread over the ranks of a job or a replica, shared through the prompt cache.

What is cached already is not encoded again, a rank with nothing to encode loads no encoder, and the encoder is released
before this returns, so that its memory is free for the experts. Works on one process without a process group. Knows
nothing about stories or guidance: a negative prompt is a prompt like any other.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.parallel.leader import all_or_none

T = TypeVar("T")

MIN_PROMPTS_PER_RANK = 8
"""Reading the 11 GB encoder costs a rank more than encoding this many prompts on a GPU."""

PATIENCE = timedelta(hours=1)
"""How long ranks wait for a rank that still loads or encodes."""


class Encoder(Protocol):
    """What ``encode_prompts`` needs of ``models.wan.text_encoder.TextEncoder``."""

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding ``[num_tokens, text_dim]`` per text, independent of the other texts."""


class WorldRank(Protocol):
    """What ``encode_prompts`` needs of a ``Session``."""

    @property
    def rank(self) -> int:
        """This rank among all that were started."""

    @property
    def world_size(self) -> int:
        """Number of ranks that were started together."""


def encode_prompts(
    prompts: Iterable[str],
    cache: PromptCache,
    load_encoder: Callable[[], Encoder],
    *,
    place: WorldRank,
    group: dist.ProcessGroup | None = None,
    min_prompts_per_rank: int = MIN_PROMPTS_PER_RANK,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Encode every prompt that has no entry in ``cache``.

    Collective over the ranks of ``place``, which pass equal prompts and a cache on one file system; ``group`` is their
    gloo group (without it, ``place`` must be all started ranks). An entry that another process writes meanwhile is not
    encoded again. ``load_encoder`` is called on ranks that have prompts to encode: one for every
    ``min_prompts_per_rank`` missing prompts, rounded up. ``on_progress(done, total)`` counts missing prompts. If a rank
    fails, every rank raises its exception.
    """
    first_of_path: dict[Path, str] = {}
    for prompt in prompts:
        first_of_path.setdefault(cache.path(prompt), prompt)
    with nullcontext(group) if group is not None else all_ranks(place.world_size) as group:
        missing = _missing_anywhere(list(first_of_path.values()), cache, place, group)
        num_encoding = min(place.world_size, -(-len(missing) // min_prompts_per_rank))
        encoder: Encoder | None = None

        def encode_mine(batch: list[str]) -> None:
            nonlocal encoder
            if place.rank < len(batch) and cache.find(batch[place.rank]) is None:
                encoder = load_encoder() if encoder is None else encoder
                cache.store(batch[place.rank], encoder.encode([batch[place.rank]])[0])

        for start in range(0, len(missing), max(1, num_encoding)):
            batch = missing[start : start + num_encoding]
            _together(group, partial(encode_mine, batch))
            on_progress(start + len(batch), len(missing))
        if encoder is not None:
            encoder = None
            gc.collect()  # cyclic references would keep the weights until a later collection
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # cached blocks of the encoder would fragment the experts' memory


def _missing_anywhere(
    unique: list[str], cache: PromptCache, place: WorldRank, group: dist.ProcessGroup | None
) -> list[str]:
    """The prompts without an entry, the same on all ranks even while others write: one rank looks up each prompt."""
    looked_up = unique[place.rank :: place.world_size]
    missing = _together(group, lambda: [prompt for prompt in looked_up if cache.find(prompt) is None])
    if group is None:
        return missing
    lists: list[list[str]] = [[] for _ in range(place.world_size)]
    dist.all_gather_object(lists, missing, group=group)
    anywhere = {prompt for part in lists for prompt in part}
    return [prompt for prompt in unique if prompt in anywhere]


def _together(group: dist.ProcessGroup | None, fn: Callable[[], T]) -> T:
    return fn() if group is None else all_or_none(group, fn)


@contextmanager
def all_ranks(world_size: int) -> Iterator[dist.ProcessGroup | None]:
    """A gloo group of all started ranks for small messages, None for one rank. Collective over them.

    It waits long, because one rank may read a large encoder from a slow disk; a peer that dies is noticed immediately.
    """
    if world_size == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
