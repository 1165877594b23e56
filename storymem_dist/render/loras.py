"""Adapters of shots' LoRAs in host memory: read when a shot needs them, and kept for the next one.

The experts never change for them (see ``models.adapters``). Knows nothing of queues or devices.
"""

import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from storymem_dist.dispatch.shot_loras import Loras, OpenedLoras
from storymem_dist.errors import ShotError
from storymem_dist.hardware import GIB, host_memory_bytes
from storymem_dist.models.adapters import Adapters
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.parallel.weight_memory import WeightMemory
from storymem_dist.weights.lora import lora_inputs, lora_key, read_adapters

logger = logging.getLogger(__name__)

KEPT_AT_LEAST = 2
"""Sets of LoRAs that stay in host memory, whatever they take."""

_KEPT_BYTES = 8 * GIB
_KEPT_PART_OF_HOST = 8


def adapter_memory(opened: OpenedLoras, *, compiled: bool) -> WeightMemory:
    """Return what the LoRAs of a shot need at most next to the experts, on a rank."""
    of_a_shot = opened.most_bytes(compiled=compiled)
    return WeightMemory(on_device=of_a_shot.on_device, on_host=KEPT_AT_LEAST * of_a_shot.on_host)


class LoraShelf:
    """Adapters of shots in host memory: those of the last few sets of LoRAs stay, so that shots may alternate.

    ``all_or_none`` lets all ranks of the replica fail when one does. At most 8 GiB are kept, and an eighth of the
    memory that ``ranks_per_node`` ranks share; but always the two latest sets.
    """

    def __init__(
        self,
        opened: OpenedLoras,
        all_or_none: Callable[[Callable[[], Mapping[str, Adapters]]], Mapping[str, Adapters]] = lambda fn: fn(),
        *,
        ranks_per_node: int = 1,
    ) -> None:
        self._opened, self._all_or_none = opened, all_or_none
        self._max_bytes = min(_KEPT_BYTES, host_memory_bytes() // (_KEPT_PART_OF_HOST * ranks_per_node))
        self._kept: OrderedDict[tuple[str, str], Mapping[str, Adapters]] = OrderedDict()
        self.num_reads = 0

    def among(
        self, all_or_none: Callable[[Callable[[], Mapping[str, Adapters]]], Mapping[str, Adapters]]
    ) -> "LoraShelf":
        """Return this shelf, with what it keeps, for other ranks: they read and fail together by ``all_or_none``."""
        shelf = copy.copy(self)
        shelf._all_or_none = all_or_none
        return shelf

    def open_with(self, opened: OpenedLoras) -> None:
        """Open the LoRAs of later shots with ``opened``: that of another job on the same experts."""
        self._opened = opened

    def __call__(self, kind: str, loras: Loras, key: str) -> Mapping[str, Adapters]:
        """The adapters of the experts of ``kind`` for these LoRAs, by expert. Collective over the replica.

        ``key`` is the ``lora_key`` with which the shot was planned. Raises ``ShotError`` when files have changed since,
        ``WeightsNotFound`` and ``CheckpointError`` as ``open_loras``.
        """
        return self._all_or_none(lambda: self._find(kind, loras, key))

    def _find(self, kind: str, loras: Loras, key: str) -> Mapping[str, Adapters]:
        if not loras:
            return {}
        if lora_key(lora_inputs(loras)) != key:
            raise ShotError("a LoRA file of this shot has changed since the job began; start the job again")
        if (kind, key) in self._kept:
            self._kept.move_to_end((kind, key))
            return self._kept[kind, key]
        began, model = time.perf_counter(), self._opened.model(kind)
        opened = self._opened.open(kind, loras, key)
        adapters = {expert: read_adapters(opened[expert], model) for expert in EXPERTS}
        self._kept[kind, key] = adapters
        self.num_reads += 1
        num_bytes = [_num_bytes(kept) for kept in self._kept.values()]
        while len(self._kept) > KEPT_AT_LEAST and sum(num_bytes) > self._max_bytes:
            self._kept.popitem(last=False)
            del num_bytes[0]
        logger.info("%s LoRAs %s: read %d bytes in %.3f s", kind, key, num_bytes[-1], time.perf_counter() - began)
        return adapters


def _num_bytes(adapters: Mapping[str, Adapters]) -> int:
    return sum(adapter.num_bytes for of_expert in adapters.values() for adapter in of_expert.values())
