"""Sets torch's switches for fp32 precision in this process. Knows nothing about the modules that compute.

Matrix products in fp32 (time embedding, modulation, head, LoRA merges) stay exact: they are few, and all pixels depend
on them. Only the VAE runs convolutions; TF32 is torch's default for them and several times faster. CPUs are not
affected.
"""

import os

import torch

from storymem_dist.errors import require_one_of

VAE_PRECISIONS = ("tf32", "float32", "bfloat16")

CONV_WORKSPACE_MIB = 2048
"""The most memory that cuDNN may use next to a convolution's tensors; it has been seen to take 27 GiB without a limit.

Larger workspaces are refused at every rank alike, so which kernels run does not depend on what else is in memory.
"""


def set_fp32_precision(*, convolutions: str) -> None:
    """Make fp32 matrix products exact, and set how the VAE's convolutions compute (else ``ConfigError``).

    ``convolutions`` is one of ``VAE_PRECISIONS``; ``vae_dtype`` says which weights go with it. Also limits cuDNN's
    workspaces, unless ``CUDNN_CONV_WSCAP_DBG`` is set: call it before the first convolution on a GPU.
    """
    require_one_of("model.vae_precision", convolutions, VAE_PRECISIONS)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = convolutions == "tf32"
    os.environ.setdefault("CUDNN_CONV_WSCAP_DBG", str(CONV_WORKSPACE_MIB))


def vae_dtype(precision: str) -> torch.dtype:
    """The type of the VAE's weights and activations."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
