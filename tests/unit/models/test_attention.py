"""Every attention backend equals exact softmax attention, and its log-sum-exp lets parts be merged."""

import pytest
import torch
from torch import Tensor

from storymem_dist.errors import ConfigError
from storymem_dist.models.attention import BACKENDS, Attend, attend_with_lse


def make_qkv(queries: int, keys: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, length, 3, 16) for length in (queries, keys, keys)]
    return [2 * torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("blnh,bsnh->bnls", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bnls,bsnh->blnh", scores.softmax(-1), v.double()), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(72, 72), (37, 130), (5, 1)])
def test_a_backend_equals_exact_attention(backend: str, queries: int, keys: int) -> None:
    q, k, v = make_qkv(queries, keys)
    expected_out, expected_lse = exact(q, k, v)
    attended = Attend(backend)(q, k, v)
    out, lse = attend_with_lse(q, k, v, backend)
    for result in (attended, out):
        torch.testing.assert_close(result.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_in_gives_half_precision_out_and_an_fp32_log_sum_exp(backend: str) -> None:
    q, k, v = make_qkv(33, 65, torch.bfloat16)
    expected_out, expected_lse = exact(q, k, v)
    out, lse = attend_with_lse(q, k, v, backend)
    assert (Attend(backend)(q, k, v).dtype, out.dtype, lse.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), expected_out, atol=0.03, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.01, rtol=0.01)


def test_the_unfused_path_is_exact_over_its_own_chunk_borders() -> None:
    q, k, v = make_qkv(1500, 40)
    out, lse = attend_with_lse(q, k, v, "sdpa_math")
    expected_out, expected_lse = exact(q, k, v)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_over_parts_of_the_keys_merges_to_attention_over_all(backend: str) -> None:
    q, k, v = make_qkv(20, 50)
    parts = [attend_with_lse(q, k[:, part], v[:, part], backend) for part in (slice(0, 7), slice(7, 50))]
    weights_PBNL = torch.stack([lse for _, lse in parts]).softmax(dim=0)
    merged = sum(out * weight.transpose(1, 2)[..., None] for (out, _), weight in zip(parts, weights_PBNL, strict=True))
    torch.testing.assert_close(merged, Attend("sdpa_math")(q, k, v), atol=1e-5, rtol=1e-5)


def test_an_unknown_backend_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match="attention backend='flash' is not allowed; use one of: auto, sdpa_flash"):
        Attend("flash")
    with pytest.raises(ConfigError, match="attention backend='flash'"):
        attend_with_lse(*make_qkv(3, 3), backend="flash")


def test_the_operator_used_on_cuda_has_the_shapes_and_types_that_are_relied_on() -> None:
    q, k, v = make_qkv(48, 20, torch.bfloat16, device="meta")
    out, lse = attend_with_lse(q, k, v, "sdpa_flash")
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 3, 48), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_equals_exact_attention_on_a_gpu(backend: str) -> None:
    q, k, v = make_qkv(72, 130, torch.bfloat16, device="cuda")
    expected_out, expected_lse = exact(q, k, v)
    out, lse = attend_with_lse(q, k, v, backend)
    for result in (Attend(backend)(q, k, v), out):
        torch.testing.assert_close(result.double(), expected_out, atol=0.03, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.01, rtol=0.01)
