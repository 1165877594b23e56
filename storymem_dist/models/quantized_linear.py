"""8-bit linear layers: faster and smaller, but lossy (``benchmarks/lossy_errors.py`` measures the errors).

Weights are float8 (e4m3) or int8 with one scale per output row; each token gets its own scale during the forward. Each
row is quantized alone, so the bits of a weight or token do not depend on how rows or tokens are split over ranks. torch
computes the products. Knows nothing about Wan, files or ranks.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from storymem_dist.errors import ConfigError

LINEARS = ("exact", "float8", "float8_fast", "int8")
"""The values of ``model.linears``: the layers as trained, or one of the formats here."""

_SMALLEST = 2.0**-100
"""Rows whose largest magnitude is below this count as zero: fp32 could not hold their scale."""

_LEAST_INT_MM_ROWS = 17
"""``torch._int_mm`` rejects fewer rows on CUDA."""

_TRIED_SIZE = 32

ROWS_AT_ONCE = 8192
"""Most rows that one eager product takes: their fp32 copies and int32 sums would be the widest tensors of a forward."""


class QuantizedLinear(nn.Module, ABC):
    """``nn.Linear`` in eight bits: ``weight [out, in]``, ``row_scale [out]`` (fp32) and ``bias [out]``.

    A new layer is uninitialized: ``weights.loading`` fills it and quantizes its weights. Raises ``ConfigError`` for
    sizes that CUDA's kernels do not support (checked on every device).
    """

    weight_dtype: ClassVar[torch.dtype]
    largest_value: ClassVar[int]  # an int, because a float would become an input of compiled graphs
    sizes_multiple_of: ClassVar[int]

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = like.weight.shape
        for size in (self.in_features, self.out_features):
            if size % self.sizes_multiple_of:
                raise ConfigError(
                    f"a layer of {self.in_features} x {self.out_features} cannot be {self.weight_dtype}: "
                    f"{size} is not a multiple of {self.sizes_multiple_of}; use model.linears=exact"
                )
        device = like.weight.device
        self.weight = _constant(torch.empty_like(like.weight, dtype=self.weight_dtype))
        self.row_scale = _constant(torch.empty(self.out_features, dtype=torch.float32, device=device))
        self.bias = _constant(torch.empty_like(like.bias))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]`` in the dtype of ``x``.

        Eager code takes at most ``ROWS_AT_ONCE`` rows at a time, with the same result. A compiler sees all rows at
        once: it fuses the scaling into one pass, and a loop would fix the number of rows in the graph.
        """
        rows = x.flatten(0, -2)
        if torch.compiler.is_compiling() or len(rows) <= ROWS_AT_ONCE:
            return self._of_rows(rows).unflatten(0, x.shape[:-1])
        out = rows.new_empty(len(rows), self.out_features)
        num_parts = -(-len(rows) // ROWS_AT_ONCE)
        # Parts of about the same size: a rest of a few rows could be given to another kernel.
        for part, result in zip(rows.tensor_split(num_parts), out.tensor_split(num_parts), strict=True):
            result.copy_(self._of_rows(part))
        return out.unflatten(0, x.shape[:-1])

    def _of_rows(self, rows: Tensor) -> Tensor:
        largest = rows.abs().amax(dim=1, keepdim=True).float()
        scale = largest.clamp_min(_SMALLEST) / self.largest_value
        return self._product(rows / scale, scale).to(rows.dtype)

    @abstractmethod
    def _product(self, rows: Tensor, scale: Tensor) -> Tensor:
        """The layer's result from fp32 ``rows [M, in]`` within the format's range and their ``scale [M, 1]``."""

    @classmethod
    @abstractmethod
    def quantize(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``[n, m]`` and fp32 scales ``[n]`` of fp32 weight rows ``[n, m]``, about ``values * scales``."""


class Float8Linear(QuantizedLinear):
    """e4m3 weights and tokens. Product and bias are in bf16, the only type that CUDA supports with scales per row.

    Sums are full fp32, which costs speed on Hopper: its tensor cores add float8 products in fewer bits.
    """

    weight_dtype = torch.float8_e4m3fn
    largest_value = int(torch.finfo(torch.float8_e4m3fn).max)
    sizes_multiple_of = 16
    fast_sums: ClassVar[bool] = False

    def _product(self, rows: Tensor, scale: Tensor) -> Tensor:
        return F.scaled_mm(
            rows.to(self.weight_dtype),
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.row_scale[None],
            ScalingType.RowWise,
            bias=self.bias.bfloat16(),
            output_dtype=torch.bfloat16,
            use_fast_accum=self.fast_sums,
        )

    @classmethod
    def quantize(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See ``QuantizedLinear.quantize``; the scales are powers of two.

        So ``values * scales`` is exact in bf16, and quantizing it again gives the same numbers: weights prepared as
        float8 (``weights/prepared.py``) lose nothing more here.
        """
        largest = rows.abs().amax(dim=1)
        powers = torch.exp2(torch.ceil(torch.log2(largest / cls.largest_value)))
        scales = torch.where(largest > _SMALLEST, powers, 1.0)
        return (rows / scales[:, None]).to(cls.weight_dtype), scales


class Float8FastLinear(Float8Linear):
    """The same weights and tokens with the tensor cores' own, shorter sums (torch's ``use_fast_accum``).

    Faster and less exact on Hopper, the only architecture for which torch documents it. A CPU gives the same bits.
    """

    fast_sums = True


class Int8Linear(QuantizedLinear):
    """int8 weights and tokens, symmetric, for devices without float8; sums are exact in int32."""

    weight_dtype = torch.int8
    largest_value = 127
    sizes_multiple_of = 8

    def _product(self, rows: Tensor, scale: Tensor) -> Tensor:
        num_rows = rows.shape[0]
        values = rows.round().to(self.weight_dtype)
        if num_rows < _LEAST_INT_MM_ROWS:
            values = F.pad(values, (0, 0, 0, _LEAST_INT_MM_ROWS - num_rows))
        sums = torch._int_mm(values, self.weight.t())[:num_rows]
        return torch.addcmul(self.bias.float(), sums * scale, self.row_scale)

    @classmethod
    def quantize(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See ``QuantizedLinear.quantize``."""
        scales = rows.abs().amax(dim=1).clamp_min(_SMALLEST) / cls.largest_value
        return (rows / scales[:, None]).round().to(cls.weight_dtype), scales


_LAYERS: dict[str, type[QuantizedLinear]] = {
    "float8": Float8Linear,
    "float8_fast": Float8FastLinear,
    "int8": Int8Linear,
}


def quantize_linears(module: nn.Module, linears: str) -> None:
    """Replace every ``nn.Linear`` inside ``module`` by a layer of the format ``linears`` (one of ``LINEARS``).

    Call it before weights are loaded, usually on the meta device. Names of weights and biases do not change.
    """
    if linears == "exact":
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _LAYERS[linears](child))


def format_of(layer: nn.Module) -> str:
    """Return which of ``LINEARS`` the format of ``layer`` is."""
    return next((name for name, kind in _LAYERS.items() if type(layer) is kind), "exact")


@torch.no_grad()
def check_linears(linears: str, device: torch.device) -> None:
    """Multiply once on ``device`` in the format ``linears``; raise ``ConfigError`` if the device cannot."""
    if linears == "exact":
        return
    layer = _LAYERS[linears](nn.Linear(_TRIED_SIZE, _TRIED_SIZE, device=device))
    for parameter in layer.parameters():
        parameter.zero_()
    try:
        layer(torch.zeros(_TRIED_SIZE, _TRIED_SIZE, dtype=torch.bfloat16, device=device))
    except RuntimeError as error:
        others = "exact" if linears == "int8" else "int8 or exact"
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"model.linears={linears}: this {device.type} device with torch {torch.__version__} cannot multiply in "
            f"this format ({reason}); use model.linears={others}"
        ) from None


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
