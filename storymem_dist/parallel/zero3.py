"""DeepSpeed ZeRO-3 inference: weights wait in host memory or on disk and visit the device layer by layer.

For hosts whose GPUs are too small even when weights are sharded. A replica is one rank and a process group of its own
(``layout`` refuses more: DeepSpeed compares the ranks of the whole job in the middle of a forward, which would make
replicas wait for each other). Weights are loaded into host memory first and handed to DeepSpeed parameter by parameter,
each in its own dtype. Needs the extra ``deepspeed``; offload to disk (nvme) has not been tried.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.settings import ParallelSettings


def hand_to_zero3(
    dit: WanDiT, group: dist.ProcessGroup, settings: ParallelSettings, *, device: torch.device, local_rank: int
) -> None:
    """Give the loaded weights of ``dit``, in host memory, to DeepSpeed; forwards of ``dit`` then fetch what they need.

    Weights are partitioned over ``group``, whose ranks must run the same forwards. The originals are freed one by one,
    so host memory holds them once, and one parameter twice for a moment.
    """
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it; plain python does not set it
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    largest_numel = max(parameter.numel() for parameter in dit.parameters())
    config = zero3_config(settings, pin_memory=device.type == "cuda", largest_numel=largest_numel)
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
    # The engine takes its hooks away when it is collected, so the model keeps it; not as a submodule, which it would
    # become as an attribute: the engine holds the model.
    dit.__dict__["zero3_engine"] = engine


def zero3_config(settings: ParallelSettings, *, pin_memory: bool, largest_numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration for inference without optimizer.

    ``memory_efficient_linear`` is off: it would replace ``torch.nn.functional.linear`` for the whole process.
    """
    offload: dict[str, Any] = {"device": settings.zero3_offload, "pin_memory": pin_memory}
    if settings.zero3_offload == "nvme":
        offload |= {"nvme_path": settings.zero3_nvme_path, "buffer_size": largest_numel}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "offload_param": offload, "memory_efficient_linear": False},
    }


class _DataParallel:
    """What DeepSpeed asks of a model-parallel layout: all ranks of ``group`` are data parallel."""

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
