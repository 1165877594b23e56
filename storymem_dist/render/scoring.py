"""HPSv3 for the leader of a replica: checked before the job starts, loaded once, and kept where it has room.

Knows where the scorer lies between shots, not how it scores or who asks it. Its modules are imported where it is used.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from storymem_dist.diffusion.host_swap import HostMemory, HostWeights
from storymem_dist.hardware import GIB
from storymem_dist.memory.scorers import ScorerShelf
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.parallel.weight_memory import BETWEEN_SHOTS, ON_CPU, ON_DEVICE

if TYPE_CHECKING:
    from storymem_dist.models.hpsv3 import HpsV3
    from storymem_dist.weights.hpsv3 import HpsV3Files

logger = logging.getLogger(__name__)

OpenedScorers = Mapping[str | None, "HpsV3Files"]
"""HPSv3 by ``memory.hpsv3_checkpoint``, for the settings that ask for it."""

_CPU = torch.device("cpu")


def open_scorers(memories: Sequence[MemorySettings]) -> OpenedScorers:
    """Find and check HPSv3 where ``memories`` ask for it; reads headers only. Raises as ``open_hpsv3``."""
    names = {memory.hpsv3_checkpoint for memory in memories if memory.quality == "hpsv3"}
    return {name: _open(name) for name in names}


def _open(name: str | None) -> "HpsV3Files":
    from storymem_dist.weights.hpsv3 import open_hpsv3

    return open_hpsv3(name)


def scorer_shelf(
    device: torch.device,
    opened: OpenedScorers | None = None,
    *,
    place: str = BETWEEN_SHOTS,
    warn: Callable[[str], None] = logger.warning,
) -> ScorerShelf:
    """Return a shelf for ``device`` whose HPSv3 is kept at ``place`` (see ``weight_memory.place_scorer``).

    ``opened``: what was checked already. ``warn`` receives a sentence where a GPU's leader scores on its CPU.
    """
    ratings: dict[str | None, _Rating] = {}

    def load(memory: MemorySettings) -> _Rating:
        name = memory.hpsv3_checkpoint
        if name not in ratings:
            files = (opened or {}).get(name) or _open(name)
            on_gpu = device.type != "cpu"
            ratings[name] = _Rating(files, device, place if on_gpu else ON_CPU, warn if on_gpu else _say_nothing)
        return ratings[name]

    return ScorerShelf(device, load)


def _say_nothing(message: str) -> None:
    pass


class _Rating:
    """Rates frames with HPSv3, which is loaded when this is made. Without room on the device, it goes to the CPU."""

    def __init__(self, files: "HpsV3Files", device: torch.device, place: str, warn: Callable[[str], None]) -> None:
        self._files, self._device, self._warn = files, device, warn
        self._place = place
        self._model: HpsV3 = files.load(device if place == ON_DEVICE else _CPU)
        self._swapped: HostWeights | None = None
        if place == BETWEEN_SHOTS:
            self._swapped = HostWeights(self._model.network, HostMemory(device), device)
            logger.info("HPSv3 (%.1f GiB) waits in host memory between shots", files.num_bytes() / GIB)
        elif place == ON_CPU:
            self._warn_of_cpu()

    def __call__(self, frames_NCHW: Tensor) -> list[float]:
        """Return the preference for each of ``uint8 [N, 3, H, W]`` frames."""
        try:
            return self._rate(frames_NCHW)
        except torch.OutOfMemoryError:
            if self._place == ON_CPU:
                raise
        self._place, self._swapped = ON_CPU, None
        del self._model  # before the weights are read again
        self._warn_of_cpu()
        self._model = self._files.load(_CPU)
        return self._rate(frames_NCHW)

    def _rate(self, frames_NCHW: Tensor) -> list[float]:
        if self._swapped is None:
            return self._model.rate(frames_NCHW).tolist()
        try:
            self._swapped.enter_device()
            return self._model.rate(frames_NCHW).tolist()
        finally:
            self._swapped.leave_device()

    def _warn_of_cpu(self) -> None:
        self._warn(
            f"HPSv3 ({self._files.num_bytes() / GIB:.1f} GiB) has no room on {self._device} between shots and scores "
            "keyframes on the CPU, which is slow; model.experts=stream makes room, memory.quality=sharpness needs none"
        )
