"""What the benchmarks share: the command line, fair timing of rivals, peak memory, tables and a JSON file."""

import argparse
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from storymem_dist.hardware import GIB

_MATMULS = {
    "aten::addmm",
    "aten::mm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn_linear",
    "aten::_int_mm",
    "aten::_scaled_mm",
    "aten::_scaled_mm_v2",
}
# The operators of the packages flash_attn and flash_attn_interface have their own names; older ones run in a Function.
_ATTENTION_PREFIXES = (
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_cudnn_attention",
    "flash_attn::",
    "flash_attn_2::",
    "flash_attn_3::",
    "FlashAttn",
)
# Operators that only allocate memory, or that only call other operators, which are counted themselves.
_NO_WORK_PREFIXES = (
    "aten::empty",
    "aten::resize",
    "aten::linear",
    "aten::to",
    "aten::_to_copy",
    "aten::contiguous",
    "aten::reshape",
    "aten::rms_norm",
    "aten::_fused_rms_norm",
    "aten::layer_norm",
    "aten::scaled_dot_product_attention",
    "aten::mean",
    "aten::stack",
    "aten::type_as",
    "aten::chunk",
    "aten::dropout",
    "aten::result_type",
    "aten::resolve_",
)


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The command line of the benchmark ``name``: its docstring as help, and ``--json``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    return parser


def device_name(device: torch.device) -> str:
    """The device in words, for tables and files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next(
        (line.partition(":")[2].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return f"{model}, {torch.get_num_threads()} threads"


def interleaved_seconds(
    rivals: Sequence[Callable[[], Any]], *, repeats: int, device: torch.device, clock: str = "wall"
) -> list[tuple[float, ...]]:
    """Run all rivals in turn, ``repeats`` times, after one warm-up of each; one tuple of seconds per round.

    ``clock="cpu"`` counts the seconds that this process computes. Other processes disturb them much less than the wall
    clock. With one thread on an idle machine the two clocks agree.

    A disturbance of the machine slows all rivals of a round alike, so compare within rounds. Every other round runs in
    reverse order, so no rival always comes first.
    """
    for rival in rivals:
        rival()
    rounds = []
    for index in range(repeats):
        order = range(len(rivals)) if index % 2 == 0 else reversed(range(len(rivals)))
        seconds = {position: _seconds(rivals[position], device, clock) for position in order}
        rounds.append(tuple(seconds[position] for position in range(len(rivals))))
    return rounds


def median_ratio(rounds: Sequence[tuple[float, ...]], numerator: int, denominator: int) -> float:
    """Median over the rounds of one rival's time over another's."""
    return statistics.median(times[numerator] / times[denominator] for times in rounds)


def peak_gib(run: Callable[[], Any], device: torch.device) -> float:
    """Peak GiB that ``run`` allocates, above what is allocated before it starts.

    On CUDA this is the allocator's own count. On the CPU it is the peak of live tensors; scratch space inside an
    operator is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / GIB
    with _LiveTensors() as live:
        run()
    return live.peak_bytes / GIB


def profile_run(run: Callable[[], Any], device: torch.device) -> "Profile":
    """Run once under torch's profiler."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        seconds = _seconds(run, device, "wall")
    self_time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    heavy_seconds = sum(getattr(event, self_time) for event in events if _is_heavy(event.key)) / 1e6
    num_kernels = sum(event.count for event in events if _is_kernel(event.key, device))
    return Profile(seconds=seconds, matmul_attention_seconds=heavy_seconds, num_kernels=num_kernels)


def kernel_names(run: Callable[[], Any], device: torch.device) -> list[str]:
    """Names of the kernels that one call runs, the longest-running first; on a CPU, of its operators."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        _seconds(run, device, "wall")
    if device.type == "cuda":
        on_device = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
        return [event.key for event in sorted(on_device, key=lambda event: -event.self_device_time_total)]
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [event.key for event in events]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The profiler's numbers for one run.

    ``num_kernels`` counts kernel launches on CUDA. On the CPU it counts operators that touch memory, and fused loops.
    """

    seconds: float
    matmul_attention_seconds: float
    num_kernels: int

    @property
    def other_ratio(self) -> float:
        """Share of the time outside matrix products and attention."""
        return 1 - self.matmul_attention_seconds / self.seconds


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under all their keys, in aligned columns."""
    print("\n".join(table_lines(rows)))


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table with all keys of the rows, in the order in which they first occur."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([_text(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def write_json(path: Path | None, name: str, results: dict[str, Any], device: torch.device) -> None:
    """Write the results of the benchmark ``name`` with the device's name and torch's version, if there is a path."""
    if path is not None:
        header = {"benchmark": name, "device": device_name(device), "torch": torch.__version__}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header | results, indent=2) + "\n")


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, from their creation until they are freed.

    Storages that are resized later (as FSDP2 does) count as large as they are. What a collective's ``wait_tensor``
    returns is the tensor that it was given; on tensors without data it is a new one, which then does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._same_as: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        existing = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._known and id(storage) not in existing:
                    self._watch(storage)
                    if func is torch.ops._c10d_functional.wait_tensor.default:
                        self._same_as[id(storage)] = next(iter(existing))
        self.peak_bytes = max(self.peak_bytes, self._live_bytes())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)

        def freed(_reference: Any) -> None:
            self._known.pop(key, None)
            self._same_as.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)

    def _live_bytes(self) -> int:
        sizes: dict[int, int] = {}
        for key, reference in list(self._known.items()):
            storage = reference()
            if storage is not None:
                sizes[self._same_as.get(key, key)] = storage.nbytes()
        return sum(sizes.values())


def _is_heavy(name: str) -> bool:
    return name in _MATMULS or name.startswith(_ATTENTION_PREFIXES)


def _is_kernel(name: str, device: torch.device) -> bool:
    if device.type == "cuda":
        return "LaunchKernel" in name
    if "cpp_fused" in name:
        return True
    if not name.startswith("aten::") or name.startswith(_NO_WORK_PREFIXES):
        return False
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    return not any(getattr(packet, overload).is_view for overload in packet.overloads())


def _seconds(run: Callable[[], Any], device: torch.device, clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
