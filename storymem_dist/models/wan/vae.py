"""Wan2.1's causal video VAE: pixels to normalized latents and back, around diffusers' ``AutoencoderKLWan``.

Stride 4 in time (the first frame alone, then groups of 4) and 8 in space, 16 channels. Latents are normalized by the
published per-channel mean and standard deviation, which diffusers leaves to its caller. Computes in fp32, or in bf16
with channels last in memory, the order that kernels for 16-bit convolutions read. Knows nothing about memory, masks or
ranks: parallel code adds hooks to ``WanVae.autoencoder``.

Legend: C channels, F = 4n+1 frames, H/W pixels, T = n+1 latent frames, h = H/8, w = W/8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8


def untrained_vae(*, base_dim: int, z_dim: int, dtype: torch.dtype) -> "WanVae":
    """Return a VAE with random weights on the default device, for measurements."""
    autoencoder: Any = AutoencoderKLWan(base_dim=base_dim, z_dim=z_dim)
    return WanVae(autoencoder.to(dtype))


class WanVae:
    """Encodes one clip or image at a time; every result is normalized (latents) or clamped to [-1, 1] (pixels)."""

    def __init__(self, autoencoder: AutoencoderKLWan):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self._channels_last = autoencoder.dtype == torch.bfloat16
        if self._channels_last:
            order_channels_last(autoencoder)
        config: Any = autoencoder.config
        self._mean_C111, self._std_C111 = (
            torch.tensor(values, dtype=torch.float32, device=self.device)[:, None, None, None]
            for values in (config.latents_mean, config.latents_std)
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights; inputs are moved to it."""
        return self.autoencoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of all computation."""
        return self.autoencoder.dtype

    def to(self, device: torch.device | str) -> "WanVae":
        """Move the weights; returns itself."""
        module: nn.Module = self.autoencoder  # ModelMixin.to hides its signature from type checkers
        module.to(device)
        self._mean_C111, self._std_C111 = self._mean_C111.to(device), self._std_C111.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        """Normalized latents ``[16, T, h, w]`` (fp32) of RGB pixels ``[3, F, H, W]`` in [-1, 1] or slightly beyond.

        Raises ``ValueError`` unless F is 4n+1 and both sides are multiples of 8.
        """
        channels, frames, height, width = pixels_CFHW.shape
        if channels != 3 or frames % TEMPORAL_STRIDE != 1 or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ValueError(f"clip {tuple(pixels_CFHW.shape)} cannot be encoded; expected [3, 4n+1, 8h, 8w]")
        with self._feature_caches():
            posterior = self.autoencoder.encode(self._input(pixels_CFHW)).latent_dist
        raw_CTHW = posterior.mean[0].float()
        return (raw_CTHW - self._mean_C111) / self._std_C111

    def encode_image(self, pixels_CHW: Tensor) -> Tensor:
        """Normalized latents ``[16, 1, h, w]`` of one image in [-1, 1], encoded alone as a one-frame clip."""
        return self.encode(pixels_CHW[:, None])

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Pixels ``[3, 4T-3, 8h, 8w]`` (fp32), clamped to [-1, 1], of normalized latents ``[16, T, h, w]``."""
        latents_CTHW = latents_CTHW.to(self.device, torch.float32)
        raw_CTHW = latents_CTHW * self._std_C111 + self._mean_C111
        with self._feature_caches():
            pixels_CFHW = self.autoencoder.decode(self._input(raw_CTHW), return_dict=False)[0][0]
        return pixels_CFHW.float()

    def _input(self, values_CTHW: Tensor) -> Tensor:
        """A batch of one on the device of the weights, in their dtype and order in memory."""
        batch = values_CTHW[None].to(self.device, self.dtype)
        return batch.contiguous(memory_format=torch.channels_last_3d) if self._channels_last else batch

    @contextmanager
    def _feature_caches(self) -> Iterator[None]:
        """Free the caches between chunks of frames also when a pass fails, for instance for lack of memory."""
        try:
            yield
        except BaseException:
            self.autoencoder.clear_cache()
            raise


def order_channels_last(module: nn.Module) -> None:
    """Order the weights of convolutions in memory with channels last; numbers and shapes do not change."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
