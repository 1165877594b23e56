"""Describes the machines that a job runs on: devices, links, nodes, price. From ``conf/hardware``, or as found here.

Bandwidths are in GB/s (10^9 bytes per second), of one device and one direction; memory is in GiB. Peak rates are those
of data sheets, dense. Knows nothing about models, and computes no times.
"""

import difflib
import os
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
import yaml

from storymem_dist.errors import ConfigError, shown
from storymem_dist.hardware import GIB, free_device_memory_bytes, host_memory_bytes, peak_tflops
from storymem_dist.resources import config_folder

HERE = "here"
"""The hardware of the machine that plans."""

_MAX_COUNT = 65_536
_RANGES: dict[str, tuple[float, float]] = {
    "nodes": (1, _MAX_COUNT),
    "gpus_per_node": (1, _MAX_COUNT),
    "memory_gib": (0.25, 4096),
    "host_memory_gib": (0.25, 2**20),
    "peak_tflops": (1e-3, 1e6),
    "peak_tflops_float8": (1e-3, 1e6),
    "peak_tflops_int8": (1e-3, 1e6),
    "memory_gb_per_s": (0.1, 1e6),
    "link_gb_per_s": (1e-3, 1e5),
    "link_latency_us": (0, 1e6),
    "network_gb_per_s": (1e-4, 1e5),
    "network_latency_us": (0, 1e6),
    "host_link_gb_per_s": (1e-3, 1e5),
    "read_gb_per_s": (1e-4, 1e5),
    "price_per_gpu_hour": (0, 1e6),
}
"""What a setting of the group may be, both ends included."""


@dataclass(kw_only=True, slots=True)
class HardwareSettings:
    """The ``hardware`` group: what ``storymem-plan`` plans for. None: as ``conf/hardware`` says, or as found here.

    ``name`` is an entry of ``conf/hardware``; ``here`` is the machine that plans. ``device`` is (part of) the name that
    a driver reports. ``memory_gib`` is what a process can take of one idle device (None on a CPU, which uses host
    memory); ``host_memory_gib`` that of a node. ``peak_tflops`` is dense bf16; ``peak_tflops_float8`` and
    ``peak_tflops_int8`` are None where a device has no such products. ``link_*`` is between the devices of a node,
    ``network_*`` between nodes, ``host_link_gb_per_s`` between a device and page-locked host memory, ``read_gb_per_s``
    from the disk of weights into a node.
    """

    name: str = HERE
    device: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    memory_gib: float | None = None
    host_memory_gib: float | None = None
    peak_tflops: float | None = None
    peak_tflops_float8: float | None = None
    peak_tflops_int8: float | None = None
    memory_gb_per_s: float | None = None
    link_gb_per_s: float | None = None
    link_latency_us: float | None = None
    network_gb_per_s: float | None = None
    network_latency_us: float | None = None
    host_link_gb_per_s: float | None = None
    read_gb_per_s: float | None = None
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None:
                _check(name, value, least, most)


def _check(name: str, value: object, least: float, most: float) -> None:
    """Raise ``ConfigError`` that names the nearest value that is possible."""
    is_whole = name in ("nodes", "gpus_per_node")
    kind = "a whole number" if is_whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float) or value != value:
        raise ConfigError(f"hardware.{name}={shown(value)} is not allowed; it must be {kind}, {least:g} at least")
    if not least <= value <= most:
        nearest = least if value < least else most
        raise ConfigError(f"hardware.{name}={shown(value)} is not possible; the nearest that is: {nearest:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Complete hardware: the fields of ``HardwareSettings`` with values, of one kind of device on equal nodes.

    ``memory_gib`` None: a CPU, whose ranks share ``host_memory_gib``. ``found_here``: memory is what is free on this
    machine, rather than what an idle device has. ``core_share``: the part of a core that a rank on a CPU has.
    """

    name: str
    device: str
    nodes: int
    gpus_per_node: int
    memory_gib: float | None
    host_memory_gib: float
    peak_tflops: float
    peak_tflops_float8: float | None = None
    peak_tflops_int8: float | None = None
    memory_gb_per_s: float
    link_gb_per_s: float
    link_latency_us: float
    network_gb_per_s: float
    network_latency_us: float
    host_link_gb_per_s: float
    read_gb_per_s: float
    price_per_gpu_hour: float | None = None
    found_here: bool = False
    core_share: float = 1.0

    @property
    def num_gpus(self) -> int:
        """All devices of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def memory_bytes(self) -> int | None:
        """What a process can take of one device; None: host memory."""
        return None if self.memory_gib is None else int(self.memory_gib * GIB)

    @property
    def host_memory_bytes(self) -> int:
        """Host memory of one node."""
        return int(self.host_memory_gib * GIB)


@cache
def known_names() -> tuple[str, ...]:
    """The entries of ``conf/hardware`` that describe a device."""
    return tuple(sorted(path.stem for path in (config_folder() / "hardware").glob("*.yaml") if path.stem != HERE))


@cache
def known_hardware(name: str) -> Hardware:
    """Return the entry ``name`` of ``conf/hardware``. Raises ``ConfigError`` that names the nearest entry."""
    if name not in known_names():
        asked = name.lower()[:100]
        near = [one for one in known_names() if asked and one.startswith(asked)]
        near = near or difflib.get_close_matches(asked, known_names(), 1, 0.0)
        raise ConfigError(
            f"hardware={shown(name)} is not known; the nearest is hardware={near[0]} (all: {', '.join(known_names())}; "
            "any figure of one can be changed, such as hardware.memory_gib=40)"
        )
    with (config_folder() / "hardware" / f"{name}.yaml").open(encoding="utf-8") as file:
        return Hardware(**yaml.safe_load(file))


def known_device(device_name: str) -> Hardware | None:
    """Return the entry whose ``device`` is part of ``device_name`` (as a driver reports it); the longest one wins."""
    found = [known_hardware(name) for name in known_names()]
    found = [one for one in found if all(word in device_name for word in one.device.split())]
    return max(found, key=lambda one: len(one.device), default=None)


def complete(settings: HardwareSettings) -> Hardware:
    """Return ``settings`` with what is None filled: from ``conf/hardware``, or (``name=here``) from this machine.

    Raises ``ConfigError`` for a name that is not known, and for more than 65,536 devices.
    """
    return with_given(hardware_here() if settings.name == HERE else known_hardware(settings.name), settings)


def with_given(base: Hardware, settings: HardwareSettings) -> Hardware:
    """Return ``base`` with the figures that ``settings`` has. Raises ``ConfigError`` for too many devices."""
    given = {
        one.name: value
        for one in fields(HardwareSettings)
        if one.name != "name" and (value := getattr(settings, one.name)) is not None
    }
    found = _with(base, given)
    if found.num_gpus > _MAX_COUNT:
        raise ConfigError(
            f"hardware.nodes={found.nodes} x gpus_per_node={found.gpus_per_node} is not possible; the nearest that is: "
            f"{_MAX_COUNT} devices in all"
        )
    return found


def hardware_here(
    device: torch.device | None = None,
    *,
    nodes: int = 1,
    ranks_per_node: int | None = None,
    free_bytes: int | None = None,
) -> Hardware:
    """Return the hardware of this process: the figures of its device, with the memory that is free now.

    ``device``: this rank's (None: the first GPU, or the CPU). ``ranks_per_node``: started ranks (None: GPUs, or 1).
    ``free_bytes``: the least free memory of all ranks' devices, where they have agreed on it. A device that
    ``conf/hardware`` does not know gets figures of the nearest kind: see ``_unknown_device``.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.type != "cpu"
    if not on_gpu:
        ranks = ranks_per_node or 1
        return _with(_cpu(ranks), {"nodes": nodes, "gpus_per_node": ranks})
    device = device or torch.device("cuda")
    device_name = torch.cuda.get_device_name(device)
    base = known_device(device_name) or _unknown_device(device_name, device)
    free = free_bytes if free_bytes is not None else free_device_memory_bytes(device)
    return _with(
        base,
        {
            "name": HERE,
            "device": device_name,
            "nodes": nodes,
            "gpus_per_node": ranks_per_node or torch.cuda.device_count(),
            "memory_gib": (free or 0) / GIB,
            "host_memory_gib": host_memory_bytes() / GIB,
            "found_here": True,
        },
    )


def _cpu(ranks: int) -> Hardware:
    """This machine without a GPU. Rates are rough until ``storymem-plan calibrate`` or a render has measured them.

    A rank computes on one thread (``parallel.cpu_threads``); more ranks than cores share them.
    """
    share = min(1.0, len(os.sched_getaffinity(0)) / ranks)
    return Hardware(
        name=HERE,
        device="cpu",
        nodes=1,
        gpus_per_node=1,
        memory_gib=None,
        host_memory_gib=host_memory_bytes() / GIB,
        peak_tflops=0.05 * share,
        memory_gb_per_s=10.0 * share,
        link_gb_per_s=2.0,
        link_latency_us=100.0,
        network_gb_per_s=1.0,
        network_latency_us=200.0,
        host_link_gb_per_s=10.0,
        read_gb_per_s=0.5,
        found_here=True,
        core_share=share,
    )


def _unknown_device(device_name: str, device: torch.device) -> Hardware:
    """A GPU without an entry: its own peak, from data sheets or its multiprocessors, and the links of its class."""
    properties: Any = torch.cuda.get_device_properties(device)
    per_multiprocessor = 7.5 if properties.major >= 9 and properties.total_memory > 60 * GIB else 1.3
    peak = peak_tflops(device_name) or per_multiprocessor * properties.multi_processor_count
    near = "a100_80g" if peak > 250 else "rtx4090_24g"
    return _with(known_hardware(near), {"device": device_name, "peak_tflops": peak})


def _with(base: Hardware, changes: dict[str, Any]) -> Hardware:
    values = {one.name: getattr(base, one.name) for one in fields(base)} | changes
    return Hardware(**values)
