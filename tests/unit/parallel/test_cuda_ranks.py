"""Parallel code on fake CUDA tensors and a process group that sends nothing: all that is sent is on the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # before 2.13, torch knows no others for fake tensors
from diffusers import AutoencoderKLWan
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from storymem_dist.diffusion.experts import Expert
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.errors import ConfigError
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel import fsdp
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.loading import place_experts
from storymem_dist.parallel.mesh import ReplicaMesh, build_mesh
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae
from tests.helpers.fake_cuda import CUDA, HOST_READS, TO_DEVICE, fake_cuda, without_cuda
from tests.helpers.tiny_dit import CONFIG, make_inputs

CPU = torch.device("cpu")
LAYOUTS = {
    "ulysses": ParallelSettings(ulysses=4),
    "ring": ParallelSettings(ring=4),
    "both": ParallelSettings(ring=2, ulysses=2),
    "guidance": ParallelSettings(cfg=2, ulysses=2),
    "fsdp": ParallelSettings(cfg=2, ring=2, weights="fsdp"),
    "fsdp_offload": ParallelSettings(ulysses=4, weights="fsdp_offload"),
}


@contextmanager
def last_of_four(settings: ParallelSettings) -> Iterator[ReplicaMesh]:
    """This process as the last rank of a replica, which has the fewest tokens and rows."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        layout = Layout(cfg=settings.cfg, ring=settings.ring, ulysses=settings.ulysses, ranks_per_node=4)
        yield build_mesh(layout, CUDA)
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch)


def make_expert(mesh: ReplicaMesh, settings: ParallelSettings, dtype: torch.dtype = torch.bfloat16) -> WanDiT:
    with torch.device("meta"):
        dit = WanDiT(CONFIG, dtype=dtype)
    parallelize(dit, mesh, settings)
    return dit.to_empty(device=CPU if settings.weights == "fsdp_offload" else CUDA)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_velocity(name: str, dtype: torch.dtype) -> None:
    settings = LAYOUTS[name]
    with last_of_four(settings) as mesh, fake_cuda() as crossings, torch.no_grad():
        expert = Expert(name="low_noise", module=make_expert(mesh, settings, dtype), guidance_scale=3.5)
        x, timestep, text, positions = (tensor.to(CUDA) for tensor in make_inputs())
        crossings.take()
        velocity = make_guidance(mesh).velocity(expert, x, timestep, text, text, positions)
        assert (velocity.device, velocity.shape) == (CUDA, x.shape)
        assert set(crossings.take()) == ({TO_DEVICE} if name == "fsdp_offload" else set())


@pytest.mark.parametrize("name", ["both", "guidance"])
def test_decision_of_the_step_cache(name: str) -> None:
    """With guidance in parallel this rank adds nothing to the sums, but its zeros are on the device as well."""
    settings = LAYOUTS[name]
    with last_of_four(settings) as mesh, fake_cuda() as crossings, torch.no_grad():
        with torch.device("meta"):
            dit = WanDiT(CONFIG)
        cache = attach_step_cache(dit, mesh.shard.sum)
        cache.begin_shot(threshold=0.1)
        parallelize(dit, mesh, settings).to_empty(device=CUDA)
        expert = Expert(name="low_noise", module=dit, guidance_scale=3.5, step_cache=cache)
        x, timestep, text, positions = (tensor.to(CUDA) for tensor in make_inputs())
        crossings.take()
        for noted in ([], [HOST_READS] * 2):  # both sums are read at once
            cache.begin_step()
            make_guidance(mesh).velocity(expert, x, timestep, text, text, positions)
            assert crossings.take() == noted


def test_vae() -> None:
    settings = ParallelSettings(ulysses=4)
    with last_of_four(settings) as mesh, fake_cuda() as crossings:
        vae = WanVae(AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1)).to(CUDA)
        assert mesh.shard.group is not None
        parallelize_vae(vae, mesh.shard.group)
        clip = torch.zeros(3, 5, 32, 80, device=CUDA)
        crossings.take()
        pixels = vae.decode(vae.encode(clip))
        assert (pixels.device, pixels.shape) == (CUDA, clip.shape)
        assert crossings.take() == []


def test_shards_that_wait_on_the_host_leave_the_device() -> None:
    settings = ParallelSettings(ulysses=4, weights="fsdp")
    with last_of_four(settings) as mesh, fake_cuda() as crossings, torch.no_grad():
        expert = make_expert(mesh, settings)
        _, residency = place_experts([("low_noise", expert)], device=CUDA, weights="fsdp", swap=True)
        crossings.take()
        assert held_bytes(expert) == 0
        residency.activate("low_noise")
        assert held_bytes(expert) > 0
        assert set(crossings.take()) == {TO_DEVICE}
        residency.end_shot()
        assert held_bytes(expert) == 0
        assert crossings.take() == [], "weights never change, so none is copied back"
        assert {parameter.to_local().device for parameter in expert.parameters()} == {CUDA}


def test_a_torch_that_cannot_shard_integers_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: nn.Module | list[nn.Module], **options: object) -> object:
        parts = module if isinstance(module, list) else [module]
        if any(not parameter.is_floating_point() for part in parts for parameter in part.parameters()):
            raise RuntimeError("only Tensors of floating point dtype can require gradients")
        return module

    monkeypatch.setattr(fsdp, "fully_shard", refuse)
    settings = ParallelSettings(ulysses=4, weights="fsdp")
    with last_of_four(settings) as mesh, torch.device("meta"):
        dit = WanDiT(CONFIG)
        quantize_linears(dit.blocks, "int8")
        with pytest.raises(ConfigError, match=r"int8 with sharded weights: .*use model.linears=float8"):
            parallelize(dit, mesh, settings)


def held_bytes(expert: WanDiT) -> int:
    """``to_local`` would make new fake tensors, which hold what their shape says."""
    return sum(parameter._local_tensor.untyped_storage().nbytes() for parameter in expert.parameters())
