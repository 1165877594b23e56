"""Step 1: what the machine is, what ``attention=auto`` would be there, and which attention kernels start."""

import platform
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu_steps.step import Bench, Row, attempt
from benchmarks.harness import device_name
from storymem_dist.hardware import GIB, host_memory_bytes
from storymem_dist.models.attention import (
    BACKENDS,
    attend_with_lse,
    cudnn_attention_off,
    describe_backend,
    start_backend,
    stop_backend,
)
from storymem_dist.models.attention_choice import AttentionForm

PACKAGES = ("diffusers", "transformers", "hydra-core", "wandb", "flash_attn", "flash_attn_3", "deepspeed", "triton")


def describe_machine(bench: Bench) -> Iterator[Row]:
    """Versions, memory, kernels: what a reader of the other steps must know."""
    device = bench.device
    yield from (_fact(what, value) for what, value in _versions(device))
    dtype, head_dim = bench.sizes.dtype, bench.sizes.config.head_dim
    here: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": head_dim}
    yield attempt({"what": "torch's own attention kernel"}, lambda: {"value": describe_backend("auto", **here)})
    yield _fact("cuDNN's attention kernel", cudnn_attention_off() or "not left off")
    form = AttentionForm(num_tokens=130, num_heads=2, head_dim=head_dim, dtype=dtype, with_lse=True)
    for backend in BACKENDS:
        yield attempt({"what": f"model.attention={backend}"}, _start, backend, form, device)


def _start(backend: str, form: AttentionForm, device: torch.device) -> Row:
    began = time.perf_counter()
    try:
        start_backend(backend, device=device, dtype=form.dtype, head_dim=form.head_dim)
        seconds = time.perf_counter() - began
        q, k, v = form.inputs(device)
        lse = attend_with_lse(q, k, v, backend)[1]
    finally:
        stop_backend(backend)
    layout = f"log-sum-exp {list(lse.shape)}, strides {list(lse.stride())}, {lse.dtype}"
    return {"value": f"starts in {seconds:.2f} s; {layout}"}


def _versions(device: torch.device) -> Iterator[tuple[str, Any]]:
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "device", device_name(device)
    yield "host memory, GiB", round(host_memory_bytes() / GIB, 1)
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    if device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    yield "compute capability", f"{properties.major}.{properties.minor}"
    yield "device memory, GiB", f"{free / GIB:.1f} free of {total / GIB:.1f}"
    yield "CUDA of torch", torch.version.cuda
    yield "cuDNN", torch.backends.cudnn.version()
    nccl: Any = torch.cuda.nccl
    yield "NCCL", ".".join(map(str, nccl.version()))
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        yield "driver, highest clock, power limit", done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        yield "driver", "nvidia-smi does not answer"


def _fact(what: str, value: Any) -> Row:
    return {"what": what, "value": value}
