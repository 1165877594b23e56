"""Scaled dot-product attention behind one small module and one function that also returns the log-sum-exp.

Everything is full (never causal, never masked) attention with scale ``1 / sqrt(H)``. Knows nothing about ranks:
parallel code replaces an ``Attend`` or merges several ``attend_with_lse`` results.

Legend: B batch, L query tokens, S key tokens, N heads, H head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from storymem_dist.errors import require_one_of

BACKENDS = ("auto", "sdpa_flash", "sdpa_math")
"""``auto``: torch's own choice for the device and dtype. On Hopper that is cuDNN's kernel where the installed cuDNN can
be trusted with lengths that 128 does not divide (as ours), else flash; forcing cuDNN would override that guard.
``sdpa_flash``: torch's flash kernel or an error. ``sdpa_math``: unfused softmax in fp32, the exact reference (memory
grows with L x S)."""

_MATH_QUERY_ROWS = 1024  # rows of the score matrix held at once by the unfused path of attend_with_lse


class Attend(nn.Module):
    """Attention of queries to keys and values, without parameters: the seam that sequence parallelism replaces."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        require_one_of("attention backend", backend, BACKENDS)
        self.backend = backend

    def forward(self, q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
        """Return ``[B, L, N, H]`` in the dtype of the inputs (all three share one dtype)."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BSNH, v_BSNH))
        if self.backend == "auto":
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        kernel = SDPBackend.FLASH_ATTENTION if self.backend == "sdpa_flash" else SDPBackend.MATH
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def extra_repr(self) -> str:
        """The backend, for ``print(model)``."""
        return self.backend


def attend_with_lse(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Attention output ``[B, L, N, H]`` (input dtype) and natural log-sum-exp of the scaled scores, fp32 ``[B, N, L]``.

    ``auto`` takes the flash kernel where the device has one for these inputs, else the unfused path; ``sdpa_flash``
    insists on it. On CUDA the flash kernel is the operator that torch's own context parallelism calls; it wants 16-bit
    inputs and a head width divisible by 8.
    """
    require_one_of("attention backend", backend, BACKENDS)
    if backend == "sdpa_math" or (backend == "auto" and not _has_flash_with_lse(q_BLNH)):
        return _math_with_lse(q_BLNH, k_BSNH, v_BSNH)
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BSNH, v_BSNH))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out.transpose(1, 2), lse


def _has_flash_with_lse(q_BLNH: Tensor) -> bool:
    if q_BLNH.device.type == "cpu":
        return True
    return q_BLNH.is_cuda and q_BLNH.dtype in (torch.bfloat16, torch.float16) and q_BLNH.shape[-1] % 8 == 0


def _math_with_lse(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).float() for x in (q_BLNH, k_BSNH, v_BSNH))
    k_scaled = k.transpose(-1, -2) * q.shape[-1] ** -0.5
    outs, lses = [], []
    for q_rows in q.split(_MATH_QUERY_ROWS, dim=2):
        scores_BNLS = q_rows @ k_scaled
        lses.append(scores_BNLS.logsumexp(dim=-1))
        outs.append(scores_BNLS.softmax(dim=-1) @ v)
    return torch.cat(outs, dim=2).transpose(1, 2).to(q_BLNH.dtype), torch.cat(lses, dim=2)
