"""Weights in page-locked memory: cut from slabs, and counted as they are, for whole experts and for shards."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion import host_swap
from storymem_dist.diffusion.host_swap import HostMemory
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.loading import _on_host
from storymem_dist.parallel.mesh import lone_mesh
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.weight_memory import weight_memory
from storymem_dist.weights.settings import ModelSettings
from tests.helpers.fake_cuda import CUDA, fake_cuda, without_cuda
from tests.unit.parallel.test_cuda_ranks import last_of_four

CONFIG = replace(WAN22_A14B.t2v, num_layers=3)


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of every page-locked allocation. What is cut from one is page-locked, and nothing is page-locked again."""
    without_cuda(monkeypatch)
    sizes: list[int] = []

    def note_page_locked(num_bytes: int) -> Tensor:
        sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("rounded up to a power of two")

    monkeypatch.setattr(host_swap, "_page_locked", note_page_locked)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.device.type == "cpu")
    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    yield sizes


@pytest.mark.parametrize("settings", [ParallelSettings(weights="fsdp_offload"), ParallelSettings()], ids=str)
def test_an_expert_of_one_rank_takes_what_is_counted(slabs: list[int], settings: ParallelSettings) -> None:
    with torch.device("meta"):
        dit = parallelize(WanDiT(CONFIG), lone_mesh(), settings)
    with fake_cuda():
        dit._apply(partial(_on_host, HostMemory(CUDA)))
        assert {parameter.device.type for parameter in dit.parameters()} == {"cpu"}
    counted = weight_memory(ModelSettings(experts="stream"), settings, CONFIG).on_host
    assert 2 * sum(slabs) == counted
    assert sum(slabs) < sum(parameter.nbytes for parameter in dit.parameters()) + 2**30


def test_shards_of_several_ranks_take_what_is_counted(slabs: list[int]) -> None:
    settings = ParallelSettings(ulysses=4, weights="fsdp_offload")
    with last_of_four(settings) as mesh, fake_cuda():
        with torch.device("meta"):
            dit = WanDiT(CONFIG)
        parallelize(dit, mesh, settings)
        dit._apply(partial(_on_host, HostMemory(CUDA)))
        held = [parameter._local_tensor for parameter in dit.parameters()]
        assert {one.device.type for one in held} == {"cpu"}
    assert 2 * sum(slabs) == weight_memory(ModelSettings(), settings, CONFIG).on_host
