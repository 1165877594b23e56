"""Chooses the attention kernel of a job: times the exact kernels that the device has on the job's own shape.

The choice changes results by rounding only. It is remembered in the user's cache, per device, versions and shape. A job
with one kernel times nothing. Knows nothing about ranks: the caller shares one choice among them.

Legend: L tokens, N heads, H head width.
"""

import hashlib
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.errors import ConfigError
from storymem_dist.files import canonical_json, read_json, write_bytes
from storymem_dist.models.attention import (
    Attend,
    attend_with_lse,
    cudnn_attention_off,
    relative_distance,
    start_backend,
    stop_backend,
)

logger = logging.getLogger(__name__)

CANDIDATES = ("sdpa_cudnn", "sdpa_flash", "flash_attn_2", "flash_attn_3")
"""What ``auto`` chooses from, in the order in which kernels are tried."""

Clock = Callable[[Callable[[], Any], torch.device], float]
"""Returns the seconds that one call takes on a device."""

_FORMAT = 1
_MAX_BYTES = 64 * 1024
_PACKAGES = ("flash_attn", "flash_attn_3")
_SECONDS_PER_KERNEL = 0.25
_MAX_REPEATS = 20
_CHECKED_ROWS = 16
_TOLERANCE = {2: 0.03, 4: 0.004}  # relative, by bytes per element; fp32 kernels may compute in TF32


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionForm:
    """One call of self-attention as a rank makes it: queries and keys ``[1, num_tokens, num_heads, head_dim]``.

    ``strided``: q and k are views of one message, as Ulysses receives them. ``with_lse``: the call also returns the
    log-sum-exp, as on a ring, where keys arrive in memory of their own.
    """

    num_tokens: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    strided: bool = False
    with_lse: bool = False

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Random q, k and v."""
        generator = torch.Generator(device).manual_seed(0)
        parts = (
            torch.randn(
                (1, self.num_tokens, num, self.num_heads, self.head_dim),
                generator=generator,
                device=device,
                dtype=self.dtype,
            ).unbind(2)
            for num in (2, 1)
        )
        (q, k), (v,) = parts
        return [
            q if self.strided else q.contiguous(),
            k if self.strided and not self.with_lse else k.contiguous(),
            v,
        ]

    def run(self, kernel: str, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """The output of one call with ``kernel``."""
        if self.with_lse:
            return attend_with_lse(q_BLNH, k_BLNH, v_BLNH, kernel)[0]
        return Attend(kernel)(q_BLNH, k_BLNH, v_BLNH)

    @property
    def tflop(self) -> float:
        """TFLOP of scores and values."""
        return 4 * self.num_tokens**2 * self.num_heads * self.head_dim / 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The kernel of a job, with the seconds of each one that was timed (none: there was nothing to choose).

    ``remembered``: an earlier job timed them.
    """

    kernel: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    remembered: bool = False

    def __str__(self) -> str:
        if not self.seconds:
            return self.kernel
        others = sorted((seconds, name) for name, seconds in self.seconds.items() if name != self.kernel)
        mine = self.seconds[self.kernel]
        than = ", ".join(f"{seconds / mine:.2f}x as fast as {name}" for seconds, name in others)
        return f"{self.kernel} ({mine * 1e3:.3g} ms, {than}{'; measured before' if self.remembered else ''})"


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest call of ``run``, after one that is not counted."""
    run()
    fastest, spent = math.inf, 0.0
    for _ in range(_MAX_REPEATS):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        took = time.perf_counter() - start
        fastest, spent = min(fastest, took), spent + took
        if spent >= _SECONDS_PER_KERNEL:
            break
    return fastest


@torch.no_grad()
def choose_kernel(
    form: AttentionForm,
    device: torch.device,
    *,
    cache: Path | None = None,
    kernels: Sequence[str] = CANDIDATES,
    clock: Clock = seconds_of,
) -> Choice:
    """Return the fastest of ``kernels`` for ``form`` on ``device``; ``start_backend`` must start it.

    Kernels that cannot run there, give other results than exact attention, or are left off by torch are not timed. With
    less than two to time, or without memory for the inputs, the choice is ``auto``: torch's own. ``cache`` is the
    folder where measurements are kept; a file there that is damaged or cannot be written costs a new measurement.
    """
    usable = [kernel for kernel in kernels if _works(kernel, form, device)]
    if len(usable) < 2:
        return Choice(kernel="auto")
    key = _key(form, device, usable)
    name = f"{hashlib.sha256(canonical_json(key)).hexdigest()[:24]}.json"
    path = None if cache is None else cache / "attention" / name
    known = _read(path, key)
    if known is not None:
        return Choice(kernel=min(known, key=known.__getitem__), seconds=known, remembered=True)
    try:
        seconds = time_kernels(form, device, usable, clock=clock)
    except torch.OutOfMemoryError:
        logger.warning("there is no memory to time attention kernels on %s; torch chooses", device)
        return Choice(kernel="auto")
    if len(seconds) < 2:  # torch itself might choose one that is left out
        return Choice(kernel=next(iter(seconds), "auto"))
    _write(path, key, seconds)
    return Choice(kernel=min(seconds, key=seconds.__getitem__), seconds=seconds)


@torch.no_grad()
def time_kernels(
    form: AttentionForm, device: torch.device, kernels: Sequence[str], *, clock: Clock = seconds_of
) -> dict[str, float]:
    """Seconds of one call with each of ``kernels`` that runs ``form`` and gives the results of exact attention."""
    q, k, v = form.inputs(device)
    rows = slice(0, form.num_tokens, -(-form.num_tokens // _CHECKED_ROWS))
    exact = attend_with_lse(q[:, rows], k, v, "sdpa_math")[0]
    seconds: dict[str, float] = {}
    for kernel in kernels:
        start_backend(kernel, device=device, dtype=form.dtype, head_dim=form.head_dim)
        try:
            distance = relative_distance(form.run(kernel, q, k, v)[:, rows], exact)
            if distance <= _TOLERANCE[form.dtype.itemsize]:
                seconds[kernel] = clock(partial(form.run, kernel, q, k, v), device)
            else:
                logger.warning("attention kernel %s is left out: its results differ by %.1e", kernel, distance)
        except RuntimeError as error:  # of lengths or strides that the short trial of ``start_backend`` does not have
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("attention kernel %s is left out: it fails on the job's shape (%s)", kernel, reason)
        finally:
            stop_backend(kernel)
    if device.type == "cuda":
        del q, k, v, exact
        torch.cuda.empty_cache()
    return seconds


def _works(kernel: str, form: AttentionForm, device: torch.device) -> bool:
    if kernel == "sdpa_cudnn" and cudnn_attention_off():
        return False
    try:
        start_backend(kernel, device=device, dtype=form.dtype, head_dim=form.head_dim)
    except ConfigError as error:
        logger.info("attention kernel %s is not used: %s", kernel, error)
        return False
    finally:
        stop_backend(kernel)
    return True


def _key(form: AttentionForm, device: torch.device, kernels: Sequence[str]) -> dict[str, Any]:
    """All that a measurement depends on."""
    versions: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    versions["cudnn"] = torch.backends.cudnn.version()
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions,
        "kernels": list(kernels),
        "form": asdict(form) | {"dtype": str(form.dtype)},
    }


def _read(path: Path | None, key: Mapping[str, Any]) -> dict[str, float] | None:
    """The measurement in ``path``; None unless it is one of exactly ``key``."""
    if path is None:
        return None
    try:
        found = read_json(path, _MAX_BYTES)
        seconds = found["seconds"]
        if found["format"] != _FORMAT or found["key"] != key or not set(seconds) <= set(key["kernels"]):
            return None
        known = {name: float(seconds[name]) for name in key["kernels"] if name in seconds}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return known if len(known) > 1 and all(0 < value < math.inf for value in known.values()) else None


def _write(path: Path | None, key: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, canonical_json({"format": _FORMAT, "key": key, "seconds": seconds}), durable=False)
    except OSError as error:
        logger.info("the times of attention kernels cannot be kept in %s: %s", path.parent, error)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
