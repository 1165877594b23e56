"""What a forward of a compiled block needs, measured: a narrow block of A14B's shape, compiled and run on this CPU.

torch's profiler notes every allocation. What a matrix product or attention allocates inside itself is left out: kernels
of a CPU convert numbers that a GPU multiplies as they are.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory_forward import forward_inputs
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.models.compile import compile_blocks
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B

NARROW = replace(WAN22_A14B.t2v, dim=256, ffn_dim=688, num_heads=2, num_layers=1)
GRIDS = tuple(LatentGrid(num_frames=33, height=height, width=width) for height, width in ((160, 208), (208, 320)))
HEAVY = (
    *("aten::_scaled_mm", "aten::_int_mm", "aten::addmm", "aten::mm", "aten::bmm", "aten::mkldnn"),
    *("aten::_scaled_dot_product", "aten::_flash"),
)


def bytes_per_channel(linears: str, *, compiled: bool) -> float:
    """Bytes by which the peak grows with each token and channel: from two sizes, so that what is constant drops out."""
    torch._dynamo.reset()
    dit = WanDiT(NARROW).eval().requires_grad_(False)
    quantize_linears(dit.blocks, linears)
    for parameter in dit.parameters():
        parameter.zero_()
    if compiled:
        compile_blocks(dit)
    peaks = [_peak_bytes(dit, grid) for grid in GRIDS]
    tokens = [grid.num_tokens for grid in GRIDS]
    return (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]) / NARROW.dim


@torch.no_grad()
def _peak_bytes(dit: WanDiT, grid: LatentGrid) -> int:
    inputs = (*forward_inputs(NARROW, grid), grid.temporal_positions())
    dit(*inputs)  # compiles
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        dit(*inputs)
    assert profiler.profiler is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith(HEAVY)]
    changes: dict[int, int] = {}
    for event in events:
        if event.name() == "[memory]":
            moment = max([event.start_ns(), *(end for begin, end in spans if begin <= event.start_ns() <= end)])
            changes[moment] = changes.get(moment, 0) + event.nbytes()
    live = peak = 0
    for moment in sorted(changes):
        live += changes[moment]
        peak = max(peak, live)
    return peak
