"""Checks of the machine alone: packages, GPUs, links, host memory and limits, network, SLURM, video encoder.

Each check returns findings and never raises for a fault it looks for. Reads state, changes nothing; needs no GPU.
"""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import torch
from packaging.requirements import Requirement

from storymem_dist.artifacts.video import CODECS
from storymem_dist.doctor.finding import Finding, ok, problem, warning
from storymem_dist.hardware import GIB, host_memory_bytes
from storymem_dist.models.attention import cudnn_attention_off

DISTRIBUTION = "storymem_dist"
_COMMAND_SECONDS = 5
_MIN_OPEN_FILES = 4096
_MIN_SHM_BYTES = 1 * GIB
_MIN_HOST_BYTES = 48 * GIB
_MIN_GPU_BYTES = 22 * GIB
_BUSY_GPU_RATIO = 0.1
_DEFAULT_PORT = 29500


def check_versions() -> Iterator[Finding]:
    """Python, and every required package, compared with the versions that this project needs."""
    yield ok("software", "python", f"{platform.python_version()} on {platform.system()} {platform.release()}")
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        extra = next((extra for extra in ("deepspeed", "flash-attn", "gguf") if f'"{extra}"' in text), None)
        if requirement.marker is not None and extra is None:
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if extra:
                yield ok(
                    "software", requirement.name, f"not installed (optional: pip install 'storymem_dist[{extra}]')"
                )
            else:
                yield problem("software", requirement.name, "not installed", f"pip install '{requirement.name}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield ok("software", requirement.name, found)
        else:
            wanted = f"{requirement.name}{requirement.specifier}"
            yield problem("software", requirement.name, found, f"pip install '{wanted}'")


def check_gpus() -> Iterator[Finding]:
    """Each GPU that torch sees; or why torch sees none despite a driver."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if driver is None:
            yield warning("gpu", "devices", "none", "without a GPU only model=nano renders in reasonable time")
        elif torch.version.cuda is None:
            fix = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
            yield problem(
                "gpu", "devices", f"driver {driver.split()[0]}, but torch {torch.__version__} is for CPUs", fix
            )
        else:
            fix = "check CUDA_VISIBLE_DEVICES, and that the driver supports this CUDA (nvidia-smi shows which)"
            yield problem(
                "gpu", "devices", f"driver {driver.split()[0]}, torch for CUDA {torch.version.cuda}: none", fix
            )
        return
    yield ok("gpu", "driver", f"{(driver or 'unknown').split()[0]}, CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        yield _check_gpu(index)


def _check_gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    value = f"{properties.name}, {total / GIB:.0f} GiB, compute {properties.major}.{properties.minor}"
    name = f"cuda:{index}"
    if 1 - free / total > _BUSY_GPU_RATIO:
        used = f"{value}; {(total - free) / GIB:.1f} GiB in use"
        return warning("gpu", name, used, "another process uses it (nvidia-smi names it)")
    if total < _MIN_GPU_BYTES:
        fix = "A14B fits at 832x480, with its blocks streamed (model.experts=auto does so), but not at 1280x720"
        return warning("gpu", name, value, fix)
    if properties.major < 8:
        return warning("gpu", name, value, "bf16 is slow before compute 8.0: expect long renders")
    return ok("gpu", name, value)


def check_links() -> Iterator[Finding]:
    """NCCL, and whether the GPUs of this machine reach each other directly."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return
    nccl: Any = torch.cuda.nccl
    try:
        yield ok("gpu", "nccl", ".".join(map(str, nccl.version())))
    except (AttributeError, RuntimeError):
        yield problem("gpu", "nccl", "not in this torch", "install a CUDA build of torch for Linux")
    if count > 1:
        cut = [
            f"{one}-{other}"
            for one in range(count)
            for other in range(one + 1, count)
            if not torch.cuda.can_device_access_peer(one, other)
        ]
        if cut:
            fix = "collectives go through host memory: prefer one replica per GPU (parallel=replicas)"
            yield warning("gpu", "links", f"no direct access between {', '.join(cut)}", fix)
        else:
            yield ok("gpu", "links", f"all {count} GPUs reach each other directly")


def check_attention() -> Iterator[Finding]:
    """Which attention kernels torch and the optional packages provide."""
    if torch.cuda.is_available():
        cuda: Any = torch.backends.cuda
        kernels = [
            name
            for name, enabled in (
                ("cudnn", cuda.cudnn_sdp_enabled()),
                ("flash", cuda.flash_sdp_enabled()),
                ("memory-efficient", cuda.mem_efficient_sdp_enabled()),
            )
            if enabled
        ]
        available = ", ".join(kernels) or "math only"
        if slower := cudnn_attention_off():
            yield warning("attention", "torch", available, slower)
        else:
            yield ok("attention", "torch", available)
    else:
        yield ok("attention", "torch", "flash (CPU)")
    for module, backend in (("flash_attn", "flash_attn_2"), ("flash_attn_interface", "flash_attn_3")):
        found = importlib.util.find_spec(module) is not None
        yield ok("attention", backend, "installed" if found else f"package {module} not installed (optional)")


def check_host() -> Iterator[Finding]:
    """Cores, memory and limits of this process."""
    yield ok("host", "cores", len(os.sched_getaffinity(0)))
    total = host_memory_bytes()
    if total < _MIN_HOST_BYTES:
        fix = "model.experts=stream and swap keep both A14B experts in host memory: 56 GiB, 30 GiB in eight bits"
        yield warning("host", "memory", f"{total / GIB:.0f} GiB", fix)
    else:
        yield ok("host", "memory", f"{total / GIB:.0f} GiB")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total
        if shared < _MIN_SHM_BYTES:
            fix = "NCCL needs more between GPUs: start the container with --ipc=host or --shm-size=16g"
            yield warning("host", "/dev/shm", f"{shared / GIB:.2f} GiB", fix)
        else:
            yield ok("host", "/dev/shm", f"{shared / GIB:.0f} GiB")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _MIN_OPEN_FILES:
        yield warning("host", "open files", soft, "ulimit -n 65536")
    else:
        yield ok("host", "open files", soft if soft >= 0 else "unlimited")


def check_network() -> Iterator[Finding]:
    """Whether ranks of one machine can connect to each other."""
    hostname = socket.gethostname()
    try:
        socket.getaddrinfo(hostname, None)
        yield ok("network", "host name", hostname)
    except OSError:
        fix = f"add '127.0.1.1 {hostname}' to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        yield warning("network", "host name", f"{hostname} does not resolve", fix)
    port = int(os.environ.get("MASTER_PORT", _DEFAULT_PORT))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            yield ok("network", "port", f"{port} is free")
        except OSError:
            fix = "another job on this machine uses it: set MASTER_PORT, or torchrun --standalone"
            yield warning("network", "port", f"{port} is taken", fix)


def check_slurm() -> Iterator[Finding]:
    """Whether there is a cluster, and whether this runs inside one of its jobs."""
    version = _output("sbatch", "--version")
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        nodes, tasks = (os.environ.get(key, "?") for key in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"))
        yield ok("cluster", "slurm", f"inside job {job}: {nodes} nodes, {tasks} tasks")
    else:
        yield ok("cluster", "slurm", version.strip() if version else "not found")


def check_video() -> Iterator[Finding]:
    """The encoders in PyAV's wheel."""
    for codec in CODECS:
        if codec in av.codecs_available:
            yield ok("video", codec, f"in PyAV {av.__version__}")
        else:
            yield warning("video", codec, "not in this PyAV", "pip install --force-reinstall --only-binary=av av")


def check_restarts() -> Iterator[Finding]:
    """The torch bug that breaks torchrun's restarts (pytorch issue 135712)."""
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ok("network", "torchrun", "storymem-render's own launcher makes restarts safe")
    else:
        yield warning(
            "network",
            "torchrun",
            "restarts after a dead GPU may hang",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun",
        )


def _output(*command: str) -> str | None:
    """Return what a program prints; None if it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
