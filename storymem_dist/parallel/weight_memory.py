"""Decides whether the experts fit this machine, from their sizes alone, before anything is read or allocated.

Counts weights only (activations, text encoder and caches need more), so what is refused here can never run. Resolves
``model.experts=auto``. Computes no layout and moves nothing.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB, device_memory_bytes, host_memory_bytes
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.parallel.loading import OFFLOADED
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.settings import ModelSettings

_FORWARD_BYTES, _DECODE_BYTES, _MORE_BYTES = 14 * GIB, 18 * GIB, 4 * GIB
"""Working memory of a rank besides weights: for a forward and for a decode (1280x720, ten keyframes, predicted by
``benchmarks/memory.py``), and headroom for all-gathers, libraries and fragmentation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMemory:
    """Bytes that one rank needs for the weights of both experts, on its device and in host memory."""

    on_device: int
    on_host: int


@cache
def expert_bytes(config: DiTConfig, dtype: torch.dtype, linears: str) -> int:
    """Return the bytes of one expert's weights, held in ``dtype`` and with the layer format ``linears``."""
    with torch.device("meta"):
        dit = WanDiT(config, dtype=dtype)
    quantize_linears(dit.blocks, linears)
    return sum(parameter.nbytes for parameter in dit.parameters())


def weight_memory(model: ModelSettings, parallel: ParallelSettings, config: DiTConfig) -> WeightMemory:
    """Return what a rank needs for ``parallel.loading.place_experts``; ``model.experts`` must not be ``auto``.

    Uneven shards are counted as if they were even.
    """
    whole = expert_bytes(config, getattr(torch, model.dtype), model.linears)
    one = whole if parallel.weights == "replicated" else whole // parallel.ranks_per_replica
    if parallel.weights in OFFLOADED:
        return WeightMemory(on_device=0, on_host=len(EXPERTS) * one)
    if model.experts == "swap":
        return WeightMemory(on_device=one, on_host=len(EXPERTS) * one)
    return WeightMemory(on_device=len(EXPERTS) * one, on_host=0)


def decide_experts(
    model: ModelSettings, parallel: ParallelSettings, config: DiTConfig, device: torch.device
) -> ModelSettings:
    """Return the settings with ``experts=auto`` resolved: ``resident`` if that leaves room to work."""
    if model.experts != "auto":
        return model
    resident, total = replace(model, experts="resident"), device_memory_bytes(device)
    work = max(_FORWARD_BYTES // (parallel.ring * parallel.ulysses), _DECODE_BYTES // parallel.ranks_per_replica)
    if total is None or weight_memory(resident, parallel, config).on_device + work + _MORE_BYTES <= total:
        return resident
    return replace(model, experts="swap")


def host_has_room(model: ModelSettings, parallel: ParallelSettings, config: DiTConfig, *, ranks_per_node: int) -> bool:
    """Whether the ranks of a node may keep all experts in host memory (as ``model.experts=swap`` does)."""
    needed = weight_memory(replace(model, experts="swap"), parallel, config)
    return needed.on_host * ranks_per_node <= host_memory_bytes()


def check_weight_memory(
    model: ModelSettings,
    parallel: ParallelSettings,
    config: DiTConfig,
    *,
    device: torch.device,
    ranks_per_node: int,
) -> None:
    """Raise ``ConfigError`` if this rank's device, or the memory that its node's ranks share, is too small.

    ``model.experts`` must not be ``auto``.
    """
    needed = weight_memory(model, parallel, config)
    asked = f"model.experts={model.experts} with parallel.weights={parallel.weights}"
    on_device, total = needed.on_device, device_memory_bytes(device)
    on_host = needed.on_host * ranks_per_node
    if total is None:
        on_host += on_device * ranks_per_node
    elif on_device > total:
        raise ConfigError(
            f"{asked} needs {_gib(on_device)} GiB for weights on each device; {device} has {_gib(total)} GiB. Use "
            "model.experts=swap, a layout whose ranks share the weights (parallel=fsdp_2gpu, fsdp_8gpu, ...), "
            "or parallel=offload_1gpu"
        )
    if on_host > (host := host_memory_bytes()):
        raise ConfigError(
            f"{asked} needs {_gib(on_host)} GiB of host memory for the weights of {ranks_per_node} "
            f"rank{'s' if ranks_per_node > 1 else ''} on this node, which has {_gib(host)} GiB (the limit of its "
            "job counts). Use model.experts=resident if the devices can hold both experts, fewer ranks "
            "(launch.processes_per_node=N), or a layout whose ranks share the weights "
            "(parallel=fsdp_2gpu, fsdp_8gpu, ...)"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"
