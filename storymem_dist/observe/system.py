"""How a rank's process and device are doing, sampled now and then; and what devices can do at best.

Works without a GPU and without torch in the process (then those figures are None). Knows nothing of who listens.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.observe.events import Observer, SystemSampled

GIB = 2**30

PEAK_BF16_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.0),
)
"""Dense bf16 TFLOP/s with fp32 accumulation, from the makers' data sheets. The first entry that fits counts."""


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device in TFLOP/s, None when it is not in ``PEAK_BF16_TFLOPS``."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS if name in device_name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Memory of one device in GiB: what torch holds of it, and the most that tensors have taken. None: not known."""

    held_gib: float | None = None
    peak_gib: float | None = None


def current_device() -> int | None:
    """The number of this thread's accelerator, None where torch has none (or is not in the process)."""
    torch: Any = sys.modules.get("torch")
    return torch.accelerator.current_device_index() if torch is not None and torch.accelerator.is_available() else None


def device_memory(device: int | None) -> DeviceMemory:
    """What torch's allocator has counted on ``device`` in this process (see ``current_device``)."""
    if device is None:
        return DeviceMemory()
    try:
        counts = sys.modules["torch"].accelerator.memory_stats(device)  # empty until something is allocated
    except RuntimeError:  # an accelerator whose allocator keeps no counts
        return DeviceMemory()
    held, peak = counts.get("reserved_bytes.all.current"), counts.get("allocated_bytes.all.peak")
    return DeviceMemory(
        held_gib=None if held is None else held / GIB,
        peak_gib=None if peak is None else peak / GIB,
    )


def device_memory_bytes(device: Any) -> int | None:
    """All memory of a ``torch.device``, free or not; None for a CPU, which has the host's."""
    if device.type == "cpu":
        return None
    total: int = sys.modules["torch"].get_device_module(device).get_device_properties(device).total_memory
    return total


def host_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Physical memory, or the limit of this process's control group (a container's, a SLURM job's) where it is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, file in _memory_groups(proc, cgroups):
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                total = min(total, int((level / file).read_text()))
            if level == cgroups:
                break
    return total


def _memory_groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, str]]:
    """Folders of the groups that this process is in, inside ``cgroups``, and the name of the file with the limit."""
    yield cgroups, "memory.max"  # what a container sees of its own
    yield cgroups / "memory", "memory.limit_in_bytes"
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield cgroups / path.lstrip("/"), "memory.max"
            elif "memory" in controllers.split(","):
                yield cgroups / "memory" / path.lstrip("/"), "memory.limit_in_bytes"


class SystemSampler:
    """Sends a ``SystemSampled`` every ``interval_seconds`` from a thread of its own, until it is closed.

    The device is that of the thread which makes it: every thread has a current device of its own.
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
        """Measure now. ``cpu_ratio`` is CPU seconds per second since the sample before (1.0: one core busy)."""
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
