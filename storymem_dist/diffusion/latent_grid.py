"""The sizes of one shot in latent space, and the temporal positions of its latents.

Pure arithmetic: knows nothing about models or devices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from storymem_dist.diffusion.settings import check_frame_sizes
from storymem_dist.errors import ConfigError

LATENT_CHANNELS = 16
VAE_TIME_STRIDE = 4
VAE_SPACE_STRIDE = 8
DIT_PATCH = 2
MEMORY_STRIDE = 5  # StoryMem's corrected release: memory keyframes lie 5 latent times apart, before the clip


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentGrid:
    """A clip of ``num_frames`` frames of ``height`` x ``width`` pixels behind ``num_memory`` memory keyframes.

    Legend: K = memory keyframes, T = latent times of the clip. Raises ``ConfigError`` for sizes that do not make a
    whole number of tokens.
    """

    num_frames: int
    height: int
    width: int
    num_memory: int = 0

    def __post_init__(self) -> None:
        check_frame_sizes(self.num_frames, self.height, self.width)
        if self.num_memory < 0:
            raise ConfigError(f"num_memory={self.num_memory} is not allowed; it must be at least 0")

    @property
    def num_clip_latents(self) -> int:
        """T: latent times of the clip alone: one for the first frame, then one for every 4 frames."""
        return (self.num_frames - 1) // VAE_TIME_STRIDE + 1

    @property
    def num_latents(self) -> int:
        """K+T: latent times of memory and clip."""
        return self.num_memory + self.num_clip_latents

    @property
    def latent_height(self) -> int:
        """Rows of a latent."""
        return self.height // VAE_SPACE_STRIDE

    @property
    def latent_width(self) -> int:
        """Columns of a latent."""
        return self.width // VAE_SPACE_STRIDE

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(16, K+T, h, w)``, the shape of noise and latents."""
        return (LATENT_CHANNELS, self.num_latents, self.latent_height, self.latent_width)

    @property
    def num_tokens(self) -> int:
        """Tokens of one forward: 1560 per latent time at 832x480."""
        return self.num_latents * (self.latent_height // DIT_PATCH) * (self.latent_width // DIT_PATCH)

    def temporal_positions(self) -> Tensor:
        """Rotary time positions, int64 ``[K+T]``: memory keyframe i of K at -5*(K-i), the clip at 0, 1, 2, ..."""
        memory = torch.arange(-self.num_memory, 0, dtype=torch.int64) * MEMORY_STRIDE
        return torch.cat([memory, torch.arange(self.num_clip_latents, dtype=torch.int64)])

    def clip_latents(self, latents_CTHW: Tensor) -> Tensor:
        """The clip's part ``[16, T, h, w]`` of denoised latents ``[16, K+T, h, w]``."""
        return latents_CTHW[:, self.num_memory :]
