"""Peak throughput of known devices, and the memory of device and host.

Works without a GPU, and without torch in the process (device values are then None). Knows nothing of ranks or models.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
"""Dense bf16 TFLOP/s with fp32 accumulation, from data sheets. The first name inside a device's name applies."""


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device in TFLOP/s, None when it is not in ``PEAK_BF16_TFLOPS``."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS if name in device_name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Memory of one device in GiB: reserved by torch now, and the peak that tensors have used. None: not known."""

    held_gib: float | None = None
    peak_gib: float | None = None


def current_device() -> int | None:
    """Return the index of this thread's accelerator, None if torch has none or is not in the process."""
    torch: Any = sys.modules.get("torch")
    return torch.accelerator.current_device_index() if torch is not None and torch.accelerator.is_available() else None


def device_memory(device: int | None) -> DeviceMemory:
    """Return what torch's allocator counted on ``device`` in this process (see ``current_device``)."""
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
    """Return the total memory of a ``torch.device`` in bytes; None for a CPU, which uses host memory."""
    if device.type == "cpu":
        return None
    total: int = sys.modules["torch"].get_device_module(device).get_device_properties(device).total_memory
    return total


def host_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return physical memory in bytes, or the limit of this process's control group (container, SLURM job) if lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, file in _memory_groups(proc, cgroups):
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                total = min(total, int((level / file).read_text()))
            if level == cgroups:
                break
    return total


def _memory_groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folder inside ``cgroups`` of each group of this process, and the name of the file with its limit."""
    yield cgroups, "memory.max"  # inside a container: its own group
    yield cgroups / "memory", "memory.limit_in_bytes"
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield cgroups / path.lstrip("/"), "memory.max"
            elif "memory" in controllers.split(","):
                yield cgroups / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
