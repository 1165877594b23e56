"""Decides the attention kernel of a job: one for all ranks of a replica, on the shape that its longest shots have.

Knows layouts and sizes; ``models.attention_choice`` times kernels.
"""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from storymem_dist.errors import ConfigError
from storymem_dist.models.attention import describe_backend, start_backend, stop_backend
from storymem_dist.models.attention_choice import CANDIDATES, AttentionForm, Choice, Clock, choose_kernel, seconds_of
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.session import Session
from storymem_dist.weights.bundle import cache_folder
from storymem_dist.weights.settings import ModelSettings


def attention_form(config: DiTConfig, layout: Layout, dtype: torch.dtype, num_tokens: int) -> AttentionForm:
    """One call of self-attention on one rank of ``layout``, in a forward of ``num_tokens`` tokens.

    On a ring, the call for one of its parts, with the log-sum-exp.
    """
    per_rank = -(-num_tokens // layout.sequence)
    return AttentionForm(
        num_tokens=num_tokens if layout.ring == 1 else per_rank * layout.ulysses,
        num_heads=config.num_heads // layout.ulysses,
        head_dim=config.head_dim,
        dtype=dtype,
        strided=layout.ulysses > 1,
        with_lse=layout.ring > 1,
    )


def decide_attention(
    model: ModelSettings, session: Session, config: DiTConfig, *, num_tokens: int, clock: Clock = seconds_of
) -> tuple[ModelSettings, str]:
    """Return ``model`` with ``attention=auto`` replaced by the fastest kernel, and the kernel in words, for reports.

    Collective over the replica: its leader times, and every rank tries what it chose. A kernel that fails on any rank
    is left out and the leader chooses again. ``auto`` stays where there is nothing to choose: torch then decides.
    Another setting is returned as it is.
    """
    dtype = getattr(torch, model.dtype)
    here = {"device": session.device, "dtype": dtype, "head_dim": config.head_dim}
    if model.attention != "auto":
        return model, model.attention
    form = attention_form(config, session.layout, dtype, num_tokens)
    kernels = list(CANDIDATES)

    def choose() -> Choice:
        return choose_kernel(form, session.device, cache=_cache(), kernels=kernels, clock=clock)

    while True:
        choice = session.leader_decides(choose)
        try:
            session.all_or_none(partial(start_backend, choice.kernel, **here))
        except ConfigError:
            stop_backend(choice.kernel)
            if choice.kernel not in kernels:
                raise
            kernels.remove(choice.kernel)
        else:
            break
    words = str(choice) if choice.kernel != "auto" else describe_backend("auto", **here)
    return replace(model, attention=choice.kernel), words


def _cache() -> Path | None:
    with suppress(ConfigError):  # no home folder: nothing is remembered
        return cache_folder()
    return None
