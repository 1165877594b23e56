"""Sets torch's switches for fp32 precision in this process. Knows nothing about the modules that compute.

Matrix products in fp32 (time embedding, modulation, head, LoRA merges) stay exact: they are few, and all pixels depend
on them. Only the VAE runs convolutions; TF32 is torch's default for them and several times faster. CPUs are not
affected.
"""

import torch

from storymem_dist.errors import require_one_of

VAE_PRECISIONS = ("tf32", "float32")


def set_fp32_precision(*, convolutions: str) -> None:
    """Make fp32 matrix products exact, and compute convolutions in ``tf32`` or ``float32`` (else ``ConfigError``)."""
    require_one_of("model.vae_precision", convolutions, VAE_PRECISIONS)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = convolutions == "tf32"
