"""Where the weights of a ``WanDiT`` live: sharded over the ranks of a replica with FSDP2, on the device or on the host.

Each block is one FSDP group, and so are the layers before the blocks (they finish before the first block runs, so
their 0.8 GB need not stay gathered); the head belongs to the root group. Parameters keep their dtypes (norms,
modulation and time embedding are fp32 inside bf16 blocks) and nothing is cast: results are bit-equal to those of
unsharded weights. Knows neither how weights are read nor what runs on them.
"""

from collections.abc import Mapping
from typing import Any, cast

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

from storymem_dist.diffusion.experts import Residency
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


def start_sharding(module: nn.Module) -> None:
    """Let FSDP2 finish its preparations for ``module``, if that is sharded: before its shards move, or a forward runs.

    They would happen in the first forward, which a shard without memory does not survive.
    """
    if isinstance(module, FSDPModule):
        module._get_fsdp_state()._lazy_init()


def share_streams(experts: Mapping[str, nn.Module]) -> None:
    """Let sharded experts use the same streams: they never run at once, so one can reuse the other's memory.

    Call it after ``start_sharding`` of all of them and before the first forward: an expert that prepares itself later
    replaces the streams, and drops what the other one's last forward keeps alive for them. Unsharded experts do not
    change.
    """
    sharded = _sharded(experts)
    if len(sharded) > 1:
        share_comm_ctx(sharded)
        for root in sharded:
            root._get_fsdp_state()._init_shared_state()  # reaches the groups below the root


def reset_between_shots(residency: Residency, experts: Mapping[str, nn.Module]) -> Residency:
    """Return ``residency`` with ``reset_forwards`` of sharded experts after each use; itself where none is sharded."""
    sharded = _sharded(experts)
    return _ResettingResidency(residency, sharded) if sharded else residency


class _ResettingResidency:
    """A ``Residency`` of sharded experts around another one: what FSDP2 keeps for a backward pass is dropped.

    FSDP2 counts on a backward pass after each forward. Without one, a block that was gathered ahead stays gathered when
    a step ends early (a reused step runs the first block only), and the list of blocks that ran grows for ever.
    """

    def __init__(self, inner: Residency, roots: list[FSDPModule]) -> None:
        self._inner = inner
        self._roots = roots
        self._active: str | None = None

    def activate(self, name: str) -> None:
        """Reset the experts if another one computes from here on; then as the inner residency."""
        if name != self._active:
            self._reset()
            self._active = name
        self._inner.activate(name)

    def end_shot(self) -> None:
        """Reset the experts; then as the inner residency."""
        self._reset()
        self._inner.end_shot()

    def idle(self) -> None:
        """Reset the experts, also after a forward that failed; then as the inner residency."""
        self._reset()
        self._inner.idle()

    def release(self) -> None:
        """As the inner residency."""
        self._roots.clear()
        self._inner.release()

    def _reset(self) -> None:
        for root in self._roots:
            reset_forwards(root)


def reset_forwards(root: FSDPModule) -> None:
    """Free what forwards of ``root`` left behind: gathered blocks, and FSDP2's records for a backward pass.

    Collective over the ranks that share its weights, after the same forwards on each.
    """
    if hasattr(root, "reset_iter_state"):  # torch 2.13
        root.reset_iter_state()
        return
    for module in cast(nn.Module, root).modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        if any(group._all_gather_result is not None for group in groups):
            module.unshard()  # waits for the gather that is under way; starts none
            module.reshard()
        for group in groups:
            group._post_forward_indices.clear()
        state._comm_ctx.post_forward_order.clear()


def _sharded(experts: Mapping[str, nn.Module]) -> list[FSDPModule]:
    return [module for module in experts.values() if isinstance(module, FSDPModule)]
