"""Blocks that arrive ahead of their use: the bits of resident weights, a bounded number of blocks, copies in time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from storymem_dist.diffusion.block_stream import BlocksThatFit, BlockStream, StreamedWeights, no_block, streamed_blocks
from storymem_dist.diffusion.experts import AllResident, ExpertPair
from storymem_dist.diffusion.host_swap import HostMemory
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.diffusion.text_cache import attach_text_cache
from storymem_dist.hardware import GIB
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel import working_memory
from storymem_dist.parallel.loading import place_experts
from storymem_dist.parallel.working_memory import RESERVE_BYTES, blocks_that_fit, forward_bytes
from storymem_dist.weights.loading import StateDictSource, load_dit_weights
from tests.helpers.lazy_streams import LazyStreams
from tests.helpers.memory_limit import memory_for
from tests.helpers.tiny_dit import CONFIG, make_dit, make_inputs

NUM_BLOCKS = 7
DEEP = replace(CONFIG, num_layers=NUM_BLOCKS)
NAMES = ("high_noise", "low_noise")
CPU = torch.device("cpu")


def fitting(num_blocks: int) -> BlocksThatFit:
    return lambda expert, tokens: num_blocks


def make_expert(seed: int, linears: str = "exact", dtype: torch.dtype = torch.float32) -> WanDiT:
    exact = make_dit(DEEP, dtype=dtype, seed=seed)
    if linears == "exact":
        return exact
    dit = WanDiT(DEEP, dtype=dtype).eval().requires_grad_(False)
    quantize_linears(dit.blocks, linears)
    load_dit_weights(dit, StateDictSource("here", exact.state_dict()))
    return dit


def make_stream(modules: dict[str, WanDiT], that_fit: BlocksThatFit | None, num_ahead: int = 1) -> BlockStream:
    weights = {name: StreamedWeights(one, HostMemory(CPU), CPU, num_ahead=num_ahead) for name, one in modules.items()}
    return BlockStream(weights, that_fit)


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in module.parameters())


def blocks_here(module: WanDiT) -> list[int]:
    return [index for index, block in enumerate(module.blocks) if bytes_of(block)]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyStreams]:
    with LazyStreams(monkeypatch) as streams:
        yield streams


@pytest.mark.parametrize("num_ahead", [0, 1, 2, 9])
@pytest.mark.parametrize("num_fit", [0, 3, 5, 6, 7, 40])
def test_experts_in_turn_compute_what_resident_ones_do(streams: LazyStreams, num_fit: int, num_ahead: int) -> None:
    modules, inputs = {name: make_expert(seed) for seed, name in enumerate(NAMES)}, make_inputs(DEEP)
    expected = {name: module(*inputs) for name, module in modules.items()}
    stream = make_stream(modules, fitting(num_fit), num_ahead)
    for name in (*NAMES, *NAMES):
        stream.activate(name)
        for _ in range(3):  # two guidance passes of a step, and one of the next
            assert torch.equal(modules[name](*inputs), expected[name])
    stream.end_shot()
    assert not any(bytes_of(module) for module in modules.values())


@pytest.mark.parametrize(
    ("linears", "dtype"),
    [
        ("exact", torch.float32),
        ("exact", torch.bfloat16),
        ("float8", torch.bfloat16),
        ("float8_fast", torch.bfloat16),
        ("int8", torch.bfloat16),
    ],
)
def test_all_formats_keep_their_bits(linears: str, dtype: torch.dtype) -> None:
    module, inputs = make_expert(1, linears, dtype), make_inputs(DEEP)
    expected = module(*inputs)
    stream = make_stream({"low_noise": module}, fitting(3))
    stream.activate("low_noise")
    for _ in range(2):
        assert torch.equal(module(*inputs), expected)
    assert bytes_of(module) < sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_copies_are_queued_ahead_and_each_block_waits_for_its_own_only(streams: LazyStreams, num_ahead: int) -> None:
    module, inputs = make_expert(1), make_inputs(DEEP)
    per_block = len(list(module.blocks[0].parameters()))
    outside = len(list(module.parameters())) - NUM_BLOCKS * per_block
    weights = StreamedWeights(module, HostMemory(CPU), CPU, num_ahead=num_ahead)
    stream = BlockStream({"low_noise": weights}, no_block)
    seen: list[tuple[int, int]] = []
    for block in module.blocks:
        block.register_forward_pre_hook(
            lambda *_: seen.append((streams.num_copied - outside, len(weights._copies.queue) - outside))
        )
    stream.activate("low_noise")
    assert (streams.num_copied, len(weights._copies.queue)) == (outside, outside), "blocks come one by one"
    for _ in range(2):
        module(*inputs)
    arrived_and_queued = [(copied / per_block, queued / per_block) for copied, queued in seen]
    assert arrived_and_queued == [(count, count + num_ahead) for count in range(1, 2 * NUM_BLOCKS + 1)]


def test_a_block_that_is_left_out_takes_no_memory_from_others(streams: LazyStreams) -> None:
    module = make_expert(1)
    stream = make_stream({"low_noise": module}, no_block)
    stream.activate("low_noise")
    for index in (0, 3):  # block 1 was on its way
        module.blocks.before_block(module.blocks[index])
    per_block = len(list(module.blocks[0].parameters()))
    outside = len(list(module.parameters())) - NUM_BLOCKS * per_block
    assert streams.num_copied >= outside + 2 * per_block, "its copy must be over before its memory is given to others"
    assert blocks_here(module) == [3, 4]


@pytest.mark.parametrize(("num_fit", "num_ahead"), [(0, 1), (4, 1), (5, 2), (2, 0)])
def test_a_part_of_the_expert_has_memory_at_any_time(num_fit: int, num_ahead: int) -> None:
    module, inputs = make_expert(1), make_inputs(DEEP)
    block_bytes, whole = bytes_of(module.blocks[0]), bytes_of(module)
    outside = whole - NUM_BLOCKS * block_bytes
    stream = make_stream({"low_noise": module}, fitting(num_fit), num_ahead)
    held: list[int] = []
    for block in module.blocks:
        block.register_forward_hook(lambda *_: held.append(bytes_of(module)))
    stream.activate("low_noise")
    assert bytes_of(module) == outside
    for _ in range(3):
        module(*inputs)
    at_once = max(num_fit, num_ahead + 1)
    assert max(held) == outside + at_once * block_bytes < whole
    stayed = set(range(NUM_BLOCKS)) - streamed_blocks(NUM_BLOCKS, num_fit, num_ahead=num_ahead)
    assert len(stayed) == at_once - num_ahead - 1
    assert stayed <= set(blocks_here(module))


def test_streamed_blocks_are_as_few_as_can_be_and_spread_evenly() -> None:
    assert streamed_blocks(40, 40, num_ahead=1) == set()
    assert streamed_blocks(40, 22, num_ahead=1) == set(range(0, 40, 2))
    assert streamed_blocks(40, 0, num_ahead=1) == streamed_blocks(40, 2, num_ahead=1) == set(range(40))
    for num_fit in range(40):
        chosen = sorted(streamed_blocks(40, num_fit, num_ahead=1))
        gaps = {after - before for before, after in zip(chosen, [*chosen[1:], chosen[0] + 40], strict=True)}
        assert len(chosen) == min(40, 42 - num_fit)
        assert max(gaps) - min(gaps) <= 1


def pair_of(modules: dict[str, WanDiT], stream: Any, threshold: float = 0.0) -> ExpertPair:
    scales = {"boundary_ratio": 0.9, "guidance_scale_high": 1.0, "guidance_scale_low": 1.0}
    return ExpertPair(**modules, **scales, residency=stream, step_cache_threshold=threshold)


def steps_of(pair: ExpertPair, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], int]:
    """A shot of six steps with both passes and little change between them: the velocities, and how many steps reuse."""
    velocities, num_reused = [], 0
    pair.begin_shot()
    for index, timestep in enumerate((950, 940, 930, 20, 10, 0)):
        x, *others = inputs
        expert = pair.select(timestep)
        for branch in ("cond", "uncond"):
            velocities.append(expert.run(branch, x * (1 + index * 1e-4), *others))
        num_reused += expert.reused
    pair.end_shot()
    return velocities, num_reused


@pytest.mark.parametrize("num_fit", [0, 4])
def test_step_cache_and_text_cache_see_no_difference(streams: LazyStreams, num_fit: int) -> None:
    inputs = make_inputs(DEEP)
    results = []
    for streamed in (False, True):
        modules = {name: make_expert(seed) for seed, name in enumerate(NAMES)}
        for module in modules.values():
            attach_step_cache(module)
            attach_text_cache(module)
        residency = make_stream(modules, fitting(num_fit)) if streamed else AllResident()
        velocities, num_reused = steps_of(pair_of(modules, residency, threshold=0.3), inputs)
        assert num_reused == 4, "of three steps of each expert the first is computed in full"
        results.append(velocities)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_after_idle_one_shot_uses_as_little_as_can_be() -> None:
    modules, inputs = {name: make_expert(seed) for seed, name in enumerate(NAMES)}, make_inputs(DEEP)
    expected = modules["low_noise"](*inputs)
    stream = make_stream(modules, None)

    def here_after_a_forward() -> int:
        stream.activate("low_noise")
        assert torch.equal(modules["low_noise"](*inputs), expected)
        return len(blocks_here(modules["low_noise"]))

    assert here_after_a_forward() == NUM_BLOCKS
    stream.idle()
    assert not bytes_of(modules["low_noise"])
    assert here_after_a_forward() == 2
    stream.activate("high_noise")
    assert not bytes_of(modules["low_noise"])
    assert here_after_a_forward() == 2
    stream.end_shot()
    assert here_after_a_forward() == NUM_BLOCKS


def test_resident_experts_that_ran_out_of_memory_are_streamed_in_the_next_try() -> None:
    modules, inputs = {name: make_expert(seed) for seed, name in enumerate(NAMES)}, make_inputs(DEEP)
    expected = modules["high_noise"](*inputs)
    resident = AllResident(lambda: make_stream(modules, fitting(NUM_BLOCKS)))
    resident.activate("high_noise")
    resident.idle()
    assert not any(bytes_of(module) for module in modules.values())
    resident.activate("high_noise")
    assert torch.equal(modules["high_noise"](*inputs), expected)
    assert len(blocks_here(modules["high_noise"])) == 2
    resident.end_shot()
    resident.activate("high_noise")
    assert torch.equal(modules["high_noise"](*inputs), expected)
    assert len(blocks_here(modules["high_noise"])) == NUM_BLOCKS


def test_a_block_that_finds_no_memory_leaves_nothing_behind() -> None:
    modules, inputs = {name: make_expert(seed) for seed, name in enumerate(NAMES)}, make_inputs(DEEP)
    expected = {name: module(*inputs) for name, module in modules.items()}
    stream = make_stream(modules, fitting(4))
    stream.activate("low_noise")
    with memory_for(60), pytest.raises(torch.OutOfMemoryError):
        modules["low_noise"](*inputs)
    assert bytes_of(modules["low_noise"])
    stream.idle()
    assert not any(bytes_of(module) for module in modules.values())
    for name in NAMES:
        stream.activate(name)
        assert torch.equal(modules[name](*inputs), expected[name])


def test_what_is_no_parameter_stays_where_it_is() -> None:
    module, inputs = make_expert(1), make_inputs(DEEP)
    linear = module.blocks[3].ffn[0]
    linear.adapter = torch.randn(5)
    where = linear.adapter.data_ptr()
    stream = make_stream({"low_noise": module}, no_block)
    stream.activate("low_noise")
    module(*inputs)
    stream.end_shot()
    assert linear.adapter.data_ptr() == where
    assert linear.adapter.untyped_storage().nbytes() == 20


def test_offloaded_weights_of_one_rank_are_streamed_without_fsdp() -> None:
    modules, inputs = {name: make_expert(seed) for seed, name in enumerate(NAMES)}, make_inputs(DEEP)
    expected = {name: module(*inputs) for name, module in modules.items()}
    placed, residency = place_experts(modules.items(), device=CPU, weights="fsdp_offload", swap=False, num_ahead=2)
    assert isinstance(residency, BlockStream)
    for name in NAMES:
        residency.activate(name)
        assert torch.equal(placed[name](*inputs), expected[name])
        assert len(blocks_here(modules[name])) == 3, "the block that ran last, and prefetch_blocks ahead of it"


@pytest.fixture
def free_gib(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def set_free(gib: float) -> None:
        monkeypatch.setattr(working_memory, "free_device_memory_bytes", lambda device: round(gib * GIB))

    return set_free


def test_blocks_fit_into_what_a_forward_leaves_free(free_gib: Callable[[float], None]) -> None:
    module = make_expert(1)
    block_bytes = bytes_of(module.blocks[0])
    tokens = torch.zeros(1, 45, DEEP.dim)
    assert blocks_that_fit(module, tokens) == 0, "a CPU's memory holds the weights in any case"
    work = forward_bytes(DEEP, 45, dtype=torch.float32) - tokens.nbytes + RESERVE_BYTES
    for num_fit in (0, 1, 6):
        free_gib((work + num_fit * block_bytes + 10) / GIB)
        assert blocks_that_fit(module, tokens) == num_fit
    free_gib(0)
    assert blocks_that_fit(module, tokens) == 0


def test_what_the_caches_will_hold_is_left_free(free_gib: Callable[[float], None]) -> None:
    module = make_expert(1)
    tokens = torch.zeros(1, 45, DEEP.dim)
    block_bytes = bytes_of(module.blocks[0])
    needed = forward_bytes(DEEP, 45, dtype=torch.float32) - tokens.nbytes + RESERVE_BYTES + 5 * block_bytes
    residuals, both_passes = 2 * tokens.nbytes, 2
    texts = 2 * NUM_BLOCKS * DEEP.text_len * DEEP.dim * 4

    def is_needed() -> bool:
        """Whether five blocks fit into the bytes that are needed, and into fewer not."""
        found = []
        for num_bytes in (needed, needed - 1):
            free_gib(num_bytes / GIB)
            found.append(blocks_that_fit(module, tokens))
        return found == [5, 4]

    cache = attach_step_cache(module)
    assert is_needed()
    cache.begin_shot(0.1)
    needed += both_passes * residuals
    assert is_needed()
    attach_text_cache(module)
    needed += both_passes * texts
    assert is_needed()
