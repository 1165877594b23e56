"""Scaled dot-product attention: one small module, and one function that also returns the log-sum-exp.

Attention is always full (never causal, never masked), with scale ``1 / sqrt(H)``. The kernels are torch's own, or those
of the FlashAttention packages if installed. Knows nothing about ranks: parallel code replaces an ``Attend`` or merges
several ``attend_with_lse`` results.

Legend: B batch, L query tokens, S key tokens, N heads, H head width.
"""

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import attention as registry
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from storymem_dist.errors import ConfigError, require_one_of

_KERNELS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "flash_attn_3": SDPBackend.FLASH_ATTENTION,  # replaces torch's flash kernel in this process once activated
    "sdpa_math": SDPBackend.MATH,
}
BACKENDS = ("auto", *_KERNELS, "flash_attn_2")
"""``auto``: a job takes the fastest of those that its device has (``attention_choice``); a module takes torch's own
choice for the device and dtype. On Hopper that is cuDNN's kernel if torch trusts the installed cuDNN with lengths that
are not multiples of 128 (such as ours), else flash; ``sdpa_cudnn`` uses cuDNN's in any case.
``sdpa_flash``: torch's flash kernel (FlashAttention 2 on CUDA). ``flash_attn_2`` and ``flash_attn_3``: the kernels of
the packages ``flash_attn`` (the extra ``flash-attn``) and ``flash_attn_interface`` (for Hopper). ``sdpa_math``: unfused
softmax in fp32, the exact reference (memory grows with L x S). Where a backend other than ``auto`` cannot be used,
``start_backend`` raises an error before anything is rendered.
"""

_TRIED_LENGTHS = (72, 130)  # queries and keys of the trial: neither is a multiple of 128
_TRIAL_TOLERANCE = {2: 0.03, 4: 0.004}  # by bytes per element; fp32 kernels may compute in TF32

_MATH_QUERY_ROWS = 1024  # rows of the score matrix held at once by the unfused path of attend_with_lse


class Attend(nn.Module):
    """Attention of queries to keys and values. Has no parameters; sequence parallelism replaces this module."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        require_one_of("attention backend", backend, BACKENDS)
        self.backend = backend

    def begin(self, v_BSNH: Tensor) -> Tensor:
        """Take the values before queries and keys are ready; returns what ``forward`` takes as values.

        On one device there is nothing to do. Sequence parallelism starts to send them.
        """
        return v_BSNH

    def forward(self, q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
        """Return ``[B, L, N, H]`` in the dtype of the inputs (all three share one dtype)."""
        if self.backend == "flash_attn_2":
            return _flash_attn_2(q_BLNH, k_BSNH, v_BSNH)[0]
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BSNH, v_BSNH))
        if self.backend == "auto":
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(_KERNELS[self.backend]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def extra_repr(self) -> str:
        """The backend, for ``print(model)``."""
        return self.backend


def attend_with_lse(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Attention output ``[B, L, N, H]`` (input dtype) and natural log-sum-exp of the scaled scores, fp32 ``[B, N, L]``.

    ``auto`` is the kernel that torch chooses for these inputs, or the unfused path where that kernel gives no
    log-sum-exp; any other backend is used as named. On CUDA these are the operators that torch's own context
    parallelism calls; they need 16-bit inputs and a head width divisible by 8.
    """
    require_one_of("attention backend", backend, BACKENDS)
    if backend == "auto":
        backend = _torch_choice_with_lse(q_BLNH, k_BSNH, v_BSNH)
    if backend == "sdpa_math":
        return _math_with_lse(q_BLNH, k_BSNH, v_BSNH)
    if backend == "flash_attn_2":
        return _flash_attn_2(q_BLNH, k_BSNH, v_BSNH)
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BSNH, v_BSNH))
    if backend == "sdpa_cudnn":
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        lse = lse.flatten(2)  # cuDNN's has a last dimension of 1
    elif q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out.transpose(1, 2), lse


def describe_backend(backend: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name of ``backend`` for reports; for ``auto`` with the kernel that torch chooses, such as ``auto (flash)``."""
    if backend != "auto":
        return backend
    q, k = (
        torch.empty(1, length, 2, head_dim, device=device, dtype=dtype).transpose(1, 2) for length in _TRIED_LENGTHS
    )
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, k))
    return f"auto ({chosen.name.removesuffix('_ATTENTION').lower()})"


def start_backend(backend: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Prepare ``backend`` in this process and compare one result, with and without log-sum-exp, with exact attention.

    Raises ``ConfigError`` when it is not installed, cannot run on ``device`` with ``dtype`` and ``head_dim``, or gives
    a different result there.
    """
    require_one_of("model.attention", backend, BACKENDS)
    what = f"model.attention={backend} cannot be used on {device.type} with {str(dtype).removeprefix('torch.')}"
    hint = "use auto" if backend != "auto" else "use sdpa_math"
    if backend == "flash_attn_2" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention=flash_attn_2 needs the package flash_attn, which is not installed: pip install "
            f"'storymem_dist[flash-attn]'; or {hint}"
        )
    if backend == "flash_attn_3":
        _activate_flash_attn_3()
    num_queries, num_keys = _TRIED_LENGTHS
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, length, 2, head_dim, generator=generator).to(device, dtype)
        for length in (num_queries, num_keys, num_keys)
    )
    exact_out, exact_lse = _math_with_lse(q, k, v)
    try:
        attended, (out, lse) = Attend(backend)(q, k, v), attend_with_lse(q, k, v, backend)
    except (RuntimeError, ImportError) as error:  # ImportError: the package was built for another torch
        raise ConfigError(f"{what}: {str(error).splitlines()[0]}; {hint}") from None
    pairs = ((attended, exact_out), (out, exact_out), (lse, exact_lse))
    for found, expected in pairs:
        distance = (found.float() - expected.float()).abs().max().item()
        if not distance <= _TRIAL_TOLERANCE[dtype.itemsize]:  # NaN too
            raise ConfigError(f"{what}: its results differ from exact attention by {distance:.1e}; {hint}")


def stop_backend(backend: str) -> None:
    """Undo what ``start_backend`` changed in this process: torch's own flash kernel is in its place again."""
    if backend == "flash_attn_3" and registry.current_flash_attention_impl() is not None:
        registry.restore_flash_attention_impl()


def cudnn_attention_off() -> str | None:
    """Why torch does not choose cuDNN's kernel on this machine's GPUs, in words; None where it may, or has no GPU.

    torch leaves it off where the wheel's CUDA is older than 12.9 (pytorch pull request 171627). Its own choice is then
    FlashAttention 2.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None or torch.backends.cuda.cudnn_sdp_enabled():
        return None
    return (
        f"torch {torch.__version__} for CUDA {torch.version.cuda} leaves cuDNN's attention kernel off, usually the "
        "fastest one on Hopper; install a torch for CUDA 12.9 or newer"
    )


def relative_distance(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


def _flash_attn_2(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    out_BLNH, lse_BNL, _ = flash_attn_func(q_BLNH, k_BSNH, v_BSNH, return_attn_probs=True)
    return out_BLNH, lse_BNL


def _activate_flash_attn_3() -> None:
    """Make torch use the package's kernels instead of its own flash kernel in this process."""
    what, hint = "model.attention=flash_attn_3", "use auto"
    if "FA3" not in registry.list_flash_attention_impls():
        raise ConfigError(f"{what} needs torch 2.11 or newer, this is {torch.__version__}; {hint}")
    try:
        registry.activate_flash_attention_impl("FA3")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} needs the package {error.name}, which is not installed; {hint}") from None
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(f"{what} cannot be activated: {error}; {hint}") from None


def _torch_choice_with_lse(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> str:
    if q_BLNH.device.type == "cpu":
        return "sdpa_flash"
    if not q_BLNH.is_cuda:
        return "sdpa_math"
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BSNH, v_BSNH))
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
    with_lse = {SDPBackend.CUDNN_ATTENTION: "sdpa_cudnn", SDPBackend.FLASH_ATTENTION: "sdpa_flash"}
    return with_lse.get(chosen, "sdpa_math")


def _math_with_lse(q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).float() for x in (q_BLNH, k_BSNH, v_BSNH))
    k_scaled = k.transpose(-1, -2) * q.shape[-1] ** -0.5
    outs, lses = [], []
    for q_rows in q.split(_MATH_QUERY_ROWS, dim=2):
        scores_BNLS = q_rows @ k_scaled
        lses.append(scores_BNLS.logsumexp(dim=-1))
        outs.append(scores_BNLS.softmax(dim=-1) @ v)
    return torch.cat(outs, dim=2).transpose(1, 2).to(q_BLNH.dtype), torch.cat(lses, dim=2)
