"""Steps 2 and 3: attention kernels on the shapes of A14B, and matrix products in every number format."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from benchmarks.gpu_steps.step import Bench, Row, attempt
from benchmarks.harness import kernel_names
from storymem_dist.errors import ConfigError
from storymem_dist.models.attention import attend_with_lse, relative_distance, start_backend, stop_backend
from storymem_dist.models.attention_choice import CANDIDATES, AttentionForm, choose_kernel, seconds_of
from storymem_dist.models.quantized_linear import LINEARS, QuantizedLinear, quantize_linears

_CHECKED_ROWS = 16
_COMPARED_ROWS = 4096


def time_attention(bench: Bench) -> Iterator[Row]:
    """Every kernel on every form: contiguous and Ulysses-strided, with and without log-sum-exp, and what auto takes."""
    sizes, device = bench.sizes, bench.device
    heads, head_dim, dtype = sizes.config.num_heads, sizes.config.head_dim, sizes.dtype
    kernels = [kernel for kernel in ("auto", *CANDIDATES) if _starts(kernel, device, dtype, head_dim)]
    for tokens in sizes.attention_tokens:
        for strided in (False, True):
            for with_lse in (False, True):
                form = AttentionForm(
                    num_tokens=tokens,
                    num_heads=heads // (sizes.ulysses if strided else 1),
                    head_dim=head_dim,
                    dtype=dtype,
                    strided=strided,
                    with_lse=with_lse,
                )
                yield from _times_of(kernels, form, device, with_names=tokens == sizes.attention_tokens[0])
    form = AttentionForm(num_tokens=sizes.attention_tokens[1], num_heads=heads, head_dim=head_dim, dtype=dtype)
    row = _described(form) | {"kernel": "the choice of auto"}
    yield attempt(row, lambda: {"device kernel": str(choose_kernel(form, device))})


def _starts(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel can be used; step 1 says why not."""
    try:
        start_backend(kernel, device=device, dtype=dtype, head_dim=head_dim)
    except ConfigError:
        return False
    finally:
        stop_backend(kernel)
    return True


def _times_of(kernels: list[str], form: AttentionForm, device: torch.device, *, with_names: bool) -> Iterator[Row]:
    q, k, v = form.inputs(device)
    rows = slice(0, form.num_tokens, -(-form.num_tokens // _CHECKED_ROWS))
    exact = attend_with_lse(q[:, rows], k, v, "sdpa_math")[0]

    def measure(kernel: str) -> Row:
        try:
            start_backend(kernel, device=device, dtype=form.dtype, head_dim=form.head_dim)
            error = relative_distance(form.run(kernel, q, k, v)[:, rows], exact)
            seconds = seconds_of(lambda: form.run(kernel, q, k, v), device)
            names = kernel_names(lambda: form.run(kernel, q, k, v), device) if with_names else []
        finally:
            stop_backend(kernel)
        measured = {"ms": seconds * 1e3, "TFLOP/s": form.tflop / seconds, "difference": error}
        return measured | ({"device kernel": names[0][:60]} if names else {})

    for kernel in kernels:
        yield attempt(_described(form) | {"kernel": kernel}, measure, kernel)


def _described(form: AttentionForm) -> Row:
    memory = "Ulysses-strided" if form.strided else "contiguous"
    lse = "with lse" if form.with_lse else ""
    return {"tokens": form.num_tokens, "heads": form.num_heads, "memory": memory, "lse": lse}


def time_products(bench: Bench) -> Iterator[Row]:
    """bf16 and 8-bit products: torch's bare operator, and the layer that also scales its tokens."""
    config = bench.sizes.config
    for num_rows in bench.sizes.linear_rows:
        for width, out in ((config.dim, config.dim), (config.dim, config.ffn_dim)):
            yield from _times_of_products(num_rows, width, out, bench.device)


def _times_of_products(num_rows: int, width: int, out: int, device: torch.device) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(num_rows, width, generator=generator, device=device).bfloat16()
    exact = nn.Linear(width, out, device=device, dtype=torch.bfloat16).requires_grad_(False)
    compared = x[:_COMPARED_ROWS]
    expected = F.linear(compared.float(), exact.weight.float(), exact.bias.float())
    tflop = 2 * num_rows * width * out / 1e12

    def time_product(make: Callable[[], Callable[[], Tensor]]) -> Row:
        seconds = seconds_of(make(), device)
        return {"ms": seconds * 1e3, "TFLOP/s": tflop / seconds}

    def time_layer(linears: str) -> Row:
        layer = _layer(exact, linears)
        return time_product(lambda: lambda: layer(x)) | {"difference": relative_distance(layer(compared), expected)}

    row: Row = {"rows": num_rows, "in": width, "out": out}
    for name, make in _products(exact, x).items():
        yield attempt(row | {"what": name}, time_product, make)
    for linears in LINEARS:
        yield attempt(row | {"what": f"layer, {linears}"}, time_layer, linears)


def _products(exact: nn.Linear, x: Tensor) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """By name, what makes the call of a bare product; making it may fail where the device lacks the format."""
    num_rows, device = len(x), x.device

    def scaled(fast: bool) -> Callable[[], Tensor]:
        a, b = x.to(torch.float8_e4m3fn), exact.weight.to(torch.float8_e4m3fn).t()
        ones: list[Any] = [torch.ones(num_rows, 1, device=device), torch.ones(1, b.shape[1], device=device)]
        return lambda: F.scaled_mm(
            a,
            b,
            ones[0],
            ScalingType.RowWise,
            ones[1],
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    def integers() -> Callable[[], Tensor]:
        a, b = x.to(torch.int8), exact.weight.to(torch.int8).t()
        return lambda: torch._int_mm(a, b)

    return {
        "mm, bfloat16": lambda: lambda: torch.mm(x, exact.weight.t()),
        "scaled_mm, fp32 sums": lambda: scaled(False),
        "scaled_mm, fast sums": lambda: scaled(True),
        "_int_mm": integers,
    }


def _layer(exact: nn.Linear, linears: str) -> nn.Module:
    layers = nn.Sequential(exact)
    quantize_linears(layers, linears)
    layer = layers[0]
    if isinstance(layer, QuantizedLinear):
        values, scales = layer.quantize(exact.weight.float())
        layer.weight.copy_(values)
        layer.row_scale.copy_(scales)
        layer.bias.copy_(exact.bias)
    return layer
