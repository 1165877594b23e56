"""The process of another program, in which the Python API is a guest: it is left as it was found.

While the API computes, torch's switches are those of a command (so pixels are, too); when it returns, or raises, they
are the host's again. One render at a time: the switches belong to the whole process.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import attention as registry

from storymem_dist.errors import ConfigError
from storymem_dist.models.precision import set_fp32_precision

RENDERING = threading.RLock()
"""Held while the API computes, loads or frees."""

_VARIABLES = ("CUDNN_CONV_WSCAP_DBG", "TORCHINDUCTOR_CACHE_DIR")
_FP32_SWITCHES = [
    ("generic", "all"),
    *((on, what) for on in ("cuda", "mkldnn") for what in ("all", "matmul", "conv", "rnn")),
]


@contextmanager
def as_guest(device: torch.device, *, cpu_threads: int, vae_precision: str) -> Iterator[None]:
    """Compute on ``device`` as a command would, and leave the process as it was found. Waits for other renders.

    Whatever mode the calling thread is in (inference, gradients, autocast, a default device or dtype), the body is in
    none of them: weights that are made in inference mode could not be used outside of it.
    """
    with RENDERING, ExitStack() as undo:
        undo.enter_context(_environment_restored())
        if torch.get_default_device().type != "cpu":
            undo.enter_context(torch.device("cpu"))
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            undo.enter_context(torch.autocast(kind, enabled=False))
        if device.type == "cuda":
            undo.enter_context(torch.cuda.device(device))
        for read, write, ours in _switches():
            before = read()
            if before != ours:
                undo.callback(write, before)
                write(ours)
        undo.enter_context(_fp32_restored())
        set_fp32_precision(convolutions=vae_precision)
        undo.enter_context(_flash_attention_restored())
        undo.enter_context(_threads(cpu_threads) if device.type == "cpu" else nullcontext())
        yield


def choose_guest_device(choice: "str | torch.device") -> torch.device:
    """The device that a host names; ``auto`` is its current GPU, if there is one. Raises ``ConfigError``."""
    name = str(choice)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is not allowed; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"device={name} is not supported; use auto, cpu, cuda or cuda:N")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        raise ConfigError(f"device={name}, but torch sees no GPU here; use device=cpu or auto")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= num_gpus:
        raise ConfigError(f"device={name}, but torch sees {num_gpus} GPUs here, cuda:0 to cuda:{num_gpus - 1}")
    return torch.device("cuda", index)


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], object], Any]]:
    """Torch's other switches that can change pixels or memory: how each is read and set, and torch's own default."""
    cudnn, cuda, matmul = torch.backends.cudnn, torch.backends.cuda, torch.backends.cuda.matmul

    def attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
        return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)

    return [
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp, False),
        (*attribute(cudnn, "enabled"), True),
        (*attribute(cudnn, "benchmark"), False),
        (*attribute(cudnn, "deterministic"), False),
        (*attribute(matmul, "allow_fp16_reduced_precision_reduction"), True),
        (*attribute(matmul, "allow_bf16_reduced_precision_reduction"), True),
        (*attribute(matmul, "allow_fp16_accumulation"), False),
    ]


@contextmanager
def _fp32_restored() -> Iterator[None]:
    """Restore how fp32 products are computed, whichever of torch's two interfaces the host uses for it."""
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    single = {switch: read(*switch) for switch in _FP32_SWITCHES}
    older: list[tuple[Callable[[Any], object], Any]] = []
    interfaces: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32),
    ]
    for get, set_again in interfaces:
        try:
            older.append((set_again, get()))
        except RuntimeError:  # what the host has set with the newer interface, the older one cannot say
            continue
    try:
        yield
    finally:
        for set_again, value in older:
            set_again(value)
        for switch, value in single.items():
            write(*switch, value)


@contextmanager
def _flash_attention_restored() -> Iterator[None]:
    """Restore which package computes torch's flash attention; an older torch knows its own alone."""
    current = getattr(registry, "current_flash_attention_impl", lambda: None)
    before = current()
    try:
        yield
    finally:
        if current() != before:
            registry.restore_flash_attention_impl()
            if before is not None:
                registry.activate_flash_attention_impl(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Restore the variables that the body sets for libraries; those that others set meanwhile stay."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
