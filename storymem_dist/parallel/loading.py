"""Builds an expert for a session: creates an empty model, parallelizes it, allocates and reads this rank's part only.

Adds to ``storymem_dist.weights.loading`` which rows of a parameter this rank holds, and that one rank per node may read
for all that need the same part. Knows nothing about the formats of checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from storymem_dist.diffusion.experts import AllResident, Residency
from storymem_dist.diffusion.host_swap import HostMemory, HostSwap, HostWeights
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.diffusion.text_cache import attach_text_cache
from storymem_dist.models.attention import Attend
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import CrossAttention, DiTConfig, SelfAttention, WanDiT
from storymem_dist.parallel.fsdp import share_streams
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.zero3 import hand_to_zero3
from storymem_dist.weights.loading import (
    LoadReport,
    LocalPart,
    TensorSource,
    WeightDelta,
    load_dit_weights,
    whole_parameter,
)

OFFLOADED = ("fsdp_offload", "zero3")
"""Values of ``ParallelSettings.weights`` that keep weights in host memory."""

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
    share_reads: bool | None = None,
    progress: BytesProgress | None = None,
) -> tuple[WanDiT, LoadReport]:
    """An expert with its weights, ready for forwards on every rank of the replica. Collective over the replica.

    Allocates memory for this rank's part only; while reading, at most one chunk of a tensor in addition.
    ``deltas`` (LoRAs) are merged into that part. ``linears`` is the format of the blocks' layers. ``share_reads``
    (None: as ``settings`` say) lets one rank per node read for all that need the same part; it makes the call
    collective over the replicas of the node, so all of them must load at that moment (as at the start of a job),
    even if they need the weights later. If the replicas load different weights, each reads its own.

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
    dit.to_empty(device="cpu" if settings.weights in OFFLOADED else session.device)
    if share_reads is None:
        share_reads = settings.share_reads
    if share_reads and _readers_agree(source.name, session):
        report = _read_for_all(dit, source, deltas, session, progress)
    else:
        report = session.all_or_none(
            lambda: load_dit_weights(dit, source, deltas, local_part=local_part, progress=progress)
        )
    if settings.weights == "zero3":
        assert session.mesh.shard_mesh is not None, "start_session starts a process group for zero3"
        group = session.mesh.shard_mesh.get_group()
        hand_to_zero3(dit, group, device=session.device, local_rank=session.local_rank)
    return dit, report


def place_experts(
    experts: Iterable[tuple[str, nn.Module]], *, device: torch.device, weights: str, swap: bool, may_swap: bool = True
) -> tuple[dict[str, nn.Module], Residency]:
    """Decide where the experts of ``build_expert`` (by name) wait while they are idle. Before the first forward only.

    ``swap``: the idle one uses no device memory. Each expert moves to the host before ``experts`` yields the next one,
    so the device never holds two. Offloaded weights (``fsdp_offload``, ``zero3``) never wait on the device. Others stay
    there; with ``may_swap`` the returned ``Residency`` can move them to the host later.
    """
    memory = HostMemory(device)
    modules: dict[str, nn.Module] = {}
    waiting: dict[str, HostWeights] = {}

    def move_to_host(module: nn.Module) -> HostWeights:
        if weights == "fsdp":
            return HostWeights(module, memory, device, local_of=_local_shard, by_block=False)
        return HostWeights(module, memory, device)

    for name, module in experts:
        modules[name] = module
        if swap and weights not in OFFLOADED:
            waiting[name] = move_to_host(module)
    share_streams(modules)
    if waiting:
        return modules, HostSwap(waiting)
    if weights in OFFLOADED or device.type == "cpu" or not may_swap:
        return modules, AllResident()
    return modules, AllResident(lambda: HostSwap({name: move_to_host(module) for name, module in modules.items()}))


def local_part(name: str, parameter: nn.Parameter) -> LocalPart:
    """Which rows of ``parameter`` this rank holds, and where: all of a plain one, its shard of a ``DTensor``."""
    if not isinstance(parameter, DTensor):
        return whole_parameter(name, parameter)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return LocalPart(tensor=parameter.to_local(), row_offset=offset[0], num_rows=shape[0])


def _local_shard(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


def _readers_agree(name: str, session: Session) -> bool:
    """Whether this rank shares reads with others that all load ``name`` now. Collective over the readers."""
    if session.readers.control is None:
        return False
    names: list[str | None] = [None] * session.readers.size
    dist.all_gather_object(names, name, group=session.readers.control)
    return names == [name] * session.readers.size


def _read_for_all(
    dit: WanDiT, source: TensorSource, deltas: Sequence[WeightDelta], session: Session, progress: BytesProgress | None
) -> LoadReport:
    """One rank reads and merges, the others of its team receive finished parameters; an error reaches all of them."""
    report: LoadReport = session.readers.decide(
        lambda: load_dit_weights(dit, source, deltas, local_part=local_part, progress=progress)
    )
    for name, parameter in dit.named_parameters():
        part = local_part(name, parameter).tensor.detach()
        if part.numel():
            group = session.readers_group if part.is_cuda else session.readers.control
            dist.broadcast(part.view(torch.uint8), group=group, group_src=0)  # gloo does not know float8
    return report if session.readers.rank == 0 else replace(report, bytes_read=0)
