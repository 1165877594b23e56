"""8-bit layers: how weights and tokens are rounded, and that the products are those of the rounded numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storymem_dist.errors import ConfigError
from storymem_dist.models import quantized_linear
from storymem_dist.models.quantized_linear import (
    Float8FastLinear,
    Float8Linear,
    Int8Linear,
    QuantizedLinear,
    check_linears,
    quantize_linears,
)
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.weights.loading import StateDictSource, load_dit_weights
from tests.helpers.tiny_dit import CONFIG, make_dit, make_inputs

KINDS: dict[str, type[QuantizedLinear]] = {
    "float8": Float8Linear,
    "float8_fast": Float8FastLinear,
    "int8": Int8Linear,
}
IN, OUT = 80, 112
FORMATS = pytest.mark.parametrize("linears", KINDS)


def random_rows(num_rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows whose magnitudes differ by many powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator) * torch.logspace(-6, 6, num_rows)[:, None]


def make_layer(linears: str, dtype: torch.dtype = torch.bfloat16) -> tuple[QuantizedLinear, Tensor]:
    """A layer, and its quantized weight in fp64."""
    torch.manual_seed(1)
    exact = nn.Sequential(nn.Linear(IN, OUT))
    layers = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype))
    quantize_linears(layers, linears)
    load_dit_weights(layers, StateDictSource("here", exact.state_dict()))
    layer = layers[0]
    return layer, layer.weight.double() * layer.row_scale.double()[:, None]


def quantized_tokens(x: Tensor, linears: str) -> Tensor:
    """The quantized tokens in fp64, recomputed here token by token."""
    rows = []
    for token in x.float():
        scale = token.abs().max() / {"float8": 448, "float8_fast": 448, "int8": 127}[linears]
        values = token / scale
        values = values.round() if linears == "int8" else values.to(torch.float8_e4m3fn).float()
        rows.append(values.double() * scale.double())
    return torch.stack(rows)


def test_float8_weights_keep_four_bits_of_every_number() -> None:
    rows = random_rows(60, 300)
    values, scales = Float8Linear.quantize(rows)
    assert values.dtype == torch.float8_e4m3fn
    error = (values.float() * scales[:, None] - rows).abs()
    largest = rows.abs().amax(dim=1, keepdim=True)
    assert (error <= torch.maximum(rows.abs() * 2**-4, largest * 2**-17)).all()
    assert (error > rows.abs() * 2**-5).any()


def test_int8_weights_are_off_by_half_a_step_at_most() -> None:
    rows = random_rows(60, 300)
    values, scales = Int8Linear.quantize(rows)
    assert values.dtype == torch.int8
    steps = (values.float() * scales[:, None] - rows).abs() / (rows.abs().amax(dim=1, keepdim=True) / 127)
    assert steps.max() <= 0.5 * (1 + 1e-4)
    assert values.abs().amax(dim=1).eq(127).all(), "the largest number of a row must use the whole range"


@FORMATS
@pytest.mark.parametrize("row", [torch.zeros(32), torch.full((32,), 1e-40)], ids=["zeros", "denormals"])
def test_rows_without_a_scale_become_zeros(linears: str, row: Tensor) -> None:
    values, scales = KINDS[linears].quantize(torch.stack([row, torch.ones(32)]))
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    assert torch.equal((values.float() * scales[:, None])[0], torch.zeros(32))


def test_quantizing_float8_numbers_again_changes_none() -> None:
    for seed in range(20):
        values, scales = Float8Linear.quantize(random_rows(60, 3, seed))
        kept = values.float() * scales[:, None]
        assert torch.equal(kept, kept.bfloat16().float())
        again, new_scales = Float8Linear.quantize(kept)
        assert torch.equal(again.float() * new_scales[:, None], kept)


@FORMATS
def test_a_row_is_quantized_alone(linears: str) -> None:
    rows = random_rows(40, 64)
    whole = KINDS[linears].quantize(rows)
    parts = [KINDS[linears].quantize(rows[start : start + 10]) for start in range(0, 40, 10)]
    for index in (0, 1):
        found, expected = torch.cat([part[index] for part in parts]), whole[index]
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_quantized_numbers(linears: str, dtype: torch.dtype) -> None:
    layer, weight = make_layer(linears, dtype)
    x = random_rows(50, IN).to(dtype).view(2, 25, IN)
    found = layer(x)
    assert (found.shape, found.dtype) == ((2, 25, OUT), dtype)
    tokens = quantized_tokens(x.flatten(0, 1), linears)
    bias = layer.bias if linears == "int8" else layer.bias.bfloat16()
    expected = tokens @ weight.T + bias.double()
    # bf16 has 8 bits; the rest is the rounding of the fp32 sum, whose products may be larger than the result.
    result_bits = 23 if dtype == torch.float32 and linears == "int8" else 8
    allowed = expected.abs() * 2**-result_bits + (tokens.abs() @ weight.abs().T) * 2**-20
    assert ((found.flatten(0, 1).double() - expected).abs() <= allowed).all()


@FORMATS
def test_a_result_is_near_the_exact_one(linears: str) -> None:
    """Measured: 3.8% (float8: two roundings to 4 bits) and 0.8% (int8: two roundings to 255 steps)."""
    torch.manual_seed(2)
    exact = nn.Linear(512, 512)
    layers = nn.Sequential(nn.Linear(512, 512))
    quantize_linears(layers, linears)
    load_dit_weights(layers, StateDictSource("here", {f"0.{name}": p for name, p in exact.state_dict().items()}))
    x = torch.randn(64, 512)
    with torch.no_grad():
        error = ((layers(x) - exact(x)).norm() / exact(x).norm()).item()
    low, high = (0.004, 0.012) if linears == "int8" else (0.02, 0.05)
    assert low < error < high


@FORMATS
def test_zero_and_huge_tokens_give_finite_results(linears: str) -> None:
    layer, _ = make_layer(linears)
    x = torch.randn(20, IN).bfloat16()
    x[3] = 0
    x[4] *= 1e30
    found = layer(x)
    assert torch.isfinite(found).all()
    assert torch.equal(found[3], layer.bias)


@FORMATS
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17])
def test_few_tokens_give_what_they_give_among_many(linears: str, num_tokens: int) -> None:
    layer, _ = make_layer(linears, torch.float32)
    x = torch.randn(40, IN)
    torch.testing.assert_close(layer(x[:num_tokens]), layer(x)[:num_tokens], rtol=2**-7, atol=1e-6)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [65, 128, 200])
def test_many_tokens_are_taken_in_parts_with_the_same_result(
    linears: str, dtype: torch.dtype, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = make_layer(linears, dtype)
    x = random_rows(num_tokens, IN).to(dtype).view(1, num_tokens, IN)
    whole = layer(x)
    sizes: list[int] = []
    product = layer._product
    monkeypatch.setattr(layer, "_product", lambda rows, scale: sizes.append(len(rows)) or product(rows, scale))
    monkeypatch.setattr(quantized_linear, "ROWS_AT_ONCE", 64)
    assert torch.equal(layer(x), whole)
    assert len(sizes) > 1
    assert 32 <= min(sizes) <= max(sizes) <= 64
    assert sum(sizes) == num_tokens


@pytest.mark.parametrize(("linears", "size", "multiple"), [("float8", 72, 16), ("int8", 36, 8)])
def test_sizes_that_cuda_cannot_multiply_are_refused_everywhere(linears: str, size: int, multiple: int) -> None:
    for sizes in ((size, 32), (32, size)):
        with pytest.raises(ConfigError, match=f"{size} is not a multiple of {multiple}; use model.linears=exact"):
            quantize_linears(nn.Sequential(nn.Linear(*sizes)), linears)


def test_exact_changes_nothing() -> None:
    dit = make_dit()
    modules = dict(dit.named_modules())
    quantize_linears(dit.blocks, "exact")
    assert dict(dit.named_modules()) == modules


@FORMATS
def test_the_linears_of_the_blocks_are_replaced_and_no_others(linears: str) -> None:
    with torch.device("meta"):
        exact, dit = WanDiT(CONFIG), WanDiT(CONFIG)
    quantize_linears(dit.blocks, linears)
    parameters, names = dict(dit.named_parameters()), dict(exact.named_parameters())
    changed = {name for name, one in names.items() if parameters[name].dtype != one.dtype}
    assert changed == {name for name, one in names.items() if name.startswith("blocks.") and one.ndim == 2}
    assert len(changed) == 10 * CONFIG.num_layers
    assert {parameters[name].dtype for name in changed} == {KINDS[linears].weight_dtype}
    added = {name.replace(".weight", ".row_scale") for name in changed}
    assert set(parameters) == set(names) | added
    assert {name: parameters[name].shape for name in names} == {name: one.shape for name, one in names.items()}


@FORMATS
@torch.no_grad()
def test_a_transformer_with_such_layers_computes_nearly_the_same(linears: str) -> None:
    """Measured: 6.6e-3 and 1.5e-3. A wrong scale of the weights would give an error near 1."""
    exact = make_dit(replace(CONFIG, in_dim=36))
    dit = WanDiT(exact.config, dtype=torch.float32)
    quantize_linears(dit.blocks, linears)
    load_dit_weights(dit, StateDictSource("here", exact.state_dict()))
    inputs = make_inputs(exact.config)
    expected = exact(*inputs)
    error = ((dit(*inputs) - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < (4e-3 if linears == "int8" else 1.5e-2)


@pytest.mark.float8
@pytest.mark.parametrize("linears", ["float8", "float8_fast"])
def test_only_the_fast_format_asks_for_shorter_sums(linears: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = F.scaled_mm

    def noting(*args: Any, use_fast_accum: bool, **more: Any) -> Tensor:
        asked.append(use_fast_accum)
        return real(*args, use_fast_accum=use_fast_accum, **more)

    monkeypatch.setattr(F, "scaled_mm", noting)
    layer, _ = make_layer(linears)
    layer(torch.randn(20, IN).bfloat16())
    assert asked == [linears == "float8_fast"]


@pytest.mark.float8
def test_a_cpu_gives_the_same_bits_for_fast_and_full_sums() -> None:
    """What docs/lossy.md says about the errors of ``float8_fast`` that were measured on a CPU."""
    x = torch.randn(40, IN).bfloat16()
    assert torch.equal(make_layer("float8")[0](x), make_layer("float8_fast")[0](x))


@FORMATS
def test_this_device_can_multiply(linears: str) -> None:
    check_linears(linears, torch.device("cpu"))
    check_linears("exact", torch.device("meta"))


@pytest.mark.parametrize(
    ("linears", "where", "function", "others"),
    [
        ("float8", F, "scaled_mm", "int8 or exact"),
        ("float8_fast", F, "scaled_mm", "int8 or exact"),
        ("int8", torch, "_int_mm", "exact"),
    ],
)
def test_a_device_that_cannot_multiply_is_refused_with_what_to_use_instead(
    linears: str, where: object, function: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("only supported on CUDA devices with compute capability >= 8.9\nException raised from ...")

    monkeypatch.setattr(where, function, refuse)
    with pytest.raises(ConfigError) as caught:
        check_linears(linears, torch.device("cpu"))
    assert str(caught.value) == (
        f"model.linears={linears}: this cpu device with torch {torch.__version__} cannot multiply in this format (only "
        f"supported on CUDA devices with compute capability >= 8.9); use model.linears={others}"
    )
