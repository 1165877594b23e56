"""What devices can do at best, and how much memory device and host have.

Works without a GPU, and without torch in the process (device figures are then None).
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
