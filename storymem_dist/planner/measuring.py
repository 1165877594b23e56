"""Measures this machine for a few seconds: products, attention and the VAE in the model's shapes, memory, links.

What it finds becomes the constants of this device (``calibration.keep_calibrated``). The same code runs on a GPU and on
a CPU, with smaller shapes on the latter. Links between ranks are measured by ``parallel.links``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from storymem_dist.errors import ConfigError
from storymem_dist.models.attention import Attend, start_backend, stop_backend
from storymem_dist.models.attention_choice import CANDIDATES, AttentionForm, seconds_of, time_kernels
from storymem_dist.models.quantized_linear import check_linears, quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import TINY, VaeConfig
from storymem_dist.models.wan.vae import untrained_vae
from storymem_dist.planner.calibration import MEASURED, Constants, keep_calibrated, load_shipped
from storymem_dist.planner.hardware import Hardware, hardware_here
from storymem_dist.planner.timing import eager_operators, narrow_vae_factor
from storymem_dist.planner.work import decode_flop

Clock = Callable[[Callable[[], Any], torch.device], float]
"""Returns the seconds that one call takes on a device."""

_GIGA, _TERA, _MICRO = 1e9, 1e12, 1e-6
_SMALL_LAYERS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Sizes of what is measured: tokens, width and hidden width of a layer; heads; ``base_dim`` and side in pixels
    of a clip for the VAE; bytes of a copy."""

    num_tokens: int
    dim: int
    ffn_dim: int
    num_heads: int
    channels: int
    side: int
    copied: int
    dtype: torch.dtype


ON_GPU = Shapes(
    num_tokens=16_380,
    dim=5120,
    ffn_dim=13_824,
    num_heads=40,
    channels=96,
    side=480,
    copied=2**30,
    dtype=torch.bfloat16,
)
ON_CPU = Shapes(
    num_tokens=512,
    dim=512,
    ffn_dim=1408,
    num_heads=4,
    channels=16,
    side=64,
    copied=64 * 2**20,
    dtype=torch.float32,
)


@torch.no_grad()
def calibrate(
    device: torch.device,
    *,
    link_rate: float | None = None,
    cache: Path | None = None,
    clock: Clock = seconds_of,
    shapes: Shapes | None = None,
) -> Constants:
    """Measure ``device``, keep the result in ``cache`` (None: the user's) and return it.

    ``link_rate``: bytes per second between the ranks of a node, if it was measured. What is not measured (8-bit layers
    that the device has not, links of one rank, disks) stays as shipped. Raises ``ConfigError`` where ``cache`` cannot
    be written.
    """
    shapes = shapes or (ON_CPU if device.type == "cpu" else ON_GPU)
    hardware = hardware_here(device)
    shipped = load_shipped(hardware)
    peak = hardware.peak_tflops * _TERA
    linear = _linear_rate(device, shapes, clock) / peak
    vae = _vae_rate(device, shapes, clock) / peak
    bandwidth = _copy_rate(device, shapes, clock)
    found = replace(
        shipped,
        device=hardware.device,
        linear=linear,
        linear_8bit=_eight_bit_share(device, shapes, clock, hardware) or shipped.linear_8bit * linear / shipped.linear,
        attention=_attention_rate(device, shapes, clock) / peak,
        vae=vae,
        text=linear * shipped.text / shipped.linear,
        memory=bandwidth / (hardware.memory_gb_per_s * _GIGA),
        host_link=_host_link_rate(device, shapes, clock) / (hardware.host_link_gb_per_s * _GIGA),
        operator_us=_operator_seconds(device, shapes.dtype) / _MICRO,
        how=MEASURED,
        source=f"storymem-plan calibrate, torch {torch.__version__}",
        date=date.today().isoformat(),
    )
    if link_rate is not None:
        found = replace(found, link=link_rate / (hardware.link_gb_per_s * _GIGA))
    if not keep_calibrated(hardware, found, cache=cache):
        raise ConfigError(
            "what was measured cannot be kept in planner/ of the cache; make it writable, or set STORYMEM_CACHE to "
            "another folder"
        )
    return found


def _linear_rate(device: torch.device, shapes: Shapes, clock: Clock) -> float:
    """FLOP per second of the two shapes that make up a block: D to D, and D to the hidden width."""
    tokens = torch.randn(shapes.num_tokens, shapes.dim, device=device, dtype=shapes.dtype)
    flop = seconds = 0.0
    for rows, times in ((shapes.dim, 6), (shapes.ffn_dim, 2)):
        weight = torch.randn(rows, shapes.dim, device=device, dtype=shapes.dtype)
        flop += times * 2.0 * shapes.num_tokens * shapes.dim * rows
        seconds += times * clock(partial(F.linear, tokens, weight), device)
    return flop / seconds


def _eight_bit_share(device: torch.device, shapes: Shapes, clock: Clock, hardware: Hardware) -> float | None:
    """The share of the 8-bit peak that a layer reaches, its scaling included; None where a device has no such layer."""
    for linears, peak in (("float8", hardware.peak_tflops_float8), ("int8", hardware.peak_tflops_int8)):
        if peak is None:
            continue
        try:
            check_linears(linears, device)
        except ConfigError:
            continue
        layers = nn.Sequential(nn.Linear(shapes.dim, shapes.dim, device=device, dtype=shapes.dtype))
        quantize_linears(layers, linears)
        for parameter in layers.parameters():
            parameter.zero_()
        tokens = torch.zeros(shapes.num_tokens, shapes.dim, device=device, dtype=shapes.dtype)
        return 2.0 * shapes.num_tokens * shapes.dim**2 / clock(partial(layers, tokens), device) / (peak * _TERA)
    return None


def _attention_rate(device: torch.device, shapes: Shapes, clock: Clock) -> float:
    """FLOP per second of self-attention with the fastest kernel of those that a job chooses from."""
    form = AttentionForm(
        num_tokens=shapes.num_tokens,
        num_heads=shapes.num_heads,
        head_dim=shapes.dim // shapes.num_heads,
        dtype=shapes.dtype,
    )
    seconds: list[float] = []
    if device.type != "cpu":
        usable = [kernel for kernel in CANDIDATES if _starts(kernel, form, device)]
        seconds = list(time_kernels(form, device, usable, clock=clock).values())
    if not seconds:
        q, k, v = form.inputs(device)
        seconds = [clock(partial(Attend("auto"), q, k, v), device)]
    return form.tflop * _TERA / min(seconds)


def _starts(kernel: str, form: AttentionForm, device: torch.device) -> bool:
    try:
        start_backend(kernel, device=device, dtype=form.dtype, head_dim=form.head_dim)
    except ConfigError:
        return False
    finally:
        stop_backend(kernel)
    return True


def _vae_rate(device: torch.device, shapes: Shapes, clock: Clock) -> float:
    """FLOP per second that decoding reaches with the published width: all of it, not its convolutions alone."""
    config = VaeConfig(base_dim=shapes.channels)
    with device:
        vae = untrained_vae(base_dim=config.base_dim, z_dim=config.z_dim, dtype=shapes.dtype)
        latents = torch.zeros(config.z_dim, 2, shapes.side // 8, shapes.side // 8)
    flop = decode_flop(5, shapes.side, shapes.side, config)
    return flop * narrow_vae_factor(config) / clock(partial(vae.decode, latents), device)


def _copy_rate(device: torch.device, shapes: Shapes, clock: Clock) -> float:
    """Bytes per second that pass through the device's memory, read and written."""
    source = torch.zeros(shapes.copied // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / clock(partial(target.copy_, source), device)


def _host_link_rate(device: torch.device, shapes: Shapes, clock: Clock) -> float:
    """Bytes per second from (page-locked) host memory to the device."""
    source = torch.zeros(shapes.copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    return source.nbytes / clock(partial(target.copy_, source, non_blocking=True), device)


def _operator_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The host's time for one operator of a model whose tensors are so small that it waits for the host."""
    config = replace(TINY.t2v, num_layers=_SMALL_LAYERS, text_len=8)
    dit = WanDiT(config, dtype=dtype).to(device).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.zero_()
    latents = torch.zeros(1, config.in_dim, 1, 4, 4, device=device)
    text = torch.zeros(1, 1, config.text_dim, device=device)
    moment, positions = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    run = partial(dit, latents, moment, text, positions)
    run()
    fastest = min(_timed(run) for _ in range(5))
    return fastest / eager_operators(config)


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
