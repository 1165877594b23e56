"""Compiled blocks compute what eager ones do, and one compilation serves a whole story.

Only the compiler's front end is used (``aot_eager``, ``eager``): it traces, functionalizes and decides about
recompilation as always, but does not spend minutes on generating C++. ``benchmarks/step.py`` runs the whole compiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from storymem_dist.diffusion.text_cache import attach_text_cache
from storymem_dist.models.compile import compilations_marked, compile_blocks
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import TINY
from storymem_dist.parallel.loading import place_experts
from storymem_dist.weights.loading import StateDictSource, load_dit_weights

STORY = (1, 3, 6, 9, 10)  # memory frames of the shots of one story


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_dit(dtype: torch.dtype, seed: int = 0) -> WanDiT:
    torch.manual_seed(seed)
    return WanDiT(TINY.i2v, dtype=dtype).requires_grad_(False)


def quantized(dit: WanDiT, linears: str) -> WanDiT:
    layers = WanDiT(dit.config, dtype=dit.dtype).requires_grad_(False)
    quantize_linears(layers.blocks, linears)
    load_dit_weights(layers, StateDictSource("here", dit.state_dict()))
    return layers


def run(dit: WanDiT, num_memory: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_memory)
    x = torch.randn(1, 36, num_memory + 3, 4, 6, generator=generator)
    context = torch.randn(1, 9, TINY.i2v.text_dim, generator=generator)
    positions = torch.tensor([*range(-5 * num_memory, 0, 5), 0, 1, 2])
    with torch.no_grad():
        return dit(x, torch.tensor([700]), context, positions)


def compile_with(backend: str, dit: WanDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
        compile_blocks(dit)


def test_compiled_blocks_equal_eager_ones_in_one_graph_and_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = make_dit(torch.float32), make_dit(torch.float32)
    compile_with("aot_eager", compiled, monkeypatch)
    for num_memory in STORY[:2]:
        torch.testing.assert_close(run(compiled, num_memory), run(eager, num_memory), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_kept_text_keys_cost_one_more_graph_and_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, dit = make_dit(torch.bfloat16), make_dit(torch.bfloat16)
    cache = attach_text_cache(dit)
    compile_with("eager", dit, monkeypatch)
    num_graphs = []
    for num_memory in STORY:
        cache.forget()
        for _ in range(2):
            with cache.during("cond"):
                assert torch.equal(run(dit, num_memory), run(eager, num_memory))
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs == [2] * len(STORY)
    assert not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_recompiled_in_a_story_nor_for_the_other_expert(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [make_dit(dtype, seed) for seed in range(2)]
    for expert in experts:
        compile_with("eager", expert, monkeypatch)
    run(experts[0], STORY[0])
    after_the_first_forward = counters["stats"]["unique_graphs"]
    # In fp32 the first block's tokens are a view of a matrix product; in bf16 they are a copy, as in other blocks.
    assert after_the_first_forward == (2 if dtype == torch.float32 else 1)
    for expert in experts:
        for num_memory in STORY:
            run(expert, num_memory)
    assert counters["stats"]["unique_graphs"] == after_the_first_forward


SIZES = [(4, 8, 6), (3, 4, 6), (8, 16, 16), (4, 8, 8), (2, 4, 4), (5, 10, 12), (21, 6, 4)]
"""Latent frames, height, width. In the first, there are as many frames as rows of tokens (T = h); in others, as many
tokens as text tokens (512), as channels (64), or as a head has."""


@pytest.mark.parametrize("first", SIZES)
def test_no_size_of_the_first_shot_is_special(first: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    dit = make_dit(torch.bfloat16)
    compile_with("eager", dit, monkeypatch)
    num_graphs = []
    for times, height, width in (first, *SIZES):
        x = torch.randn(1, 36, times, height, width)
        with torch.no_grad():
            dit(x, torch.tensor([700]), torch.randn(1, 9, TINY.i2v.text_dim), torch.arange(times))
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs == [1] * (1 + len(SIZES))


def test_a_story_is_compiled_into_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """T2V, then M2V with a growing memory; the first step of a shot also keeps the text's keys."""
    torch.manual_seed(0)
    experts = [(config, WanDiT(config, dtype=torch.bfloat16).requires_grad_(False)) for config in (TINY.t2v, TINY.i2v)]
    num_graphs = []
    for (config, dit), numbers in zip(experts, ([0], STORY), strict=True):
        cache = attach_text_cache(dit)
        compile_with("eager", dit, monkeypatch)
        for num_memory in numbers:
            cache.forget()
            for _ in range(2):
                x = torch.randn(1, config.in_dim, num_memory + 3, 4, 6)
                with torch.no_grad(), cache.during("cond"):
                    dit(x, torch.tensor([700]), torch.randn(1, 9, config.text_dim), torch.arange(num_memory + 3))
            num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs == [2] * (1 + len(STORY))


def test_the_time_of_the_compiler_is_a_stage_of_the_first_shot_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        stages.append(f"{name} begins")
        yield
        stages.append(f"{name} ends")

    eager, dit = make_dit(torch.bfloat16), make_dit(torch.bfloat16)
    compile_with("eager", dit, monkeypatch)
    for shot in range(2):
        with compilations_marked(stage):
            run(eager, 3)
            run(dit, 3)
        assert stages == ["compile begins", "compile ends"], shot
    torch._dynamo.reset()
    run(dit, 3)
    assert len(stages) == 2, "nobody listens after a shot"


@pytest.mark.parametrize("stream", [False, True])
def test_experts_that_take_turns_on_the_device_are_compiled_once(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names, cpu = ("high_noise", "low_noise"), torch.device("cpu")
    eager = {name: make_dit(torch.bfloat16, seed) for seed, name in enumerate(names)}
    experts = {name: make_dit(torch.bfloat16, seed) for seed, name in enumerate(names)}
    for expert in experts.values():
        compile_with("eager", expert, monkeypatch)
    _, residency = place_experts(
        experts.items(), device=cpu, weights="replicated", swap=not stream, stream=stream, num_ahead=0
    )
    for name in (*names, *names):
        residency.activate(name)
        assert torch.equal(run(experts[name], 3), run(eager[name], 3))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("linears", ["float8", "int8"])
def test_layers_in_eight_bits_are_compiled_once_too_and_without_leaving_the_graph(
    linears: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [quantized(make_dit(torch.bfloat16, seed), linears) for seed in range(2)]
    eager = quantized(make_dit(torch.bfloat16), linears)
    for expert in experts:
        compile_with("aot_eager", expert, monkeypatch)
    for expert in experts:
        for num_memory in STORY:
            run(expert, num_memory)
    torch.testing.assert_close(run(experts[0], 3), run(eager, 3), atol=2e-2, rtol=2e-2)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
