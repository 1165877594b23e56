"""DeepSpeed ZeRO-3 inference: weights stay in host memory and are copied to the device layer by layer.

For hosts whose GPUs are too small even when weights are sharded. A replica is one rank and a process group of its own
(``layout`` refuses more: DeepSpeed compares the ranks of the whole job in the middle of a forward, which would make
replicas wait for each other). Weights are loaded into host memory first and passed to DeepSpeed parameter by parameter,
each in its own dtype. Needs the extra ``deepspeed``. Knows nothing of checkpoints.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

from storymem_dist.models.wan.dit import WanDiT


def hand_to_zero3(dit: WanDiT, group: dist.ProcessGroup, *, device: torch.device, local_rank: int) -> None:
    """Give the loaded weights of ``dit``, in host memory, to DeepSpeed; forwards of ``dit`` then fetch what they need.

    Weights are partitioned over ``group``, whose ranks must run the same forwards. The originals are freed one by one,
    so host memory holds them once, and one parameter twice for a moment.
    """
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it; plain python does not set it
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    config = _config(pin_memory=device.type == "cuda")
    offload = config["zero_optimization"]["offload_param"]
    deepspeed.zero.Init(
        module=dit,
        data_parallel_group=group,
        config_dict_or_path=config,
        remote_device=offload["device"],
        pin_memory=offload["pin_memory"],
        mem_efficient_linear=False,
    )
    engine, *_ = deepspeed.initialize(model=dit, config=config, mpu=_DataParallel(group), dist_init_required=False)
    # The engine removes its hooks when it is garbage-collected, so the model must keep it. An attribute would become a
    # submodule, a cycle, since the engine holds the model.
    dit.__dict__["zero3_engine"] = engine


def _config(*, pin_memory: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for inference without optimizer.

    ``memory_efficient_linear`` is off: it would replace ``torch.nn.functional.linear`` for the whole process.
    """
    offload = {"device": "cpu", "pin_memory": pin_memory}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "offload_param": offload, "memory_efficient_linear": False},
    }


class _DataParallel:
    """The interface that DeepSpeed needs of a model-parallel layout: all ranks of ``group`` are data parallel."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    def get_data_parallel_rank(self) -> int:
        return self._group.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._group.size()

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1
