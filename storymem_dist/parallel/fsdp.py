"""Where the weights of a ``WanDiT`` live: sharded over the ranks of a replica with FSDP2, on the device or on the host.

Each block is one FSDP group, and so are the layers before the blocks (they are done before the first block runs, so
their 0.8 GB need not stay gathered); the head is the root's own. Parameters keep their dtypes (norms, modulation and
time embedding are fp32 inside bf16 blocks), nothing is cast: results are bit-equal to those of unsharded weights. Knows
neither how weights are read nor what runs on them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    share_comm_ctx,
)
from torch.distributed.tensor import DTensor

from storymem_dist.diffusion.host_swap import HostMemory
from storymem_dist.models.wan.dit import WanDiT


def shard_weights(dit: WanDiT, mesh: DeviceMesh, *, offload: bool, prefetch_blocks: int) -> None:
    """Shard every parameter of ``dit`` (meta or real) along its first dimension over the 1-D ``mesh``.

    ``offload`` keeps the shards in host memory (page-locked for CUDA): a block costs device memory only while it runs.
    ``prefetch_blocks`` blocks are gathered ahead of the one that computes. Forwards must run under ``no_grad``; all
    ranks of ``mesh`` must run the same forwards.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    fully_shard([dit.patch_embedding, dit.text_embedding, dit.time_embedding, dit.time_projection], **options)
    blocks = [fully_shard(block, **options) for block in dit.blocks]
    fully_shard(dit, **options)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + prefetch_blocks])


def share_streams(experts: Mapping[str, nn.Module]) -> None:
    """Let sharded experts use the same streams: they never run at once, so one can reuse the other's memory.

    To be called before the first forward. Unsharded experts are left alone.
    """
    sharded: list[FSDPModule] = [module for module in experts.values() if isinstance(module, FSDPModule)]
    if len(sharded) > 1:
        share_comm_ctx(sharded)


class HostShards:
    """``diffusion.host_swap.WeightsOnHost`` of this rank's shards of one expert: moves them into host memory at once.

    Every rank moves its own; no collective is involved. All copies are queued before the forward: FSDP gathers blocks
    ahead of their turn, on streams of its own that wait only for what was queued before the forward.
    """

    def __init__(self, module: nn.Module, memory: HostMemory, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._host: dict[DTensor, Tensor] = {}
        self._place(lambda shard: self._host.setdefault(shard, memory.keep(shard.to_local().detach())))

    def enter_device(self) -> None:
        """Queue the copies on the current stream."""
        self._place(lambda shard: self._host[shard].to(self._device, non_blocking=True, copy=True))

    def leave_device(self) -> None:
        """Point every shard at its host copy."""
        self._place(lambda shard: self._host[shard])

    def drop(self) -> None:
        """Forget the expert: what it holds is freed with the last reference to it."""
        self._host.clear()
        self._module = nn.Module()

    def _place(self, memory_of: Callable[[DTensor], Tensor]) -> None:
        """Give every shard other memory the way ``nn.Module.to`` does, of which FSDP takes note.

        ``DTensor.from_local`` would copy host memory back to the mesh's device.
        """

        def moved(shard: DTensor) -> DTensor:
            return DTensor(memory_of(shard), shard._spec, requires_grad=False)

        self._module._apply(moved)
