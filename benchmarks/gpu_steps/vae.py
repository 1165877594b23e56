"""Steps 10 and 11: the VAE in every precision and memory order, and a decode that runs out of memory once."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_steps.step import Bench, Grid, Row, attempt, require_package, wait
from benchmarks.harness import peak_gib
from benchmarks.own_dit import make_ours
from storymem_dist.diffusion.denoise import PromptEmbeds
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.hardware import GIB
from storymem_dist.models.attention import relative_distance
from storymem_dist.models.precision import VAE_PRECISIONS, set_fp32_precision, vae_dtype
from storymem_dist.models.wan.presets import TINY
from storymem_dist.render.clip import ClipRequest, ClipSampler

_EXACT = "float32"
_ROOM = 0.15


def time_vae(bench: Bench) -> Iterator[Row]:
    """Decodes and encodes: seconds, peak memory, and the difference from fp32 of the smallest size."""
    require_package("diffusers")
    for name, grid in bench.sizes.decodes.items():
        latents = _random(bench, 16, *grid)
        few = latents[:, :2]
        exact = None
        for precision, channels_last in _ways():
            row: Row = {"what": "decode", "size": name, **_way(precision, channels_last)}
            found: dict[str, Tensor] = {}
            yield attempt(row, _measure, bench, precision, channels_last, "decode", few, latents, exact, found)
            if precision == _EXACT:
                exact = found.get("result")
    for name, (frames, height, width) in bench.sizes.encodes.items():
        pixels = _random(bench, 3, 4 * frames - 3, 8 * height, 8 * width).clamp(-1, 1)
        for precision, channels_last in _ways():
            row = {"what": "encode", "size": name, **_way(precision, channels_last)}
            yield attempt(row, _measure, bench, precision, channels_last, "encode", pixels[:, :5], pixels, None, {})


def _ways() -> list[tuple[str, bool]]:
    """Precision, and whether fp32 weights lie with channels last (16-bit ones always do); the exact one first."""
    others = [precision for precision in VAE_PRECISIONS if precision != _EXACT]
    ways = [(precision, last) for precision in others for last in (False, True)]
    return [(_EXACT, False), *(way for way in ways if way != ("bfloat16", True))]


def _way(precision: str, channels_last: bool) -> Row:
    return {"precision": precision, "memory": "channels last" if channels_last or precision == "bfloat16" else ""}


def _measure(
    bench: Bench,
    precision: str,
    channels_last: bool,
    method: str,
    few: Tensor,
    values: Tensor,
    exact: Tensor | None,
    found: dict[str, Tensor],
) -> Row:
    set_fp32_precision(convolutions=precision)
    vae = _make_vae(bench, vae_dtype(precision))
    if channels_last:
        _put_channels_last(vae.autoencoder)
    run: Callable[[Tensor], Tensor] = getattr(vae, method)
    run(few)  # chooses kernels
    wait(bench.device)
    start = time.perf_counter()

    def once() -> None:
        found["result"] = run(values)

    peak = peak_gib(once, bench.device)
    wait(bench.device)
    seconds = time.perf_counter() - start
    row: Row = {"s": seconds, "peak GiB": peak}
    return row | ({} if exact is None else {"difference": relative_distance(found["result"], exact)})


def _make_vae(bench: Bench, dtype: torch.dtype) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from storymem_dist.models.wan.vae import WanVae

    torch.manual_seed(0)
    autoencoder = AutoencoderKLWan(base_dim=bench.sizes.vae_base_dim)
    nn.Module.to(autoencoder, bench.device, dtype)
    return WanVae(autoencoder)


def _put_channels_last(module: nn.Module) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def _random(bench: Bench, *shape: int) -> Tensor:
    generator = torch.Generator(bench.device).manual_seed(3)
    return torch.randn(shape, generator=generator, device=bench.device)


def decode_again(bench: Bench) -> Iterator[Row]:
    """A clip whose decode finds no memory next to the experts: they are freed, and the decode runs again."""
    require_package("diffusers")
    set_fp32_precision(convolutions="tf32")
    device, grid = bench.device, next(iter(bench.sizes.decodes.values()))
    vae = _make_vae(bench, torch.float32)
    needed = int(peak_gib(lambda: vae.decode(_random(bench, 16, *grid)), device) * GIB)
    dits = [make_ours(TINY.t2v, torch.float32, device, seed=seed) for seed in (0, 1)]
    room = int(needed * (1 + _ROOM)) + (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
    ballast = _Ballast(needed, device)
    counting = _CountingVae(vae, ballast, device)
    experts = ExpertPair(
        high_noise=dits[0],
        low_noise=dits[1],
        boundary_ratio=0.9,
        guidance_scale_high=1.0,
        guidance_scale_low=1.0,
        residency=ballast,
    )
    clips = ClipSampler(load_experts=lambda kind: experts, guidance=LocalGuidance(), vae=counting, device=device)
    request = _request(grid)
    with _memory_limit(device, room):
        start = time.perf_counter()
        pixels = clips.sample(request)
        wait(device)
        seconds = time.perf_counter() - start
    tried = counting.decodes
    again = clips.sample(request)  # nothing limits it, and there is no ballast
    yield {
        "decode needs GiB": needed / GIB,
        "decodes tried": tried,
        "experts freed": ballast.held is None,
        "s": seconds,
        "difference": relative_distance(pixels, again),
    }


class _Ballast:
    """A ``Residency`` that holds memory, as resident experts do, until it is asked to free it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.held: Tensor | None = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def activate(self, name: str) -> None:
        """Nothing to do."""

    def end_shot(self) -> None:
        """Nothing to do."""

    def idle(self) -> None:
        """Free the memory."""
        self.held = None

    def release(self) -> None:
        """Free the memory."""
        self.held = None


class _CountingVae:
    """Counts decodes. On a CPU, whose memory nothing limits, one fails while the ballast is there."""

    def __init__(self, vae: Any, ballast: _Ballast, device: torch.device) -> None:
        self._vae = vae
        self._ballast = ballast
        self._device = device
        self.decodes = 0

    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        """As the VAE."""
        latents: Tensor = self._vae.encode(pixels_CFHW)
        return latents

    def encode_image(self, pixels_CHW: Tensor) -> Tensor:
        """As the VAE."""
        latents: Tensor = self._vae.encode_image(pixels_CHW)
        return latents

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """As the VAE."""
        self.decodes += 1
        if self._device.type == "cpu" and self._ballast.held is not None:
            raise torch.OutOfMemoryError("as a full device says it")
        pixels: Tensor = self._vae.decode(latents_CTHW)
        return pixels


@contextmanager
def _memory_limit(device: torch.device, num_bytes: int) -> Iterator[None]:
    """Inside, this process can take ``num_bytes`` of the device's memory in all."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _request(grid: Grid) -> ClipRequest:
    frames, height, width = grid
    sampler = SamplerSettings(
        num_inference_steps=2,
        num_frames=4 * frames - 3,
        height=8 * height,
        width=8 * width,
        guidance_scale_high=1.0,
        guidance_scale_low=1.0,
        continuation="none",
    )
    text = torch.randn(5, TINY.t2v.text_dim, generator=torch.Generator().manual_seed(4))
    return ClipRequest(mode="t2v", prompt=PromptEmbeds(prompt_LE=text, negative_LE=None), seed=0, sampler=sampler)
