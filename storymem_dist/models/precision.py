"""How exactly this process computes in fp32 on devices that can trade digits for speed. Sets torch's own switches.

Matrix products in fp32 (time embedding, modulation, head, LoRA merges) stay exact: they are few and decide much.
Convolutions are the VAE's, where TF32 is several times faster and torch's default. CPUs are not affected.
"""

import torch

from storymem_dist.errors import require_one_of

VAE_PRECISIONS = ("tf32", "float32")


def set_fp32_precision(*, convolutions: str) -> None:
    """Set the process to exact fp32 matrix products, and to convolutions in ``tf32`` or ``float32``."""
    require_one_of("model.vae_precision", convolutions, VAE_PRECISIONS)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = convolutions == "tf32"
