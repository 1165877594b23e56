"""Latents of pictures and clips that were encoded before, in host memory, found again by content and size.

A keyframe stays in memory for many shots, and a shot that is rendered again has the same condition: both are encoded
once. Knows nothing about the encoder.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MAX_BYTES = 256 * 2**20
"""About 600 keyframes of 832x480, or 30 clips of 81 frames."""


class LatentCache:
    """Keeps up to ``max_bytes`` of latents; the ones used longest ago are forgotten first.

    Ranks that ask for the same contents in the same order have the same hits, so ``encode`` may be collective.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: Hashable, device: torch.device, encode: Callable[[], Tensor]) -> Tensor:
        """The latents of ``key`` on ``device``: kept ones, or what ``encode`` returns."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].to(device)
        latents = encode()
        self._kept[key] = latents.cpu()
        self._num_bytes += latents.nbytes
        while self._num_bytes > self._max_bytes:
            _, forgotten = self._kept.popitem(last=False)
            self._num_bytes -= forgotten.nbytes
        return latents


def content_key(images: Tensor) -> str:
    """A text that is the same for equal 8-bit images ``[..., 3, H, W]``."""
    data = images.cpu().contiguous()
    return f"{list(data.shape)} {hashlib.sha256(data.numpy().data).hexdigest()}"
