"""Adapters: changes of weights that are added while a module runs, so that the weights themselves never change.

``y = W x`` becomes ``y = W x + up (down x)``. Adapters are plain tensors, neither parameters nor buffers: sharding,
offload, block streams and 8-bit formats do not see them, and the base product is computed as without them (8-bit layers
included). A module without an adapter runs its own forward and nothing else. Knows nothing of files, scales or ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storymem_dist.models.compile import is_compiled
from storymem_dist.models.quantized_linear import QuantizedLinear
from storymem_dist.models.wan.dit import Head, PatchEmbedding, WanBlock

_RANKS = 16
"""Ranks in compiled blocks are multiples of this: sizes of 1 would be graphs of their own, and kernels like 16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The change of one module. None: nothing of that kind.

    ``down [R, in]`` and ``up [out, R]`` (scale included) give a change of low rank; ``in`` counts all values of a patch
    where the module is the patch embedding. ``weight`` and ``bias`` are changes of the module's own weight and bias,
    ``modulation`` one of the table ``[1, n, D]`` of a block or of the head.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    modulation: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Adapter":
        """An adapter of ``fn(tensor)`` for each tensor."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        return Adapter(**{name: fn(tensor) for name, tensor in parts.items() if tensor is not None})

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for name in self.__slots__ if (tensor := getattr(self, name)) is not None)


Adapters = Mapping[str, Adapter]
"""The adapters of one transformer, by the module's name (``blocks.0.ffn.2``)."""


class _Adapted(nn.Module):
    """Base of the classes that a module gets with its first adapter, in front of its own class."""

    adapter: Any  # an Adapter or None; Any, since a module's attributes are tensors or modules to a type checker


class _AdaptedProduct(_Adapted):
    """Of a linear layer, exact or in eight bits."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own forward, plus the change."""
        out: Tensor = super().forward(x)
        return out if self.adapter is None else _add_product(out, x, self.adapter)


class _AdaptedPatches(_Adapted):
    """Of the patch embedding, a linear layer over patches."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """As the layer's own forward, plus the change."""
        out: Tensor = super().forward(x_BCTHW)
        if self.adapter is None:
            return out
        assert isinstance(self, PatchEmbedding)
        return _add_product(out, self.patches(x_BCTHW), self.adapter)


class _AdaptedNorm(_Adapted):
    """Of a layer norm or an RMS norm."""

    def forward(self, x: Tensor) -> Tensor:
        """As the norm's own forward, with changed weight and bias."""
        if self.adapter is None:
            out: Tensor = super().forward(x)
            return out
        own: Any = self
        weight = _sum(own.weight, self.adapter.weight)
        if isinstance(self, nn.RMSNorm):
            return F.rms_norm(x, own.normalized_shape, weight, own.eps)
        return F.layer_norm(x, own.normalized_shape, weight, _sum(own.bias, self.adapter.bias), own.eps)


class _AdaptedModulation(_Adapted):
    """Of a block or the head, whose table of shifts, scales and gates changes."""

    def modulated(self, modulation_BXD: Tensor) -> Tensor:
        """As the module's own ``modulated``, plus the change of the table."""
        table: Tensor = super().modulated(modulation_BXD)  # type: ignore[misc]
        return table if self.adapter is None else table + self.adapter.modulation


_KINDS: tuple[tuple[tuple[type[nn.Module], ...], type[_Adapted]], ...] = (
    ((PatchEmbedding,), _AdaptedPatches),
    ((nn.Linear, QuantizedLinear), _AdaptedProduct),
    ((nn.LayerNorm, nn.RMSNorm), _AdaptedNorm),
    ((WanBlock, Head), _AdaptedModulation),
)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's adapter: that in which the module computes, also where its weights are in eight bits."""
    if isinstance(module, WanBlock | Head):
        return module.modulation.dtype
    parameters = (getattr(module, name, None) for name in ("bias", "weight"))
    return next(parameter.dtype for parameter in parameters if parameter is not None)


def filled_rank(rank: int) -> int:
    """The rank of adapters in compiled blocks, if ``rank`` is the largest of them."""
    return -(-rank // _RANKS) * _RANKS


def set_adapters(dit: nn.Module, adapters: Adapters, device: torch.device) -> int:
    """Give modules of the ``WanDiT`` ``dit`` these adapters, copied to ``device``, and take those of all others away.

    Returns the bytes on ``device``. The base weights are neither read nor written. Compiled blocks get adapters of one
    form, so that they are compiled once for all adapters of low rank, and once for blocks without any after that:
    missing adapters of a block that has one are zeros, and ranks are filled up with zeros to the largest. Every other
    mixture of changes (``weight``, ``bias``, norms, modulation) in a block is compiled once more.

    Raises:
        KeyError: there is no such module.
    """
    modules = dict(dit.named_modules())
    rank, zeros = _common_rank(dit, adapters), dict[tuple[int, ...], Tensor]()
    for name in adapters:
        _make_adaptable(modules[name])
    placed = {
        name: _filled(adapter, rank if name.startswith("blocks.") else None, device)
        for name, adapter in adapters.items()
    }
    if rank is not None:
        for name in _without_product(modules, adapters):
            placed[name] = _with_zeros(placed.get(name, Adapter()), modules[name], rank, device, zeros)
    for name, module in modules.items():
        if name in placed:
            _make_adaptable(module)
        if isinstance(module, _Adapted):
            module.adapter = placed.get(name)
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in _tensors(placed)}
    return sum(held.values())


def _make_adaptable(module: nn.Module) -> None:
    """Put the class that adds adapters in front of the module's own, which stays the module's base."""
    if isinstance(module, _Adapted):
        return
    for types, adapted in _KINDS:
        if isinstance(module, types):
            module.__class__ = _class_for(adapted, type(module))
            module.adapter = None  # type: ignore[assignment]
            return
    raise TypeError(f"a {type(module).__name__} has no weights that an adapter can change")


_classes: dict[tuple[type, type], Any] = {}


def _class_for(adapted: type[_Adapted], own: type[nn.Module]) -> Any:
    if (adapted, own) not in _classes:
        names = {"__module__": __name__, "__doc__": adapted.__doc__}
        _classes[adapted, own] = type(f"Adapted{own.__name__}", (adapted, own), names)
    return _classes[adapted, own]


def _add_product(out: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """``out`` plus the change of a linear layer's output for input ``x``; overwrites ``out``."""
    rows, columns = x.flatten(0, -2), out.flatten(0, -2)
    if adapter.down is not None and adapter.up is not None:
        columns = columns.addmm_(F.linear(rows, adapter.down), adapter.up.t())
    if adapter.weight is not None:
        columns = columns.addmm_(rows, adapter.weight.flatten(1).t())
    if adapter.bias is not None:
        columns = columns.add_(adapter.bias)
    return columns.unflatten(0, out.shape[:-1])


def _sum(tensor: Tensor, change: Tensor | None) -> Tensor:
    return tensor if change is None else tensor + change


def _common_rank(dit: nn.Module, adapters: Adapters) -> int | None:
    """The rank that all adapters in blocks get where these are compiled; None: each keeps its own."""
    if not any(map(is_compiled, getattr(dit, "blocks", ()))):
        return None
    ranks = [one.down.shape[0] for name, one in adapters.items() if name.startswith("blocks.") and one.down is not None]
    return filled_rank(max(ranks)) if ranks else None


def _filled(adapter: Adapter, rank: int | None, device: torch.device) -> Adapter:
    """``adapter`` on ``device``, with zeros up to ``rank``."""
    adapter = adapter.map(lambda tensor: tensor.to(device))
    if rank is None or adapter.down is None or adapter.up is None:
        return adapter
    missing = rank - adapter.down.shape[0]
    return replace(adapter, down=F.pad(adapter.down, (0, 0, 0, missing)), up=F.pad(adapter.up, (0, missing)))


def _without_product(modules: Mapping[str, nn.Module], adapters: Adapters) -> list[str]:
    """The linear layers without a product, in blocks in which another one has one."""
    products = {name for name, one in adapters.items() if one.down is not None and name.startswith("blocks.")}
    changed = {_block_of(name) for name in products}
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | QuantizedLinear) and _block_of(name) in changed and name not in products
    ]


def _block_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _with_zeros(
    adapter: Adapter, module: Any, rank: int, device: torch.device, zeros: dict[tuple[int, ...], Tensor]
) -> Adapter:
    """``adapter`` with a product that is zero.

    Its tensors are its own but share memory: one tensor object in two places would be another graph.
    """
    sizes = (rank, module.in_features), (module.out_features, rank)
    for size in sizes:
        if size not in zeros:
            zeros[size] = torch.zeros(size, dtype=dtype_of(module), device=device)
    down, up = (zeros[size].view(size) for size in sizes)
    return replace(adapter, down=down, up=up)


def _tensors(adapters: Adapters) -> Iterator[Tensor]:
    for adapter in adapters.values():
        for name in adapter.__slots__:
            if (tensor := getattr(adapter, name)) is not None:
                yield tensor
