"""Decides whether one shot of the chosen size fits this machine, from its sizes alone, before anything is allocated.

Counts what no implementation can do without: the largest tensors of one layer, and the frames. A real render needs more
(weights, caches, the decoder's own activations), so what is refused here can never run. Knows settings and sizes only.
"""

from dataclasses import dataclass

import torch

from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB, device_memory_bytes, host_memory_bytes
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.parallel.settings import ParallelSettings

_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipMemory:
    """Bytes that a rank needs at least for one shot without memory keyframes.

    ``forward``: on the device, in one layer of the transformer. ``decoded``: on the device, the decoded frames.
    ``frames``: on the host, the frames as they are saved.
    """

    forward: int
    decoded: int
    frames: int


def clip_memory(
    sampler: SamplerSettings, parallel: ParallelSettings, config: DiTConfig, dtype: torch.dtype
) -> ClipMemory:
    """Return the least that one shot needs. Ranks of a replica share the tokens of a forward; each decodes a part."""
    grid = LatentGrid(num_frames=sampler.num_frames, height=sampler.height, width=sampler.width)
    tokens = -(-grid.num_tokens // parallel.sequence)
    hidden = max(3 * config.dim, config.ffn_dim)  # queries, keys and values; or the hidden layer of the feed-forward
    values = 3 * sampler.num_frames * sampler.height * sampler.width
    return ClipMemory(
        forward=tokens * (config.dim + hidden) * dtype.itemsize,
        decoded=values * _FLOAT_BYTES // parallel.ranks_per_replica,
        frames=values,
    )


def check_clip_memory(
    sampler: SamplerSettings,
    parallel: ParallelSettings,
    config: DiTConfig,
    dtype: torch.dtype,
    *,
    device: torch.device,
    ranks_per_node: int,
) -> None:
    """Raise ``ConfigError`` if this rank's device, or the memory that its node's ranks share, is too small."""
    needed = clip_memory(sampler, parallel, config, dtype)
    on_device, total = max(needed.forward, needed.decoded), device_memory_bytes(device)
    asked = f"sampler.num_frames={sampler.num_frames}, height={sampler.height} and width={sampler.width}"
    advice = "use fewer frames or a smaller picture"
    if total is not None and on_device > total:
        raise ConfigError(
            f"{asked} need at least {_gib(on_device)} GiB on each device for one shot ({_gib(needed.forward)} GiB for "
            f"one layer, {_gib(needed.decoded)} GiB for the decoded frames); {device} has {_gib(total)} GiB; {advice}, "
            "or a layout whose ranks share a shot (parallel.ulysses, parallel.ring)"
        )
    replicas = max(1, ranks_per_node // parallel.ranks_per_replica)
    on_host = needed.frames * replicas + (on_device * ranks_per_node if total is None else 0)
    if on_host > (host := host_memory_bytes()):
        raise ConfigError(
            f"{asked} need at least {_gib(on_host)} GiB of host memory for one shot of each of {replicas} "
            f"replica{'s' if replicas > 1 else ''} on this node, which has {_gib(host)} GiB (the limit of its job "
            f"counts); {advice}"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"
