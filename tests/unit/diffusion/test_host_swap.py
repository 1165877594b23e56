"""Experts that take turns on the device: the right weights at the right time, on streams that finish late."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from storymem_dist.diffusion import host_swap
from storymem_dist.diffusion.experts import AllResident, ExpertPair
from storymem_dist.diffusion.host_swap import HostMemory, HostSwap, HostWeights
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.loading import place_experts
from tests.helpers.lazy_streams import LazyStreams
from tests.helpers.tiny_dit import CONFIG, make_dit, make_inputs

NAMES = ("high_noise", "low_noise")
CPU = torch.device("cpu")


def make_swap(modules: dict[str, nn.Module]) -> HostSwap:
    memory = HostMemory(CPU)
    return HostSwap({name: HostWeights(module, memory, CPU) for name, module in modules.items()})


def small_module(seed: int) -> nn.Module:
    """Parameters of mixed dtypes, a buffer, and a weight that is not contiguous."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3).to(torch.bfloat16))
    module[0].weight.data = torch.randn(7, 5).t()
    module.register_buffer("table", torch.arange(4) + seed)
    return module


def values(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def addresses(module: nn.Module) -> set[int]:
    return {value.data_ptr() for value in module.state_dict().values()}


def test_swapping_keeps_values_and_moves_only_the_active_expert() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    before = {name: values(module) for name, module in modules.items()}
    swap = make_swap(modules)
    at_host = {name: addresses(module) for name, module in modules.items()}
    for name, other in (("high_noise", "low_noise"), ("low_noise", "high_noise"), ("high_noise", "low_noise")):
        swap.activate(name)
        assert addresses(modules[name]).isdisjoint(at_host[name]), "the active expert must be a copy on the device"
        assert addresses(modules[other]) == at_host[other], "the other one must be back in host memory"
        for key, value in values(modules[name]).items():
            assert torch.equal(value, before[name][key]) and value.dtype == before[name][key].dtype


def test_activating_the_active_expert_copies_nothing() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    swap = make_swap(modules)
    swap.activate("high_noise")
    on_device = addresses(modules["high_noise"])
    swap.activate("high_noise")
    assert addresses(modules["high_noise"]) == on_device


def make_pair() -> dict[str, WanDiT]:
    return {name: make_dit(seed=seed) for seed, name in enumerate(NAMES)}


def velocities(modules: dict[str, WanDiT], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {name: module(*inputs) for name, module in modules.items()}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyStreams]:
    with LazyStreams() as streams:
        monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
        yield streams


def test_each_block_waits_for_its_own_weights_and_for_no_others(streams: LazyStreams) -> None:
    modules, inputs = make_pair(), make_inputs()
    expected = velocities(modules, inputs)
    per_block = len(list(modules["low_noise"].blocks[0].parameters()))
    num_others = len(list(modules["low_noise"].parameters())) - CONFIG.num_layers * per_block
    swap = make_swap(modules)
    arrived: list[int] = []
    for block in modules["low_noise"].blocks:
        block.register_forward_hook(lambda *_: arrived.append(streams.num_copied))
    swap.activate("low_noise")
    assert streams.num_copied == num_others
    for _ in range(2):
        assert torch.equal(modules["low_noise"](*inputs), expected["low_noise"])
    arriving = [num_others + per_block * count for count in range(1, CONFIG.num_layers + 1)]
    assert arrived == arriving + [arriving[-1]] * CONFIG.num_layers


def test_experts_that_take_turns_on_late_streams_compute_what_resident_ones_do(streams: LazyStreams) -> None:
    modules, inputs = make_pair(), make_inputs()
    expected = velocities(modules, inputs)
    swap = make_swap(modules)
    for name in (*NAMES, *NAMES):
        swap.activate(name)
        assert torch.equal(modules[name](*inputs), expected[name])


def test_an_expert_that_leaves_before_it_has_arrived_takes_no_memory_from_others(streams: LazyStreams) -> None:
    modules, inputs = make_pair(), make_inputs()
    expected = velocities(modules, inputs)
    swap = make_swap(modules)
    swap.activate("high_noise")
    swap.activate("low_noise")
    num_tensors = len(list(modules["high_noise"].parameters()))
    assert streams.num_copied >= num_tensors, "copies must be over before their memory is given to others"
    assert torch.equal(modules["low_noise"](*inputs), expected["low_noise"])
    swap.idle()
    swap.activate("high_noise")
    swap.release()
    assert streams.num_copied == 3 * num_tensors


def test_blocks_behind_a_step_cache_wait_too(streams: LazyStreams) -> None:
    modules, inputs = make_pair(), make_inputs()
    expected = velocities(modules, inputs)
    for module in modules.values():
        attach_step_cache(module)
    pair = ExpertPair(
        high_noise=modules["high_noise"],
        low_noise=modules["low_noise"],
        boundary_ratio=0.9,
        guidance_scale_high=1.0,
        guidance_scale_low=1.0,
        residency=make_swap(modules),
        step_cache_threshold=0.1,
    )
    pair.begin_shot()
    for timestep, name in ((950, "high_noise"), (20, "low_noise")):
        found = pair.select(timestep).run("cond", *inputs)
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-5)


def test_experts_are_sent_away_one_by_one_while_they_are_built() -> None:
    kept: list[list[Tensor]] = []
    modules: dict[str, WanDiT] = {}

    def build() -> Iterator[tuple[str, WanDiT]]:
        for seed, name in enumerate(NAMES):
            for made, first_memory in zip(modules.values(), kept, strict=True):
                assert addresses(made).isdisjoint(tensor.data_ptr() for tensor in first_memory)
            modules[name] = make_dit(seed=seed)
            kept.append([parameter.data for parameter in modules[name].parameters()])
            yield name, modules[name]

    placed, residency = place_experts(build(), device=CPU, weights="replicated", swap=True)
    assert placed == modules
    assert isinstance(residency, HostSwap)


def test_resident_experts_take_turns_once_they_were_asked_to_idle() -> None:
    modules = {name: small_module(seed) for seed, name in enumerate(NAMES)}
    where = {name: addresses(module) for name, module in modules.items()}
    resident = AllResident(lambda: make_swap(modules))
    resident.activate("low_noise")
    assert {name: addresses(module) for name, module in modules.items()} == where
    resident.idle()
    at_host = {name: addresses(module) for name, module in modules.items()}
    assert all(at_host[name].isdisjoint(where[name]) for name in NAMES)
    for name, other in (NAMES, NAMES[::-1]):
        resident.activate(name)
        assert addresses(modules[name]).isdisjoint(at_host[name])
        assert addresses(modules[other]) == at_host[other]
    resident.release()


def test_released_experts_hold_no_memory() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    swap = make_swap(modules)
    swap.activate("low_noise")
    swap.release()
    assert all(value.numel() == 0 for module in modules.values() for value in module.state_dict().values())


def test_page_locked_slabs_hold_every_tensor_apart_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slab arithmetic without CUDA: ordinary memory stands for page-locked memory."""
    empty, sizes = torch.empty, []

    def empty_unpinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        sizes.append(size)
        return empty(size, dtype=dtype)

    memory = HostMemory(torch.device("cuda"))
    monkeypatch.setattr(HostMemory, "_SLAB_BYTES", 2048)
    monkeypatch.setattr(host_swap.torch, "empty", empty_unpinned)
    originals = [torch.randn(n).to(dtype) for n in (1, 300, 3, 900, 100) for dtype in (torch.float32, torch.bfloat16)]
    originals.append(torch.randn(6, 5).t())
    kept = [memory.keep(tensor) for tensor in originals]
    for tensor, copy in zip(originals, kept, strict=True):
        assert torch.equal(tensor, copy) and tensor.dtype == copy.dtype
        assert copy.data_ptr() % 4 == 0
    assert 3600 in sizes and sizes.count(2048) >= 2


@pytest.mark.gpu
def test_swapping_on_cuda_uses_page_locked_memory_and_moves_the_weights() -> None:
    modules = {"high_noise": small_module(1).cuda(), "low_noise": small_module(2)}
    before = {name: {key: value.cpu() for key, value in values(module).items()} for name, module in modules.items()}
    _, swap = place_experts(modules.items(), device=torch.device("cuda"), weights="replicated", swap=True)
    assert all(value.is_pinned() for value in modules["low_noise"].state_dict().values())
    for name in ("low_noise", "high_noise", "low_noise"):
        swap.activate(name)
        for key, value in modules[name].state_dict().items():
            assert value.is_cuda and torch.equal(value.cpu(), before[name][key])
