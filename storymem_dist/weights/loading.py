"""Streams weights from files into an allocated model: reads only the rows held here, merges LoRAs, casts, copies.

Rows are read in chunks of about ``CHUNK_BYTES``, a few chunks ahead, so a load needs little memory besides the model,
for tensors of any size. Weights of 8-bit layers are quantized row by row, after merging. The caller decides which
process holds which rows (``local_part``). Knows nothing about Wan, LoRA files or process groups.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError
from storymem_dist.models.quantized_linear import QuantizedLinear
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.state_dict import check_no_keys

CHUNK_BYTES = 16 * 2**20
"""Most bytes of one read, unless ``ROW_BLOCK`` rows are larger; also the unit of progress."""

ROW_BLOCK = 256
"""Chunks begin and end at multiples of this many rows of the whole tensor (or at the ends of a local part)."""


class TensorSource(Protocol):
    """Named tensors that can be read in part. Implementations hide layout, names and number format."""

    @property
    def name(self) -> str:
        """Name for messages, usually a path."""

    @property
    def max_concurrent_reads(self) -> int:
        """Number of threads that may be inside ``read`` at once."""

    @property
    def bytes_read(self) -> int:
        """Bytes this process has read from storage."""

    def keys(self) -> Sequence[str]:
        """All names, in the order in which they are read fastest; the same order in every process."""

    def shape(self, key: str) -> torch.Size:
        """Shape of the whole tensor."""

    def dtype(self, key: str) -> torch.dtype:
        """The type that ``read`` returns."""

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """Rows along the first dimension (None: all) in fresh memory, which the caller may overwrite."""


@runtime_checkable
class KeepsScales(Protocol):
    """A ``TensorSource`` of stored 8-bit values, which 8-bit layers can keep without rounding them again."""

    def kept_scales(self, key: str, rows: slice, dtype: torch.dtype) -> Tensor | None:
        """fp32 scales ``[n]`` by which the stored values of ``dtype`` make these rows; None if it is not so stored."""


class SafetensorsSource:
    """A ``TensorSource`` over safetensors files, with names mapped to the model's.

    Args:
        name: for messages.
        files: opened files; together they hold each key once.
        rename: from a name in the files to the model's name.

    Raises:
        CheckpointError: two stored tensors get the same name.
    """

    max_concurrent_reads = 4

    def __init__(self, name: str, files: Iterable[SafetensorsFile], rename: Callable[[str], str] = str) -> None:
        self.name = name
        self._files = tuple(files)
        self._places: dict[str, tuple[SafetensorsFile, str]] = {}
        for file in self._files:
            for stored in file:
                key = rename(stored)
                if key in self._places:
                    raise CheckpointError(f"{file.path}: {stored!r} is also in {self._places[key][0].path}")
                self._places[key] = (file, stored)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read from these files."""
        return sum(file.bytes_read for file in self._files)

    def keys(self) -> Sequence[str]:
        """Names in the order of the files and of the data in them."""
        return tuple(self._places)

    def shape(self, key: str) -> torch.Size:
        """Shape as stored."""
        file, stored = self._places[key]
        return file[stored].shape

    def dtype(self, key: str) -> torch.dtype:
        """Type as stored."""
        file, stored = self._places[key]
        return file[stored].dtype

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """Rows as stored, in fresh memory."""
        file, stored = self._places[key]
        return file.read(stored, rows, pin_memory=pin_memory)


class StateDictSource:
    """A ``TensorSource`` over tensors in memory (or mapped by ``read_state_dict``)."""

    max_concurrent_reads = 1

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self._tensors = tensors
        self.bytes_read = 0

    def keys(self) -> Sequence[str]:
        """Names in the order of the dictionary."""
        return tuple(self._tensors)

    def shape(self, key: str) -> torch.Size:
        """Shape of the whole tensor."""
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Type of the tensor."""
        return self._tensors[key].dtype

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        """A copy of the rows."""
        part = self._tensors[key] if rows is None else self._tensors[key][rows]
        self.bytes_read += part.nbytes
        copy = part.clone(memory_format=torch.contiguous_format)
        return copy.pin_memory() if pin_memory else copy


class WeightDelta(Protocol):
    """An addition to weights while they are loaded, for example a LoRA with its scale."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes of the changed weights, by name."""

    def add_to(self, rows: Tensor, key: str, first_row: int) -> None:
        """Add the delta of weight ``key``, from ``first_row`` on, to fp32 ``rows`` in place, on their device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalPart:
    """The part of a parameter that this process holds: ``num_rows`` rows from ``row_offset`` along the first dimension.

    ``tensor`` is the plain local tensor to fill; its first dimension is ``num_rows`` (0 rows: nothing is held here).
    ``device`` merges, quantizes and casts its rows; None: that of ``tensor``.
    """

    tensor: Tensor
    row_offset: int
    num_rows: int
    device: torch.device | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Numbers of one load. ``bytes_read`` counts the source only, not the deltas."""

    num_tensors: int
    bytes_read: int
    elapsed_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows of one tensor of a source, and the device to bring them to. ``num_bytes`` is their size in the source."""

    key: str
    rows: slice
    device: torch.device
    num_bytes: int


def whole_parameter(name: str, parameter: nn.Parameter) -> LocalPart:
    """The ``local_part`` of a model on one device: all rows."""
    return LocalPart(tensor=parameter.data, row_offset=0, num_rows=parameter.shape[0])


def load_dit_weights(
    model: nn.Module,
    source: TensorSource,
    deltas: Sequence[WeightDelta] = (),
    *,
    local_part: Callable[[str, nn.Parameter], LocalPart] = whole_parameter,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Fill every parameter of ``model`` from ``source``, with ``deltas`` added in order in fp32 before the one cast.

    The weights of a ``QuantizedLinear`` are quantized (from fp32) instead of cast. Where the source stores them in the
    layer's own 8-bit type (``KeepsScales``) and no delta changes them, its values and scales are kept as they are.

    The model's memory exists already (``to_empty``); each parameter keeps its dtype and device. Merging happens on the
    device of its ``LocalPart``. A weight's bits do not depend on how it is cut into local parts.

    Args:
        local_part: returns the rows of a parameter that this process holds, and the tensor for them.
        progress: called in the calling thread with the bytes done and the total bytes of this process.

    Raises:
        CheckpointError: keys or shapes of model, source and deltas do not fit each other, naming the first few.
        ValueError: the model has buffers, which are not loaded (a DiT has none).
    """
    start_seconds, start_bytes = time.perf_counter(), source.bytes_read
    parameters = dict(model.named_parameters())
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise ValueError(f"{type(model).__name__} has buffers, which would stay unset: {', '.join(buffers)}")
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    scales = {f"{key.removesuffix('.weight')}.row_scale": key for key in layers}
    shapes = {name: parameter.shape for name, parameter in parameters.items() if name not in scales}
    check_keys(shapes, source)
    check_deltas(shapes, deltas)
    keys = source.keys()
    parts = {key: local_part(key, parameters[key]) for key in keys}
    for key, part in parts.items():
        assert part.tensor.shape == (part.num_rows, *shapes[key][1:]), f"local part of {key} has the wrong shape"
    scale_parts = {key: local_part(name, parameters[name]) for name, key in scales.items()}
    for key, part in scale_parts.items():
        same = (part.row_offset, part.num_rows) == (parts[key].row_offset, parts[key].num_rows)
        assert same, f"{key} and its scales are cut differently"
    ranges = [
        found
        for key, part in parts.items()
        for found in row_ranges(source, key, part.row_offset, part.num_rows, part.device or part.tensor.device)
    ]
    num_bytes_total = sum(found.num_bytes for found in ranges)
    num_bytes_done = 0
    with torch.no_grad():
        for found, rows in stream_rows(source, ranges, deltas):
            part = parts[found.key]
            held = slice(found.rows.start - part.row_offset, found.rows.stop - part.row_offset)
            if found.key in layers:
                layer, changed = layers[found.key], any(found.key in delta.shapes() for delta in deltas)
                rows, row_scales = _quantized(layer, rows, None if changed else source, found)
                scale_parts[found.key].tensor[held].copy_(row_scales)
            part.tensor[held].copy_(rows)
            num_bytes_done += found.num_bytes
            if progress is not None:
                progress(num_bytes_done, num_bytes_total)
    return LoadReport(
        num_tensors=len(shapes),
        bytes_read=source.bytes_read - start_bytes,
        elapsed_seconds=time.perf_counter() - start_seconds,
    )


def _quantized(
    layer: QuantizedLinear, rows: Tensor, source: TensorSource | None, found: RowRange
) -> tuple[Tensor, Tensor]:
    """Values and scales of ``rows`` for an 8-bit layer: those that ``source`` stores, if it has them."""
    dtype = layer.weight_dtype
    scales = source.kept_scales(found.key, found.rows, dtype) if isinstance(source, KeepsScales) else None
    if scales is None:
        return layer.quantize(rows.float())
    # a stored value times its scale is rounded to fp32 once, so dividing gives the stored value to within 2^-23
    scales = scales.to(rows.device)
    values = rows.float() / torch.where(scales == 0, 1.0, scales)[:, None]
    return (values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)), scales


def check_keys(expected: Mapping[str, torch.Size], source: TensorSource) -> None:
    """Raise ``CheckpointError`` unless ``source`` holds exactly the expected keys with the expected shapes."""
    where, found = source.name, dict.fromkeys(source.keys())
    check_no_keys(f"{where}: weights are missing", [key for key in expected if key not in found])
    check_no_keys(f"{where}: weights have no place in the model", [key for key in found if key not in expected])
    for key, shape in expected.items():
        if source.shape(key) != shape:
            raise CheckpointError(
                f"{where}: {key} has shape {list(source.shape(key))}; the configuration asks for {list(shape)}"
            )


def check_deltas(expected: Mapping[str, torch.Size], deltas: Sequence[WeightDelta]) -> None:
    """Raise ``CheckpointError`` unless every delta fits a weight of the expected names and shapes."""
    for delta in deltas:
        shapes = delta.shapes()
        check_no_keys(f"{delta.name}: the model has no such weights", [key for key in shapes if key not in expected])
        for key, shape in shapes.items():
            if expected[key] != shape:
                raise CheckpointError(
                    f"{delta.name}: made for another width: its {key} is {list(shape)}, this model's is "
                    f"{list(expected[key])}"
                )


def row_ranges(
    source: TensorSource, key: str, first_row: int, num_rows: int, device: torch.device
) -> Iterator[RowRange]:
    """Cut rows of a tensor into chunks for one read each, at multiples of ``ROW_BLOCK`` rows of the whole tensor."""
    row_bytes = source.shape(key)[1:].numel() * source.dtype(key).itemsize
    rows_at_once = max(1, CHUNK_BYTES // max(1, row_bytes * ROW_BLOCK)) * ROW_BLOCK
    row, end = first_row, first_row + num_rows
    while row < end:
        stop = min(end, (row // rows_at_once + 1) * rows_at_once)
        yield RowRange(key=key, rows=slice(row, stop), device=device, num_bytes=(stop - row) * row_bytes)
        row = stop


def stream_rows(
    source: TensorSource, ranges: Sequence[RowRange], deltas: Sequence[WeightDelta] = ()
) -> Iterator[tuple[RowRange, Tensor]]:
    """The rows of each range, in order, on its device: as stored, or fp32 with the weight's deltas added."""
    for found, rows in _read_ahead(source, ranges):
        rows = rows.to(found.device, non_blocking=True)
        changing = [delta for delta in deltas if found.key in delta.shapes()]
        if changing:
            rows = rows.float()
            with _full_fp32_matmul():
                for delta in changing:
                    delta.add_to(rows, found.key, found.rows.start)
        yield found, rows


def read_whole(source: TensorSource, key: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A whole tensor on ``device`` in ``dtype``; only a few rows at a time are held as stored."""
    shape = source.shape(key)
    if not shape:
        return source.read(key).to(device, dtype)
    whole = torch.empty(shape, dtype=dtype, device=device)
    for found, rows in stream_rows(source, list(row_ranges(source, key, 0, shape[0], device))):
        whole[found.rows] = rows
    return whole


def _read_ahead(source: TensorSource, ranges: Sequence[RowRange]) -> Iterator[tuple[RowRange, Tensor]]:
    """Ranges in order with their rows as stored, read ahead by as many threads as the source allows."""

    def read(wanted: RowRange) -> Tensor:
        return source.read(wanted.key, wanted.rows, pin_memory=wanted.device.type == "cuda")

    pending: deque[tuple[RowRange, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(source.max_concurrent_reads, thread_name_prefix="read-weights") as pool:
        try:
            for wanted in ranges:
                pending.append((wanted, pool.submit(read, wanted)))
                if len(pending) > source.max_concurrent_reads:
                    first, rows = pending.popleft()
                    yield first, rows.result()
            while pending:
                first, rows = pending.popleft()
                yield first, rows.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _full_fp32_matmul() -> Iterator[None]:
    """Exact fp32 products inside, whatever precision the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
