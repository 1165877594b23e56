"""Peak throughput of devices, the memory of device and host, torch's allocators, processes, errors of the machine.

Works without a GPU. Functions that take a ``torch.device`` need torch; all others work without it in the process. Knows
nothing of ranks or models.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.errors import MachineError, StoryMemError

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


def free_device_memory_bytes(device: Any) -> int | None:
    """Return how much of a ``torch.device`` this process can still take, in bytes; None for a CPU.

    Counts what no process holds, and what torch's allocator of this process holds without need.
    """
    if device.type == "cpu":
        return None
    module = sys.modules["torch"].get_device_module(device)
    free, _ = module.mem_get_info(device)
    spare: int = module.memory_reserved(device) - module.memory_allocated(device)
    return int(free) + spare


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

_ALLOCATOR_SETTINGS = (
    # Token counts, and so the sizes of allocations, change from shot to shot: segments that grow avoid fragmentation.
    "expandable_segments:True",
    # Page-locked memory is not rounded up to a power of two.
    "pinned_max_round_threshold_mb:1",
)


def set_allocator_defaults() -> None:
    """Set what torch's CUDA allocators do in this process, unless a variable of ``ALLOCATOR_VARIABLES`` says it.

    Call it before anything is allocated on a GPU. A setting that this torch does not know is left out.
    """
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    torch = sys.modules["torch"]
    set_settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    set_settings = set_settings or torch.cuda.memory._set_allocator_settings
    for count in range(len(_ALLOCATOR_SETTINGS), 0, -1):
        with contextlib.suppress(RuntimeError, ValueError):
            set_settings(",".join(_ALLOCATOR_SETTINGS[:count]))
            return


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


_SPACE = "free space there"
_WRITABLE = "make it writable again"
_BROKEN = "bring that file system back"
_IN_THE_WAY = "remove what has that name"
_CURES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close files of other programs",
    errno.EROFS: _WRITABLE,
    errno.EIO: _BROKEN,
    errno.ENXIO: _BROKEN,
    errno.ENODEV: _BROKEN,
    errno.ESTALE: _BROKEN,
    errno.ENOLCK: _BROKEN,
}
"""By error number, what a person must do. These errors are faults of the machine wherever they come from."""

_CURES_OF_WRITING = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), _WRITABLE),
    **dict.fromkeys((errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP), _IN_THE_WAY),
}
_OF_THE_INPUT = {errno.EINVAL, errno.ENAMETOOLONG, errno.EDOM, errno.ERANGE, errno.ENOMEM, errno.ENOSYS}
_WORDS_OF_LIBRARIES = {"iostream error": errno.ENOSPC, "PytorchStreamWriter failed": errno.ENOSPC}


def machine_fault(error: BaseException, *, while_writing: bool = False, what: str = "") -> MachineError | None:
    """Return ``error`` as a ``MachineError`` if a full disk, a broken file system or a limit of the system caused it.

    Looks at the error and at all errors behind it, at their error numbers and, for libraries that have none
    (safetensors, torch), at their words. ``while_writing``: the error ended a write into the run folder or the
    temporary folder, so a lost permission or a missing folder is the machine's fault, too. ``what`` replaces the words
    of the error. None for other errors.
    """
    if isinstance(error, MachineError):
        return error
    if not isinstance(error, Exception):
        return None
    for one in _with_causes(error):
        if isinstance(one, MachineError):
            return one
        number = _error_number(one)
        cure = _CURES.get(number)
        if cure is None and while_writing and number in errno.errorcode and number not in _OF_THE_INPUT:
            cure = _CURES_OF_WRITING.get(number, _BROKEN)
        if cure is not None:
            what = what or (str(error) if isinstance(error, StoryMemError) else _in_words(one))
            return MachineError(f"{what}; {cure}, then give the same command again (no shot is marked as failed)")
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__context__, one.__cause__]


def _error_number(error: BaseException) -> int:
    """The error number of an ``OSError``, or of another error by its attribute or its words; 0: none."""
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number in errno.errorcode:
        return number
    if isinstance(error, StoryMemError):  # its words may quote a file
        return 0
    text = str(error)
    words = {os.strerror(code): code for code in _CURES} | _WORDS_OF_LIBRARIES
    return next((code for some, code in words.items() if some in text), 0)


def _in_words(error: BaseException) -> str:
    name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
    name = getattr(error, "filename2", None) or name  # of a rename: the final name, not the temporary one
    if name is not None and reason:
        return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {reason}"
    return reason or str(error) or type(error).__name__


def boot_id() -> str:
    """Return an id of this start of this machine; empty where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Return the namespace in which process ids of this process count; empty where it is not known."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Start time of a running process in clock ticks since boot; None when it is gone or only a zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]
