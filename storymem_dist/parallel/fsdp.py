"""Where the weights of a ``WanDiT`` live: sharded over the ranks of a replica with FSDP2, on the device or on the host.

Each block is one FSDP group, and so are the layers before the blocks (they finish before the first block runs, so
their 0.8 GB need not stay gathered); the head belongs to the root group. Parameters keep their dtypes (norms,
modulation and time embedding are fp32 inside bf16 blocks) and nothing is cast: results are bit-equal to those of
unsharded weights. Knows neither how weights are read nor what runs on them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    share_comm_ctx,
)

from storymem_dist.errors import ConfigError
from storymem_dist.models.wan.dit import WanDiT


def shard_weights(dit: WanDiT, mesh: DeviceMesh, *, offload: bool, prefetch_blocks: int) -> None:
    """Shard every parameter of ``dit`` (meta or real) along its first dimension over the 1-D ``mesh``.

    ``offload`` keeps the shards in host memory (page-locked for CUDA): a block costs device memory only while it runs.
    ``prefetch_blocks`` blocks are gathered ahead of the one that computes. Forwards must run under ``no_grad``; all
    ranks of ``mesh`` must run the same forwards. Raises ``ConfigError`` for int8 layers where torch cannot shard them.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    fully_shard([dit.patch_embedding, dit.text_embedding, dit.time_embedding, dit.time_projection], **options)
    try:
        blocks = [fully_shard(block, **options) for block in dit.blocks]
    except RuntimeError as error:
        if all(parameter.is_floating_point() for parameter in dit.parameters()):
            raise
        raise ConfigError(
            f"model.linears=int8 with sharded weights: FSDP2 of torch {torch.__version__} cannot hold integers "
            f"({error}); use model.linears=float8 or exact, parallel.weights=replicated, or torch 2.13"
        ) from None
    fully_shard(dit, **options)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + prefetch_blocks])


def share_streams(experts: Mapping[str, nn.Module]) -> None:
    """Let sharded experts use the same streams: they never run at once, so one can reuse the other's memory.

    Call it before the first forward. Unsharded experts do not change.
    """
    sharded: list[FSDPModule] = [module for module in experts.values() if isinstance(module, FSDPModule)]
    if len(sharded) > 1:
        share_comm_ctx(sharded)
