from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from storymem_dist.diffusion import experts as experts_module
from storymem_dist.diffusion.experts import AllResident, ExpertPair, HostSwap
from tests.helpers.fake_experts import FakeExpert, fake_experts


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


@pytest.mark.parametrize(
    ("timestep", "name"), [(999, "high_noise"), (900, "high_noise"), (899, "low_noise"), (0, "low_noise")]
)
def test_the_high_noise_expert_works_at_and_above_the_boundary(timestep: int, name: str) -> None:
    pair = fake_experts()
    assert pair.name_at(timestep) == name
    assert pair.select(timestep).name == name


def test_each_expert_has_its_own_guidance_scale() -> None:
    high, low = FakeExpert(1.0), FakeExpert(2.0)
    pair = ExpertPair(
        high_noise=high, low_noise=low, boundary_ratio=0.875, guidance_scale_high=4.0, guidance_scale_low=3.0
    )
    assert (pair.select(875).module, pair.select(875).guidance_scale) == (high, 4.0)
    assert (pair.select(874).module, pair.select(874).guidance_scale) == (low, 3.0)


def test_a_residency_is_told_of_every_choice_and_of_the_end() -> None:
    class Recorder(AllResident):
        def __init__(self) -> None:
            self.told: list[str] = []

        def activate(self, name: str) -> None:
            self.told.append(name)

        def release(self) -> None:
            self.told.append("release")

    recorder = Recorder()
    pair = fake_experts(recorder)
    for timestep in (999, 950, 500):
        pair.select(timestep)
    pair.release()
    assert recorder.told == ["high_noise", "high_noise", "low_noise", "release"]
    with pytest.raises(RuntimeError, match="the low_noise expert was released"):
        pair.select(3)


def test_swapping_keeps_values_and_moves_only_the_active_expert() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    before = {name: values(module) for name, module in modules.items()}
    swap = HostSwap(modules, "cpu")
    at_host = {name: addresses(module) for name, module in modules.items()}
    for name, other in (("high_noise", "low_noise"), ("low_noise", "high_noise"), ("high_noise", "low_noise")):
        swap.activate(name)
        assert addresses(modules[name]).isdisjoint(at_host[name]), "the active expert must be a copy on the device"
        assert addresses(modules[other]) == at_host[other], "the other one must be back in host memory"
        for key, value in values(modules[name]).items():
            assert torch.equal(value, before[name][key]) and value.dtype == before[name][key].dtype


def test_activating_the_active_expert_copies_nothing() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    swap = HostSwap(modules, "cpu")
    swap.activate("high_noise")
    on_device = addresses(modules["high_noise"])
    swap.activate("high_noise")
    assert addresses(modules["high_noise"]) == on_device


def test_swapped_experts_compute_what_resident_ones_do() -> None:
    x, context = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 5)
    results = []
    for make_residency in (lambda _modules: None, lambda modules: HostSwap(modules, "cpu")):
        results.append([run(make_residency, timestep, x, context) for timestep in (950, 20)])
    for resident, swapped in zip(*results, strict=True):
        assert torch.equal(resident, swapped)
    assert not torch.equal(*results[0])


def run(make_residency: Callable, timestep: int, x: Tensor, context: Tensor) -> Tensor:
    high, low = FakeExpert(1.5), FakeExpert(0.7)
    pair = ExpertPair(
        high_noise=high,
        low_noise=low,
        boundary_ratio=0.9,
        guidance_scale_high=1.0,
        guidance_scale_low=1.0,
        residency=make_residency({"high_noise": high, "low_noise": low}),
    )
    pair.select(950)
    return pair.select(timestep).module(x, torch.tensor([500]), context, torch.arange(2))


def test_released_experts_hold_no_memory() -> None:
    modules = {"high_noise": small_module(1), "low_noise": small_module(2)}
    swap = HostSwap(modules, "cpu")
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

    memory = experts_module._HostMemory(pinned=True)
    monkeypatch.setattr(experts_module._HostMemory, "_SLAB_BYTES", 2048)
    monkeypatch.setattr(experts_module.torch, "empty", empty_unpinned)
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
    swap = HostSwap(modules, "cuda")
    assert all(value.is_pinned() for value in modules["low_noise"].state_dict().values())
    for name in ("low_noise", "high_noise", "low_noise"):
        swap.activate(name)
        for key, value in modules[name].state_dict().items():
            assert value.is_cuda and torch.equal(value.cpu(), before[name][key])
