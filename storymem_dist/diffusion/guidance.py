"""Classifier-free guidance: combines the conditional and the unconditional velocity. Knows nothing about ranks.

``LocalGuidance`` runs both passes on this device, one after the other. ``parallel/guidance.py`` implements the same
protocol for passes on different ranks; it uses the same ``guide``, so both give the same numbers.
"""

from typing import Protocol

from torch import Tensor

from storymem_dist.diffusion.branch import COND, UNCOND
from storymem_dist.diffusion.experts import Expert
from storymem_dist.errors import ConfigError


class Guidance(Protocol):
    """Runs the guidance passes of an expert."""

    def velocity(
        self,
        expert: Expert,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        cond_BSE: Tensor,
        uncond_BSE: Tensor | None,
        temporal_positions_T: Tensor,
    ) -> Tensor:
        """The guided velocity, float32 ``[B, 16, T, h, w]``.

        ``x_BCTHW`` is the DiT's input (noise, and for M2V mask and condition), ``cond_BSE`` and ``uncond_BSE`` the
        embeddings of prompt and negative prompt; ``uncond_BSE`` may be None for experts of guidance scale 1.
        """
        ...


class LocalGuidance:
    """Both passes on this device, the conditional one first; scale 1 skips the unconditional one."""

    def velocity(
        self,
        expert: Expert,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        cond_BSE: Tensor,
        uncond_BSE: Tensor | None,
        temporal_positions_T: Tensor,
    ) -> Tensor:
        """See ``Guidance.velocity``."""
        cond = expert.run(COND, x_BCTHW, timestep_B, cond_BSE, temporal_positions_T)
        if expert.guidance_scale == 1.0:
            return cond
        uncond_BSE = require_uncond(uncond_BSE, expert)
        uncond = expert.run(UNCOND, x_BCTHW, timestep_B, uncond_BSE, temporal_positions_T)
        return guide(cond, uncond, expert.guidance_scale)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """``uncond + scale * (cond - uncond)`` (classifier-free guidance, Ho and Salimans 2022, in Wan's form)."""
    return uncond.add(cond - uncond, alpha=scale)


def require_uncond(uncond_BSE: Tensor | None, expert: Expert) -> Tensor:
    """Return ``uncond_BSE``; raise ``ConfigError`` when it is None, because it was not encoded."""
    if uncond_BSE is None:
        raise ConfigError(
            f"guidance_scale={expert.guidance_scale} of the {expert.name} expert needs the embedding of the negative "
            "prompt, and there is none; encode it, or use guidance_scale=1"
        )
    return uncond_BSE
