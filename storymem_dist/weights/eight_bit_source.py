"""Turns the 8-bit weights of other programs back into numbers: float8 without and with scales, and int8 with scales.

The scales of a weight ``X.weight`` are stored as ``X.scale_weight`` or ``X.weight_scale``: one for the weight, or one
per row. Files of ComfyUI also hold ``scaled_fp8``, ``X.scale_input``, ``X.input_scale`` and ``X.comfy_quant``, which
concern the inputs of layers, and ``spiece_model`` (a tokenizer). They are hidden. Knows nothing about models.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError
from storymem_dist.weights.loading import TensorSource
from storymem_dist.weights.state_dict import first_keys
from storymem_dist.weights.wrapped_source import WrappedSource

_SCALES = (".scale_weight", ".weight_scale")
_MARKER = "scaled_fp8"
_NO_WEIGHTS = (_MARKER, "spiece_model")
_FORMAT = ".comfy_quant"
_UNUSED = (".scale_input", ".input_scale", _FORMAT)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EIGHT_BITS = (*_FLOAT8, torch.int8)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_OTHER_FILES = "use a bf16, fp16, fp8 or fp8_scaled file of the same weights"


def with_full_numbers(stored: TensorSource) -> TensorSource:
    """``stored`` itself, or what reads its 8-bit weights as numbers.

    Raises ``CheckpointError`` for 8-bit weights without their scales, and for formats that are not read.
    """
    keys = stored.keys()
    is_eight_bit = any(map(_is_hidden, keys)) or any(_is_packed(stored, key) for key in keys)
    return EightBitSource(stored) if is_eight_bit else stored


def _is_hidden(key: str) -> bool:
    """Whether it is a scale, a marker or something else that is no weight."""
    return key in _NO_WEIGHTS or key.endswith((*_SCALES, *_UNUSED))


def _is_packed(stored: TensorSource, key: str) -> bool:
    return stored.dtype(key) in (*_EIGHT_BITS, torch.uint8)


class EightBitSource(WrappedSource):
    """A ``TensorSource``: scaled weights in fp32, float8 without scales in bf16 (both exact), others as stored."""

    def __init__(self, stored: TensorSource) -> None:
        keys = stored.keys()
        super().__init__(stored, [key for key in keys if not _is_hidden(key)])
        scales = [key for key in keys if key.endswith(_SCALES)]
        self._scales = {f"{key.rpartition('.')[0]}.weight": key for key in scales}
        self._check_formats([key for key in keys if key.endswith(_FORMAT)])
        for weight, scale in self._scales.items():
            self._check_scale(weight, scale)
        self._check_scales_are_there(is_scaled=_MARKER in keys or bool(scales))

    def _check_formats(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                name = json.loads(bytes(self._stored.read(key).tolist()))["format"]
            except (ValueError, TypeError, KeyError):
                name = "an unknown format"
            if name not in _FORMATS:
                raise CheckpointError(
                    f"{self.name}: {key.removesuffix(_FORMAT)} is stored as {name}, which is not read; {_OTHER_FILES}"
                )

    def _check_scale(self, weight: str, scale: str) -> None:
        if weight not in self._keys:
            raise CheckpointError(f"{self.name}: {scale} is there, but {weight}, which it belongs to, is missing")
        shape, dtype = self._stored.shape(scale), self._stored.dtype(scale)
        rows = self._stored.shape(weight)[:1].numel()
        if dtype not in _SCALE_DTYPES or (shape.numel() != 1 and shape not in ((rows,), (rows, 1))):
            raise CheckpointError(
                f"{self.name}: {scale} is {str(dtype)[6:]} of shape {list(shape)}; read are one scale per weight or "
                f"one per row ({rows}), in 32 or 16 bits; {_OTHER_FILES}"
            )

    def _check_scales_are_there(self, *, is_scaled: bool) -> None:
        keys = [key for key in self._keys if _is_packed(self._stored, key) and key not in self._scales]
        bare = [key for key in keys if is_scaled or self._stored.dtype(key) not in _FLOAT8]
        if bare:
            kinds = ", ".join(sorted({str(self._stored.dtype(key))[6:] for key in bare}))
            raise CheckpointError(
                f"{self.name}: an 8-bit file ({kinds}) without the scales of: {first_keys(bare)}; the file is "
                f"incomplete or of a format that is not read; {_OTHER_FILES}"
            )

    def dtype(self, key: str) -> torch.dtype:
        """fp32 for scaled weights, bf16 for other float8 ones."""
        if key in self._scales:
            return torch.float32
        stored = self._stored.dtype(key)
        return torch.bfloat16 if stored in _FLOAT8 else stored

    def stored_dtype(self, key: str) -> torch.dtype:
        """The type in the file."""
        return self._stored.dtype(key)

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """Rows in fresh memory."""
        if key not in self._scales and self._stored.dtype(key) not in _FLOAT8:
            return super().read(key, rows, pin_memory=pin_memory)
        values = self._stored.read(key, rows).to(self.dtype(key))
        if key in self._scales:
            scales = self._row_scales(key, rows if rows is not None else slice(None))
            values = values.mul_(scales.view(-1, *[1] * (values.ndim - 1)))
        return values.pin_memory() if pin_memory else values

    def kept_scales(self, key: str, rows: slice, dtype: torch.dtype) -> Tensor | None:
        """See ``loading.KeepsScales``; float8 without scales is exact in any 8-bit layer, so it needs none."""
        if key not in self._scales or self._stored.dtype(key) != dtype:
            return None
        return self._row_scales(key, rows)

    def _row_scales(self, key: str, rows: slice) -> Tensor:
        """fp32 scales of rows: one each."""
        scale, num_rows = self._scales[key], len(range(*rows.indices(self.shape(key)[0])))
        if self._stored.shape(scale).numel() == 1:
            return self._stored.read(scale).float().reshape(1).expand(num_rows)
        return self._stored.read(scale, rows).float().flatten()
