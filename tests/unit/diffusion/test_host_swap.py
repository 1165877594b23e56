"""Experts that take turns on the device: the right weights at the right time, on streams that finish late."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from storymem_dist.diffusion import host_swap
from storymem_dist.diffusion.block_stream import BlockStream
from storymem_dist.diffusion.experts import AllResident, ExpertPair
from storymem_dist.diffusion.host_swap import HostMemory, HostSwap, HostWeights
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.loading import place_experts
from tests.helpers.lazy_streams import LazyStreams
from tests.helpers.memory_limit import memory_for
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
    return module.requires_grad_(False)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def held_bytes(module: nn.Module) -> list[int]:
    """Memory of each tensor on the device."""
    return [value.untyped_storage().nbytes() for value in module.state_dict().values()]


def is_away(module: nn.Module) -> bool:
    return not any(held_bytes(module))


def test_swapping_keeps_values_and_only_the_active_expert_has_memory() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    before = {name: values(module) for name, module in modules.items()}
    swap = make_swap(modules)
    assert all(is_away(module) for module in modules.values())
    for name, other in (("high_noise", "low_noise"), ("low_noise", "high_noise"), ("high_noise", "low_noise")):
        swap.activate(name)
        assert is_away(modules[other])
        for key, value in values(modules[name]).items():
            assert torch.equal(value, before[name][key]) and value.dtype == before[name][key].dtype
    swap.end_shot()
    assert all(is_away(module) for module in modules.values())


def test_activating_the_active_expert_copies_nothing() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    swap = make_swap(modules)
    swap.activate("high_noise")
    modules["high_noise"][0].weight.zero_()
    swap.activate("high_noise")
    assert not modules["high_noise"][0].weight.any()


def make_pair() -> dict[str, WanDiT]:
    return {name: make_dit(seed=seed) for seed, name in enumerate(NAMES)}


def velocities(modules: dict[str, WanDiT], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {name: module(*inputs) for name, module in modules.items()}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyStreams]:
    with LazyStreams(monkeypatch) as streams:
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
    swap.activate("high_noise")
    swap.end_shot()
    assert streams.num_copied == 3 * num_tensors
    swap.activate("low_noise")
    assert torch.equal(modules["low_noise"](*inputs), expected["low_noise"])


def test_an_expert_that_finds_no_memory_gives_back_what_it_took() -> None:
    modules, inputs = make_pair(), make_inputs()
    expected = velocities(modules, inputs)
    swap = make_swap(modules)
    with memory_for(5), pytest.raises(torch.OutOfMemoryError):
        swap.activate("low_noise")
    assert not is_away(modules["low_noise"])
    for name, other in (NAMES, NAMES[::-1]):
        swap.activate(name)
        assert is_away(modules[other])
        assert torch.equal(modules[name](*inputs), expected[name])


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
    modules: dict[str, WanDiT] = {}

    def build() -> Iterator[tuple[str, WanDiT]]:
        for seed, name in enumerate(NAMES):
            assert all(is_away(module) for module in modules.values())
            modules[name] = make_dit(seed=seed)
            yield name, modules[name]

    placed, residency = place_experts(build(), device=CPU, weights="replicated", swap=True)
    assert placed == modules
    assert isinstance(residency, BlockStream)


@pytest.mark.parametrize("may_swap", [True, False])
def test_resident_experts_leave_only_where_the_host_has_room(may_swap: bool) -> None:
    modules = make_pair()
    device = torch.device("meta")  # any but a CPU
    _, residency = place_experts(modules.items(), device=device, weights="replicated", swap=False, may_swap=may_swap)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "get_device_module", lambda device: torch.cpu)
        residency.idle()
    assert [is_away(module) for module in modules.values()] == [may_swap, may_swap]


def test_resident_experts_take_turns_once_they_were_asked_to_idle() -> None:
    modules = {name: small_module(seed) for seed, name in enumerate(NAMES)}
    resident = AllResident(lambda: make_swap(modules))
    resident.activate("low_noise")
    resident.end_shot()
    assert not any(is_away(module) for module in modules.values())
    resident.idle()
    for name, other in (NAMES, NAMES[::-1]):
        assert is_away(modules[name])
        resident.activate(name)
        assert all(held_bytes(modules[name]))
        assert is_away(modules[other])
    resident.end_shot()
    assert all(is_away(module) for module in modules.values())


def test_released_experts_hold_no_memory() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    swap = make_swap(modules)
    swap.activate("low_noise")
    swap.release()
    assert all(is_away(module) for module in modules.values())


def test_page_locked_slabs_hold_every_tensor_apart_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slab arithmetic without CUDA: ordinary memory replaces page-locked memory."""
    sizes = []

    def not_page_locked(num_bytes: int) -> Tensor:
        sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    memory = HostMemory(torch.device("cuda"))
    monkeypatch.setattr(host_swap, "_SLAB_BYTES", 2048)
    monkeypatch.setattr(host_swap, "_page_locked", not_page_locked)
    originals = [torch.randn(n).to(dtype) for n in (1, 300, 3, 900, 100) for dtype in (torch.float32, torch.bfloat16)]
    originals.append(torch.randn(6, 5).t())
    kept = [memory.keep(tensor) for tensor in originals]
    assert host_swap.page_locked_bytes(tensor.nbytes for tensor in originals) == sum(sizes)
    for tensor, copy in zip(originals, kept, strict=True):
        assert torch.equal(tensor, copy) and tensor.dtype == copy.dtype
        assert copy.data_ptr() % 4 == 0
    assert 4096 in sizes and sizes.count(2048) >= 2, "sizes that the page-locked allocator does not round"


@pytest.mark.gpu
def test_swapping_on_cuda_uses_page_locked_memory_and_keeps_the_weights() -> None:
    modules = {name: make_dit(seed=seed).cuda() for seed, name in enumerate(NAMES)}
    inputs = [tensor.cuda() for tensor in make_inputs()]
    expected = velocities(modules, inputs)
    device = torch.device("cuda", torch.cuda.current_device())
    assert HostMemory(device).keep(inputs[0]).is_pinned()
    _, swap = place_experts(modules.items(), device=device, weights="replicated", swap=True)
    for name in (*NAMES, *NAMES):
        swap.activate(name)
        assert torch.equal(modules[name](*inputs), expected[name])
