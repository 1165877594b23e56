"""Classifier-free guidance with its two passes in parallel: one on each half of the ``cfg`` axis.

Implements ``storymem_dist.diffusion.guidance.Guidance`` with one all-gather per step, and combines the velocities with
the same ``guide`` as on one device. Knows nothing about sequence parallelism or weights.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from storymem_dist.diffusion.branch import COND, UNCOND
from storymem_dist.diffusion.experts import Expert
from storymem_dist.diffusion.guidance import Guidance, LocalGuidance, guide, require_uncond
from storymem_dist.errors import LayoutError
from storymem_dist.parallel.clock import timed
from storymem_dist.parallel.mesh import Axis, ReplicaMesh


class ParallelGuidance:
    """Rank 0 of the ``cfg`` axis runs the conditional pass, rank 1 the unconditional one; both get the result."""

    def __init__(self, cfg: Axis) -> None:
        """``cfg``: an axis of size 2."""
        self._cfg = cfg

    def velocity(
        self,
        expert: Expert,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        cond_BSE: Tensor,
        uncond_BSE: Tensor | None,
        temporal_positions_T: Tensor,
    ) -> Tensor:
        """See ``Guidance.velocity``. Collective over the replica.

        Raises ``LayoutError`` for an expert of scale 1, which has no second pass (``layout.check_guidance`` refuses
        that before weights are read).
        """
        if expert.guidance_scale == 1.0:
            raise LayoutError(f"guidance_scale=1 of the {expert.name} expert cannot be combined with parallel.cfg=2")
        uncond_BSE = require_uncond(uncond_BSE, expert)
        branch, context_BSE = (COND, cond_BSE) if self._cfg.rank == 0 else (UNCOND, uncond_BSE)
        mine = expert.run(branch, x_BCTHW, timestep_B, context_BSE, temporal_positions_T).contiguous()
        both = [torch.empty_like(mine), torch.empty_like(mine)]
        with timed(self._cfg.clock):
            dist.all_gather(both, mine, group=self._cfg.group)
        cond, uncond = both
        return guide(cond, uncond, expert.guidance_scale)


def make_guidance(mesh: ReplicaMesh) -> Guidance:
    """Return the guidance of this layout: in parallel on a ``cfg`` axis of 2, else one pass after the other."""
    return LocalGuidance() if mesh.cfg.size == 1 else ParallelGuidance(mesh.cfg)
