"""Builds an expert for a session: creates an empty model, parallelizes it, allocates and reads this rank's part only.

Adds to ``storymem_dist.weights.loading`` which rows of a parameter this rank holds, and that one rank per node may read
for all that need the same part. Knows nothing about the formats of checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from storymem_dist.diffusion.block_stream import BlocksThatFit, BlockStream, StreamedWeights
from storymem_dist.diffusion.experts import AllResident, Residency
from storymem_dist.diffusion.host_swap import HostMemory, HostSwap, HostWeights
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.diffusion.text_cache import attach_text_cache
from storymem_dist.models.attention import Attend
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import CrossAttention, DiTConfig, SelfAttention, WanDiT
from storymem_dist.parallel.fsdp import reset_between_shots, share_streams, start_sharding
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session
from storymem_dist.parallel.settings import OFFLOADED, ParallelSettings
from storymem_dist.parallel.working_memory import blocks_that_fit
from storymem_dist.parallel.zero3 import hand_to_zero3
from storymem_dist.weights.loading import (
    LoadReport,
    LocalPart,
    TensorSource,
    WeightDelta,
    load_dit_weights,
    whole_parameter,
)

BytesProgress = Callable[[int, int], None]


def build_expert(
    config: DiTConfig,
    source: TensorSource,
    deltas: Sequence[WeightDelta] = (),
    *,
    session: Session,
    settings: ParallelSettings,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    linears: str = "exact",
    cache_text_keys: bool = False,
    stream: bool = False,
    share_reads: bool | None = None,
    progress: BytesProgress | None = None,
) -> tuple[WanDiT, LoadReport]:
    """An expert with its weights, ready for forwards on every rank of the replica. Collective over the replica.

    Allocates memory for this rank's part only; while reading, at most one chunk of a tensor in addition.
    ``deltas`` (LoRAs) are merged into that part. ``linears`` is the format of the blocks' layers. ``stream``: the part
    is in host memory (as for offloaded weights), ready for ``place_experts``; the session's device merges and casts it
    chunk by chunk, so its bits are those of a part on that device. ``share_reads``
    (None: as ``settings`` say) lets one rank per node read for all that need the same part; it makes the call
    collective over the replicas of the node, so all of them must load at that moment (as at the start of a job),
    even if they need the weights later. If the replicas load different weights, or only some of them ``stream``, each
    reads its own.

    Raises ``CheckpointError`` (on every rank of the reading team when weights are shared).
    """
    with torch.device("meta"):
        dit = WanDiT(config, dtype=dtype)
    quantize_linears(dit.blocks, linears)
    for module in list(dit.modules()):
        if isinstance(module, SelfAttention | CrossAttention):
            module.attend = Attend(attention)
    attach_step_cache(dit, session.mesh.shard.sum)
    if cache_text_keys:
        attach_text_cache(dit)
    if settings.weights != "zero3":
        parallelize(dit, session.mesh, settings)
    dit.eval().requires_grad_(False)
    part_of = local_part
    if settings.weights == "zero3":
        dit.to_empty(device="cpu")
    elif stream or settings.weights in OFFLOADED:
        dit._apply(partial(_on_host, HostMemory(session.device)))
        part_of = partial(local_part, merge_on=session.device)
    else:
        dit.to_empty(device=session.device)
    if share_reads is None:
        share_reads = settings.share_reads
    # Each rank decides by what is free on its device; a broadcast needs the weights of all in one kind of memory.
    if share_reads and _readers_agree((source.name, stream), session):
        report = _read_for_all(dit, source, deltas, session, part_of, progress)
    else:
        report = session.all_or_none(
            lambda: load_dit_weights(dit, source, deltas, local_part=part_of, progress=progress)
        )
    if settings.weights == "zero3":
        assert session.mesh.shard_mesh is not None, "start_session starts a process group for zero3"
        group = session.mesh.shard_mesh.get_group()
        hand_to_zero3(dit, group, device=session.device, local_rank=session.local_rank)
    return dit, report


def place_experts(
    experts: Iterable[tuple[str, nn.Module]],
    *,
    device: torch.device,
    weights: str,
    swap: bool,
    stream: bool = False,
    may_swap: bool = True,
    num_ahead: int = 1,
) -> tuple[dict[str, nn.Module], Residency]:
    """Decide where the experts of ``build_expert`` (by name) wait while they are idle. Before the first forward only.

    ``swap``: the idle one uses no device memory. ``stream``: nor do blocks of the other one for which the device has no
    room; they arrive ``num_ahead`` blocks ahead of their use. Each expert moves to the host before ``experts`` yields
    the next one, so the device never holds two. Offloaded weights never wait on the device: those that FSDP2 or
    DeepSpeed holds arrive by their means, others are streamed. All other experts stay on the device; with ``may_swap``
    the returned ``Residency`` can move them to the host later.
    """
    memory = HostMemory(device)
    modules: dict[str, nn.Module] = {}
    waiting: dict[str, HostWeights | StreamedWeights] = {}

    def move_to_host(module: nn.Module) -> HostWeights | StreamedWeights:
        if isinstance(module, FSDPModule):
            return HostWeights(module, memory, device, local_of=_local_shard, by_block=False)
        assert isinstance(module, WanDiT), "only the transformer's blocks can be streamed"
        return StreamedWeights(module, memory, device, num_ahead=num_ahead)

    def in_turns(waiting: dict[str, HostWeights | StreamedWeights], that_fit: BlocksThatFit | None) -> Residency:
        streamed = {name: one for name, one in waiting.items() if isinstance(one, StreamedWeights)}
        return BlockStream(streamed, that_fit) if streamed else HostSwap(waiting)

    for name, module in experts:
        modules[name] = module
        start_sharding(module)
        by_others = weights == "zero3" or (weights == "fsdp_offload" and isinstance(module, FSDPModule))
        stream = stream or (weights == "fsdp_offload" and not by_others)
        if (swap or stream) and not by_others:
            waiting[name] = move_to_host(module)
    share_streams(modules)
    residency: Residency = AllResident()
    if waiting:
        residency = in_turns(waiting, blocks_that_fit if stream else None)
    elif weights not in OFFLOADED and device.type != "cpu" and may_swap:
        residency = AllResident(
            lambda: in_turns({name: move_to_host(module) for name, module in modules.items()}, blocks_that_fit)
        )
    return modules, reset_between_shots(residency, modules)


def local_part(name: str, parameter: nn.Parameter, *, merge_on: torch.device | None = None) -> LocalPart:
    """Which rows of ``parameter`` this rank holds, and where: all of a plain one, its shard of a ``DTensor``.

    ``merge_on``: the device that prepares them; None: that of the parameter.
    """
    if not isinstance(parameter, DTensor):
        return replace(whole_parameter(name, parameter), device=merge_on)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return LocalPart(tensor=parameter.to_local(), row_offset=offset[0], num_rows=shape[0], device=merge_on)


def _on_host(memory: HostMemory, parameter: Tensor) -> Tensor:
    """``parameter`` without values in ``memory``. FSDP2 alone would page-lock each shard, rounded to a power of two."""
    if not isinstance(parameter, DTensor):
        return memory.empty_like(parameter)
    moved = torch.empty_like(parameter, device="cpu")
    assert isinstance(moved, DTensor)
    moved._local_tensor = memory.empty_like(parameter.to_local())
    return moved


def _local_shard(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


def _readers_agree(load: tuple[object, ...], session: Session) -> bool:
    """Whether this rank shares reads with others that all do the same ``load`` now. Collective over the readers."""
    if session.readers.control is None:
        return False
    loads: list[tuple[object, ...]] = [()] * session.readers.size
    dist.all_gather_object(loads, load, group=session.readers.control)
    return loads == [load] * session.readers.size


def _read_for_all(
    dit: WanDiT,
    source: TensorSource,
    deltas: Sequence[WeightDelta],
    session: Session,
    part_of: Callable[[str, nn.Parameter], LocalPart],
    progress: BytesProgress | None,
) -> LoadReport:
    """One rank reads and merges, the others of its team receive finished parameters; an error reaches all of them."""
    report: LoadReport = session.readers.decide(
        lambda: load_dit_weights(dit, source, deltas, local_part=part_of, progress=progress)
    )
    for name, parameter in dit.named_parameters():
        part = local_part(name, parameter).tensor.detach()
        if part.numel():
            group = session.readers_group if part.is_cuda else session.readers.control
            dist.broadcast(part.view(torch.uint8), group=group, group_src=0)  # gloo does not know float8
    return report if session.readers.rank == 0 else replace(report, bytes_read=0)
