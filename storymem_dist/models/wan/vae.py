"""Wan2.1's causal video VAE: pixels to normalized latents and back, around diffusers' ``AutoencoderKLWan``.

Stride 4 in time (the first frame alone, then groups of 4) and 8 in space, 16 channels, fp32. Latents are normalized by
the published per-channel mean and standard deviation, which diffusers leaves to its caller. Knows nothing about
memory, masks or ranks: parallel code adds hooks to ``WanVae.autoencoder``.

Legend: C channels, F = 4n+1 frames, H/W pixels, T = n+1 latent frames, h = H/8, w = W/8.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8


class WanVae:
    """Encodes one clip or image at a time; every result is normalized (latents) or clamped to [-1, 1] (pixels)."""

    def __init__(self, autoencoder: AutoencoderKLWan):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
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
        posterior = self.autoencoder.encode(pixels_CFHW[None].to(self.device, self.dtype)).latent_dist
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
        pixels_CFHW = self.autoencoder.decode(raw_CTHW[None].to(self.dtype), return_dict=False)[0][0]
        return pixels_CFHW.float()
