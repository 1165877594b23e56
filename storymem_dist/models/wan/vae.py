"""Wan2.1's causal video VAE: pixels to normalized latents and back, around diffusers' ``AutoencoderKLWan``.

Stride 4 in time (the first frame alone, then groups of 4) and 8 in space, 16 channels, fp32. Latents are normalized by
the published per-channel mean and standard deviation, which diffusers leaves to its caller. Knows nothing about
memory, masks or ranks: parallel code adds hooks to ``WanVae.autoencoder``.

Legend: C channels, F = 4n+1 frames, H/W pixels, T = n+1 latent frames, h = H/8, w = W/8.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.models.loading import read_state_dict
from storymem_dist.models.state_dict import assign_state_dict, check_no_keys

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
        """Where the weights are; inputs are moved there."""
        return self.autoencoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which everything is computed."""
        return self.autoencoder.dtype

    def to(self, device: torch.device | str) -> "WanVae":
        """Move the weights; returns itself."""
        module: nn.Module = self.autoencoder  # ModelMixin.to hides its signature from type checkers
        module.to(device)
        self._mean_C111, self._std_C111 = self._mean_C111.to(device), self._std_C111.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        """Normalized latents ``[16, T, h, w]`` (fp32) of RGB pixels in [-1, 1] (a resize may overshoot a little).

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
        """Pixels ``[3, 4T-3, 8h, 8w]`` (fp32) of normalized latents, clamped to [-1, 1]."""
        latents_CTHW = latents_CTHW.to(self.device, torch.float32)
        raw_CTHW = latents_CTHW * self._std_C111 + self._mean_C111
        pixels_CFHW = self.autoencoder.decode(raw_CTHW[None].to(self.dtype), return_dict=False)[0][0]
        return pixels_CFHW.float()


def load_vae(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanVae:
    """Load the VAE from the native ``Wan2.1_VAE.pth`` or from a diffusers ``vae/`` folder.

    Raises:
        WeightsNotFound: there is nothing at ``path``.
        CheckpointError: the file or folder is damaged or holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsNotFound(f"{path}: no VAE here; expected Wan2.1_VAE.pth or a diffusers vae folder")
    autoencoder = _from_diffusers_folder(path, dtype) if path.is_dir() else _from_native_file(path, dtype)
    return WanVae(autoencoder).to(device)


def _from_native_file(path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    native = read_state_dict(path)
    sized_by = ("encoder.conv1.weight", "conv2.weight")
    check_no_keys(f"{path}: not the Wan2.1 VAE; weights are missing", [key for key in sized_by if key not in native])
    base_dim, z_dim = (native[key].shape[0] for key in sized_by)
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan(base_dim=base_dim, z_dim=z_dim)
    state = convert_wan_vae_to_diffusers({key: value.to(dtype) for key, value in native.items()})
    assign_state_dict(autoencoder, state, where=str(path))
    return autoencoder


def _from_diffusers_folder(path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    try:
        autoencoder, report = AutoencoderKLWan.from_pretrained(
            path, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read as a diffusers vae folder ({_first_line(error)})") from None
    check_no_keys(f"{path}: weights are missing", report["missing_keys"])
    check_no_keys(f"{path}: weights have no place in the model", report["unexpected_keys"])
    return autoencoder


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
