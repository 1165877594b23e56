"""Adapters change what a transformer computes and never its weights; without one, the modules run as they are."""

from collections.abc import Iterator
from functools import partialmethod
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from storymem_dist.models.adapters import Adapter, Adapters, dtype_of, set_adapters
from storymem_dist.models.compile import compile_blocks
from storymem_dist.models.quantized_linear import QuantizedLinear, quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from tests.helpers.tiny_dit import largest_error, make_dit, make_inputs

CPU = torch.device("cpu")
LINEARS = [
    "blocks.0.self_attn.q",
    "blocks.1.cross_attn.k",
    "blocks.1.ffn.2",
    "text_embedding.0",
    "time_projection.1",
    "head.head",
    "patch_embedding",
]


def products(dit: nn.Module, names: list[str], rank: int = 3, seed: int = 0) -> dict[str, Adapter]:
    """Adapters of low rank for these modules."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        module = dit.get_submodule(name)
        rows, columns = module.weight.flatten(1).shape
        down, up = (0.2 * torch.randn(size, generator=generator) for size in ((rank, columns), (rows, rank)))
        dtype = dtype_of(module)
        found[name] = Adapter(down=down.to(dtype), up=up.to(dtype))
    return found


def exact_changes(dit: nn.Module) -> dict[str, Adapter]:
    """A change of every kind that is no product."""
    generator = torch.Generator().manual_seed(1)

    def like(key: str) -> Tensor:
        return 0.3 * torch.randn(dit.get_parameter(key).shape, generator=generator)

    return {
        "blocks.0.ffn.0": Adapter(weight=like("blocks.0.ffn.0.weight"), bias=like("blocks.0.ffn.0.bias")),
        "blocks.1.self_attn.norm_q": Adapter(weight=like("blocks.1.self_attn.norm_q.weight")),
        "blocks.0.norm3": Adapter(weight=like("blocks.0.norm3.weight"), bias=like("blocks.0.norm3.bias")),
        "blocks.1.norm3": Adapter(bias=like("blocks.1.norm3.bias")),
        "blocks.1": Adapter(modulation=like("blocks.1.modulation")),
        "head": Adapter(modulation=like("head.modulation")),
        "patch_embedding": Adapter(weight=like("patch_embedding.weight")),
    }


def merged(adapters: Adapters) -> WanDiT:
    """The same transformer with the changes in its weights."""
    dit = make_dit()
    for name, adapter in adapters.items():
        module = dit.get_submodule(name)
        if adapter.down is not None and adapter.up is not None:
            module.weight.add_((adapter.up @ adapter.down).view(module.weight.shape))
        for kind in ("weight", "bias", "modulation"):
            if (change := getattr(adapter, kind)) is not None:
                getattr(module, kind).add_(change)
    return dit


def bits(dit: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in dit.named_parameters()}


@pytest.mark.parametrize("kind", ["products", "exact changes", "both"])
def test_adapters_compute_what_merged_weights_compute(kind: str) -> None:
    dit, inputs = make_dit(), make_inputs(batch=2)
    plain, before = dit(*inputs), bits(dit)
    adapters = {}
    if kind != "exact changes":
        adapters |= products(dit, LINEARS)
    if kind != "products":
        for name, one in exact_changes(dit).items():
            parts = adapters.get(name, Adapter())
            adapters[name] = Adapter(down=parts.down, up=parts.up, weight=one.weight, bias=one.bias)
            if one.modulation is not None:
                adapters[name] = one
    num_bytes = set_adapters(dit, adapters, CPU)
    changed = dit(*inputs)
    assert num_bytes == sum(one.num_bytes for one in adapters.values())
    assert largest_error(changed, merged(adapters)(*inputs)) <= 1e-5
    assert largest_error(changed, plain) > 1e-2, "the changes must be seen"
    assert set_adapters(dit, {}, CPU) == 0
    assert torch.equal(dit(*inputs), plain)
    after = bits(dit)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_each_call_replaces_what_was_set_before() -> None:
    dit, inputs = make_dit(), make_inputs()
    first, second = products(dit, LINEARS[:3], seed=1), products(dit, LINEARS[2:], rank=5, seed=2)
    found = []
    for adapters in (first, second, first):
        set_adapters(dit, adapters, CPU)
        found.append(dit(*inputs))
    assert torch.equal(found[0], found[2])
    assert largest_error(found[1], merged(second)(*inputs)) <= 1e-5


@pytest.mark.parametrize("linears", ["int8", "float8"])
def test_the_product_of_8_bit_weights_stays_as_it_is(linears: str) -> None:
    dit = make_dit()
    quantize_linears(dit.blocks, linears)
    layer = dit.get_submodule("blocks.0.ffn.0")
    assert isinstance(layer, QuantizedLinear)
    values, scales = layer.quantize(torch.randn(96, 64, generator=torch.Generator().manual_seed(3)))
    layer.weight.copy_(values)
    layer.row_scale.copy_(scales)
    layer.bias.zero_()
    x = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(4))
    base = layer(x)
    (adapter,) = products(dit, ["blocks.0.ffn.0"]).values()
    set_adapters(dit, {"blocks.0.ffn.0": adapter}, CPU)
    assert isinstance(layer, QuantizedLinear)
    torch.testing.assert_close(layer(x), base + x @ (adapter.up @ adapter.down).T, atol=1e-5, rtol=1e-5)
    set_adapters(dit, {}, CPU)
    assert torch.equal(layer(x), base)


def test_the_dtype_is_that_in_which_a_module_computes() -> None:
    dit = make_dit(dtype=torch.bfloat16)
    quantize_linears(dit.blocks, "int8")
    assert dtype_of(dit.get_submodule("blocks.0.ffn.0")) == torch.bfloat16
    assert dtype_of(dit.get_submodule("patch_embedding")) == torch.bfloat16
    for name in ("head.head", "time_embedding.0", "blocks.0.norm3", "blocks.0.self_attn.norm_q", "blocks.0", "head"):
        assert dtype_of(dit.get_submodule(name)) == torch.float32


@pytest.fixture
def counted() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_compiled_blocks_are_compiled_once_more_for_the_adapters_of_all_shots(counted: None) -> None:
    dit, eager = make_dit(dtype=torch.bfloat16), make_dit(dtype=torch.bfloat16)
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager")):
        compile_blocks(dit)
    whole = [name for name, module in dit.named_modules() if isinstance(module, nn.Linear)]
    shots = [
        {},
        products(dit, whole, rank=4),
        products(dit, ["blocks.1.ffn.2"], rank=16, seed=1),
        {},
        products(dit, LINEARS, rank=9, seed=2),
        products(dit, ["blocks.0.self_attn.q", "blocks.0.ffn.0"], rank=1, seed=3),
        {},
        products(dit, whole, rank=17, seed=4),
        products(dit, LINEARS, rank=32, seed=5),
    ]
    graphs = []
    for times, adapters in enumerate(shots, start=3):
        set_adapters(dit, adapters, CPU)
        set_adapters(eager, adapters, CPU)
        inputs = make_inputs(times=times)
        assert largest_error(dit(*inputs), eager(*inputs)) <= 2**-7
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 3, 3, 3, 3, 3, 3, 3], "one with adapters of any rank, one without them afterwards"
