"""Which adapters the two experts of a pair have: those of the running shot, on the device for the active expert alone.

Host memory keeps the shot's adapters, as the residency may keep weights there. A switch replaces tensors next to the
weights and never the weights: it loads no expert, and when it is cut off, nothing has to be undone. Knows nothing of
files or shots.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from storymem_dist.models.adapters import Adapters, set_adapters


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterUse:
    """What adapters have cost since ``use``: seconds of copies to the device, and the most bytes on it at once."""

    seconds: float = 0.0
    device_bytes: int = 0


class AdapterSwitch:
    """Puts adapters onto experts (``WanDiT`` by name) when an expert becomes active."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        self._adapters: Mapping[str, Adapters] = {}
        self._device = torch.device("cpu")
        self._placed: str | None = None
        self.used = AdapterUse()

    def use(self, adapters: Mapping[str, Adapters], device: torch.device) -> None:
        """From now on, experts run on ``device`` with these adapters, by expert; empty: with none."""
        self.idle()
        self._adapters = {name: of_expert for name, of_expert in adapters.items() if of_expert}
        self._device, self.used = device, AdapterUse()

    def activate(self, name: str) -> None:
        """Place the adapters of expert ``name``, after freeing those of the other one."""
        if self._placed == name or not (self._adapters or self._placed):
            return
        began = time.perf_counter()
        self.idle()
        if name in self._adapters:
            self._placed = name  # set first: if memory runs out half-way, ``idle`` frees what was placed
            device_bytes = set_adapters(self._modules[name], self._adapters[name], self._device)
            self.used = AdapterUse(
                seconds=self.used.seconds + time.perf_counter() - began,
                device_bytes=max(self.used.device_bytes, device_bytes),
            )

    def idle(self) -> None:
        """Free the device memory of adapters until the next ``activate``."""
        placed, self._placed = self._placed, None
        if placed is not None:
            set_adapters(self._modules[placed], {}, self._device)

    def release(self) -> None:
        """Drop all adapters, and the experts."""
        self.idle()
        self._adapters = {}
        self._modules.clear()
