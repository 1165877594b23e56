"""Decides whether the experts fit this machine, from their sizes alone, before anything is read or allocated.

Refusals count weights only (activations, text encoder and caches need more), so what is refused here can never run.
Resolves ``model.experts=auto`` by what is free on the device. Computes no layout and moves nothing.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from storymem_dist.diffusion.host_swap import page_locked_bytes
from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB, device_memory_bytes, free_device_memory_bytes, host_memory_bytes
from storymem_dist.models.precision import vae_dtype
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.parallel.settings import OFFLOADED, SHARDED, ParallelSettings
from storymem_dist.parallel.working_memory import RESERVE_BYTES, VAE_BYTES, Gathering, decode_bytes, forward_memory
from storymem_dist.weights.settings import ModelSettings

_LARGEST_TOKENS, _LARGEST_SIZE = 111_600, (720, 1280)
"""Work that ``auto`` leaves room for: 81 frames of 1280x720 with ten keyframes."""

SCORING_BYTES = 2 * GIB
"""Of a forward of HPSv3 with eight frames, twice what its widest layer needs."""

ON_DEVICE, BETWEEN_SHOTS, ON_CPU = "device", "between_shots", "cpu"
"""Where a scorer of keyframes is kept, see ``place_scorer``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMemory:
    """Bytes that one rank needs for the weights of both experts, on its device and (page-locked) in host memory."""

    on_device: int = 0
    on_host: int = 0


_NO_ADAPTERS = WeightMemory()


@dataclass(frozen=True, kw_only=True, slots=True)
class _ExpertSizes:
    """Bytes of one expert's tensors in the order of the model, of one of its blocks, and of all outside its blocks."""

    tensors: tuple[int, ...]
    block: int
    outside: int


@cache
def _expert_sizes(config: DiTConfig, dtype: torch.dtype, linears: str) -> _ExpertSizes:
    with torch.device("meta"):
        dit = WanDiT(config, dtype=dtype)
    quantize_linears(dit.blocks, linears)
    tensors = tuple(parameter.nbytes for parameter in dit.parameters())
    block = sum(parameter.nbytes for parameter in dit.blocks[0].parameters())
    return _ExpertSizes(tensors=tensors, block=block, outside=sum(tensors) - config.num_layers * block)


@cache
def _page_locked(sizes: _ExpertSizes, shards: int) -> int:
    """Host memory of one of ``shards`` equal parts of an expert. Kept: a planner asks for thousands of layouts."""
    return page_locked_bytes(-(-size // shards) for size in sizes.tensors)


def expert_bytes(config: DiTConfig, dtype: torch.dtype, linears: str) -> int:
    """Return the bytes of one expert's weights, held in ``dtype`` and with the layer format ``linears``."""
    return sum(_expert_sizes(config, dtype, linears).tensors)


def weight_memory(
    model: ModelSettings, parallel: ParallelSettings, config: DiTConfig, *, page_locked: bool = True
) -> WeightMemory:
    """Return what a rank needs for ``parallel.loading.place_experts``; ``model.experts`` must not be ``auto``.

    Of streamed experts, this is the least: what is outside the blocks, and the blocks that are on their way. Host
    memory of DeepSpeed is counted without rounding. Uneven shards are counted as if they were even. ``page_locked``:
    host memory as a GPU needs it.
    """
    sizes = _expert_sizes(config, getattr(torch, model.dtype), model.linears)
    shards = parallel.weight_shards
    one = sum(sizes.tensors) // shards
    kept = _page_locked(sizes, shards) if page_locked else one
    if parallel.streams_blocks or model.experts == "stream":
        arriving = min(parallel.prefetch_blocks + 1, config.num_layers)
        return WeightMemory(on_device=sizes.outside + arriving * sizes.block, on_host=len(EXPERTS) * kept)
    if parallel.weights in OFFLOADED:
        return WeightMemory(on_device=0, on_host=len(EXPERTS) * (one if parallel.weights == "zero3" else kept))
    if model.experts == "swap":
        return WeightMemory(on_device=one, on_host=len(EXPERTS) * kept)
    return WeightMemory(on_device=len(EXPERTS) * one, on_host=0)


def decide_experts(
    model: ModelSettings,
    parallel: ParallelSettings,
    config: DiTConfig,
    device: torch.device,
    *,
    adapters: WeightMemory = _NO_ADAPTERS,
    num_tokens: int = 0,
    scorer_bytes: int = 0,
) -> ModelSettings:
    """Return the settings with ``experts=auto`` resolved: ``resident`` if that leaves room to work on the device.

    Otherwise ``stream``, or ``swap`` where FSDP2 shards the weights. Weights that are offloaded by a rank alone are
    streamed in any case. ``adapters``: what the LoRAs of a shot need next to the experts. ``num_tokens``: those of the
    job's longest shot, where they are known. ``scorer_bytes``: weights of the scorer that chooses keyframes between
    shots.
    """
    if parallel.streams_blocks:
        return replace(model, experts="stream")
    if model.experts != "auto":
        return model
    resident, free = replace(model, experts="resident"), free_device_memory_bytes(device)
    work = _work(model, parallel, config, max(num_tokens, _LARGEST_TOKENS)) + adapters.on_device
    work = max(work, _scoring(scorer_bytes))
    if free is None or weight_memory(resident, parallel, config).on_device + work <= free:
        return resident
    return replace(model, experts="swap" if parallel.weights == "fsdp" else "stream")


def place_scorer(
    scorer_bytes: int,
    model: ModelSettings,
    parallel: ParallelSettings,
    config: DiTConfig,
    device: torch.device,
    *,
    adapters: WeightMemory = _NO_ADAPTERS,
    num_tokens: int = 0,
) -> str:
    """Return where the leader keeps the scorer of keyframes, with weights of ``scorer_bytes``.

    ``ON_DEVICE`` where it fits next to resident experts at work. ``BETWEEN_SHOTS``: in host memory, and on the device
    only while it scores; there it needs room next to what stays between shots. Else ``ON_CPU``, and so for a CPU.
    ``model.experts`` must not be ``auto``; the other arguments are those of ``decide_experts``.
    """
    free = free_device_memory_bytes(device)
    if free is None:
        return ON_CPU
    stays = weight_memory(model, parallel, config).on_device if model.experts == "resident" else 0
    work = _work(model, parallel, config, max(num_tokens, _LARGEST_TOKENS)) + adapters.on_device
    if model.experts == "resident" and stays + work + scorer_bytes <= free:
        return ON_DEVICE
    return BETWEEN_SHOTS if stays + _scoring(scorer_bytes) <= free else ON_CPU


def _scoring(scorer_bytes: int) -> int:
    """Bytes of the device for scoring between two shots, and what has to stay free."""
    return scorer_bytes + SCORING_BYTES + VAE_BYTES + RESERVE_BYTES if scorer_bytes else 0


def _work(model: ModelSettings, parallel: ParallelSettings, config: DiTConfig, num_tokens: int) -> int:
    """Bytes for a forward over ``num_tokens`` tokens, for the largest usual decode, and what has to stay free."""
    _, ring, ulysses = parallel.axes
    forward = forward_memory(
        config,
        num_tokens,
        ring=ring,
        ulysses=ulysses,
        dtype=getattr(torch, model.dtype),
        linears=model.linears,
        compiled=parallel.may_compile,
        gathering=gathering_of(model, parallel, config),
    )
    decode = decode_bytes(*_LARGEST_SIZE, vae_dtype(model.vae_precision), num_ranks=parallel.ranks_per_replica)
    return max(forward.total, decode) + VAE_BYTES + RESERVE_BYTES


def gathering_of(model: ModelSettings, parallel: ParallelSettings, config: DiTConfig) -> Gathering | None:
    """Return what FSDP2 gathers during a forward; None where every rank has whole weights."""
    if parallel.weights not in SHARDED or parallel.streams_blocks:
        return None
    sizes = _expert_sizes(config, getattr(torch, model.dtype), model.linears)
    return Gathering(
        block=sizes.block,
        outside=sizes.outside,
        ahead=parallel.prefetch_blocks,
        shards=parallel.weight_shards,
        from_host=parallel.weights in OFFLOADED,
    )


def held_bytes(model: ModelSettings, config: DiTConfig) -> int:
    """Return the bytes of one expert as it is held."""
    return expert_bytes(config, getattr(torch, model.dtype), model.linears)


def block_bytes(model: ModelSettings, config: DiTConfig) -> int:
    """Return the bytes of one block of an expert."""
    return _expert_sizes(config, getattr(torch, model.dtype), model.linears).block


def host_has_room(model: ModelSettings, parallel: ParallelSettings, config: DiTConfig, *, ranks_per_node: int) -> bool:
    """Whether the ranks of a node may keep all experts in host memory (as ``model.experts=swap`` does)."""
    needed = weight_memory(replace(model, experts="swap"), parallel, config)
    return needed.on_host * ranks_per_node <= host_memory_bytes()


def check_streaming(model: ModelSettings, parallel: ParallelSettings) -> None:
    """Raise ``ConfigError`` where experts that stream are asked for weights that ranks share."""
    if model.experts == "stream" and parallel.weights == "fsdp":
        raise ConfigError(
            "model.experts=stream needs whole weights on every rank, but parallel.weights=fsdp cuts them; use "
            "model.experts=swap or auto, or parallel.weights=fsdp_offload"
        )


def check_weight_memory(
    model: ModelSettings,
    parallel: ParallelSettings,
    config: DiTConfig,
    *,
    device: torch.device,
    ranks_per_node: int,
    adapters: WeightMemory = _NO_ADAPTERS,
    scorers_on_host: int = 0,
) -> None:
    """Raise ``ConfigError`` if this rank's device, or the memory that its node's ranks share, is too small.

    On the device, memory that other processes hold counts as missing. ``model.experts`` must not be ``auto``.
    ``adapters``: what the LoRAs of a shot need next to the experts. ``scorers_on_host``: bytes of the scorers that the
    leaders of this node keep in host memory. Also raises ``ConfigError`` where
    ``model.experts=stream`` is asked for weights that ranks share.
    """
    check_streaming(model, parallel)
    needed = weight_memory(model, parallel, config, page_locked=device.type != "cpu")
    asked = f"model.experts={model.experts} with parallel.weights={parallel.weights}"
    if adapters.on_device:
        asked += f" and the LoRAs of a shot ({_gib(adapters.on_device)} GiB)"
    if scorers_on_host:
        asked += f" and the scorer of keyframes ({_gib(scorers_on_host)} GiB of host memory)"
    on_device, free = needed.on_device + adapters.on_device, free_device_memory_bytes(device)
    on_host = (needed.on_host + adapters.on_host) * ranks_per_node + scorers_on_host
    if free is None:
        on_host += on_device * ranks_per_node
    elif on_device > free:
        total = device_memory_bytes(device) or free
        raise ConfigError(
            f"{asked} needs {_gib(on_device)} GiB for weights on each device; {device} has {_gib(free)} GiB free of "
            f"{_gib(total)} GiB; {_advice(model, parallel, on_device, total)}"
        )
    if on_host > (host := host_memory_bytes()):
        raise ConfigError(
            f"{asked} needs {_gib(on_host)} GiB of host memory for the weights of {ranks_per_node} "
            f"rank{'s' if ranks_per_node > 1 else ''} on this node, which has {_gib(host)} GiB (the limit of its "
            "job counts). Use model.experts=resident if the devices can hold both experts, fewer ranks "
            "(launch.processes_per_node=N), or a layout whose ranks share the weights "
            "(parallel=fsdp_2gpu, fsdp_8gpu, ...)"
        )


def _advice(model: ModelSettings, parallel: ParallelSettings, needed: int, total: int) -> str:
    """What a person can do about a device that is too small for the weights, or too full."""
    ways = ["a layout whose ranks share the weights (parallel=fsdp_2gpu, fsdp_8gpu, ...)"]
    if model.linears == "exact":
        ways.insert(0, "model.linears=float8 or int8 (half the bytes, lossy)")
    if model.experts in ("resident", "swap") and parallel.weights == "replicated":
        ways.insert(0, "model.experts=stream")
    use = f"use {', '.join(ways[:-1])}{', or ' if ways[:-1] else ''}{ways[-1]}"
    return f"free what other processes hold (nvidia-smi names them), or {use}" if needed <= total else use


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"
