"""Samples memory and load of a rank's process and device at intervals.

Works without a GPU and without torch in the process (those values are then None). Knows no back ends.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from typing import Any

from storymem_dist.events import Observer, SystemSampled
from storymem_dist.hardware import GIB, current_device, device_memory


class SystemSampler:
    """Sends a ``SystemSampled`` every ``interval_seconds`` from its own thread, until it is closed.

    Samples the current device of the thread that creates it: every thread has its own.
    """

    def __init__(self, observer: Observer, *, rank: int, interval_seconds: float) -> None:
        self._observer = observer
        self._rank = rank
        self._interval = interval_seconds
        self._host = socket.gethostname()
        self._device = current_device()
        self._last_cpu = (time.monotonic(), _cpu_seconds())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observe-system", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling."""
        self._closing.set()
        self._thread.join(timeout=5.0)

    def sample(self) -> SystemSampled:
        """Measure now. ``cpu_ratio`` is CPU seconds per second since the previous sample (1.0: one busy core)."""
        now, used = time.monotonic(), _cpu_seconds()
        before, used_before = self._last_cpu
        self._last_cpu = (now, used)
        return SystemSampled(
            rank=self._rank,
            host=self._host,
            host_memory_gib=_resident_gib(),
            cpu_ratio=(used - used_before) / (now - before) if now > before else None,
            gpu_memory_gib=device_memory(self._device).held_gib,
            gpu_busy_ratio=_busy_ratio(self._device),
        )

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._observer.notify(self.sample())


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _resident_gib() -> float | None:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
    return None


def _busy_ratio(device: int | None) -> float | None:
    """How busy a CUDA device is (0 to 1)."""
    torch: Any = sys.modules.get("torch")
    if device is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        return torch.cuda.utilization(device) / 100.0
    except Exception:  # needs nvidia-ml-py, which not every machine has
        return None
