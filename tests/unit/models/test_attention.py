"""Every attention backend equals exact softmax attention, and partial results merge by their log-sum-exp."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import attention as registry

from storymem_dist.errors import ConfigError
from storymem_dist.models import attention
from storymem_dist.models.attention import Attend, attend_with_lse, describe_backend, start_backend

CPU_BACKENDS = ("auto", "sdpa_flash", "sdpa_math")
CPU = torch.device("cpu")
has_fa3 = pytest.mark.skipif(
    "FA3" not in registry.list_flash_attention_impls(), reason="torch can take in FlashAttention 3 since 2.11"
)


def make_qkv(queries: int, keys: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, length, 3, 16) for length in (queries, keys, keys)]
    return [2 * torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("blnh,bsnh->bnls", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bnls,bsnh->blnh", scores.softmax(-1), v.double()), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(72, 72), (37, 130), (5, 1)])
def test_a_backend_equals_exact_attention(backend: str, queries: int, keys: int) -> None:
    q, k, v = make_qkv(queries, keys)
    expected_out, expected_lse = exact(q, k, v)
    attended = Attend(backend)(q, k, v)
    out, lse = attend_with_lse(q, k, v, backend)
    for result in (attended, out):
        torch.testing.assert_close(result.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
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


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_attention_over_parts_of_the_keys_merges_to_attention_over_all(backend: str) -> None:
    q, k, v = make_qkv(20, 50)
    parts = [attend_with_lse(q, k[:, part], v[:, part], backend) for part in (slice(0, 7), slice(7, 50))]
    weights_PBNL = torch.stack([lse for _, lse in parts]).softmax(dim=0)
    merged = sum(out * weight.transpose(1, 2)[..., None] for (out, _), weight in zip(parts, weights_PBNL, strict=True))
    torch.testing.assert_close(merged, Attend("sdpa_math")(q, k, v), atol=1e-5, rtol=1e-5)


def test_an_unknown_backend_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match="attention backend='flash' is not allowed; use one of: auto, sdpa_cudnn"):
        Attend("flash")
    with pytest.raises(ConfigError, match="attention backend='flash'"):
        attend_with_lse(*make_qkv(3, 3), backend="flash")


@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_cudnn", "flash_attn_3"])
def test_the_operators_used_on_cuda_have_the_shapes_and_types_that_are_relied_on(backend: str) -> None:
    q, k, v = make_qkv(48, 20, torch.bfloat16, device="meta")
    out, lse = attend_with_lse(q, k, v, backend)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 3, 48), torch.float32)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_works_here_passes_its_trial(backend: str, dtype: torch.dtype) -> None:
    start_backend(backend, device=CPU, dtype=dtype, head_dim=16)


def test_a_report_names_the_kernel_that_torch_chooses() -> None:
    here = {"device": CPU, "dtype": torch.bfloat16, "head_dim": 16}
    assert describe_backend("auto", **here) == "auto (flash)"
    with registry.sdpa_kernel(registry.SDPBackend.MATH):
        assert describe_backend("auto", **here) == "auto (math)"
    assert describe_backend("sdpa_cudnn", **here) == "sdpa_cudnn"


def test_a_kernel_that_this_device_lacks_is_refused_at_the_start() -> None:
    with pytest.raises(
        ConfigError, match=r"model.attention=sdpa_cudnn cannot be used on cpu with bfloat16: .*use auto"
    ):
        start_backend("sdpa_cudnn", device=CPU, dtype=torch.bfloat16, head_dim=16)


@has_fa3
def test_a_kernel_whose_package_is_missing_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(
        ConfigError, match="flash_attn_3 needs the package flash_attn_interface, which is not installed"
    ):
        start_backend("flash_attn_3", device=CPU, dtype=torch.bfloat16, head_dim=16)


def test_a_torch_that_cannot_register_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "list_flash_attention_impls", lambda: ["FA4"])
    with pytest.raises(ConfigError, match=r"flash_attn_3 needs torch 2.11 or newer, this is .*; use auto"):
        start_backend("flash_attn_3", device=CPU, dtype=torch.bfloat16, head_dim=16)


@has_fa3
def test_a_package_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    with pytest.raises(ConfigError, match=r"flash_attn_3 cannot be activated: .*not expose FA3 .*kernels; use auto"):
        start_backend("flash_attn_3", device=CPU, dtype=torch.bfloat16, head_dim=16)


@pytest.fixture
def installed_fa2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of the package: its function with the same signature, computed exactly."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, None]:
        assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
        out, lse = exact(q, k, v)
        return (out.to(q.dtype), lse.float(), None) if return_attn_probs else out.to(q.dtype)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    package.__spec__ = ModuleSpec("flash_attn", loader=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)


def test_flash_attention_2_is_called_with_tokens_before_heads_and_gives_its_log_sum_exp(installed_fa2: None) -> None:
    start_backend("flash_attn_2", device=CPU, dtype=torch.bfloat16, head_dim=16)
    q, k, v = make_qkv(72, 130)
    expected_out, expected_lse = attend_with_lse(q, k, v, "sdpa_math")
    out, lse = attend_with_lse(q, k, v, "flash_attn_2")
    for result in (Attend("flash_attn_2")(q, k, v), out):
        torch.testing.assert_close(result, expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-6)


def test_the_extra_that_flash_attention_2_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError, match=r"flash_attn_2 needs the package flash_attn, .*storymem_dist\[flash-attn\]"):
        start_backend("flash_attn_2", device=CPU, dtype=torch.bfloat16, head_dim=16)


def install_broken(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that ``package`` was built for another torch."""
    (folder / f"{package}.py").write_text("raise ImportError('flash.so: undefined symbol: _ZN3c10')")
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(folder)


def test_a_flash_attention_2_that_was_built_for_another_torch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken("flash_attn", tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"flash_attn_2 cannot be used on cpu .*: flash.so: undefined .*; use auto"):
        start_backend("flash_attn_2", device=CPU, dtype=torch.bfloat16, head_dim=16)


@has_fa3
def test_a_flash_attention_3_that_was_built_for_another_torch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_broken("flash_attn_interface", tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"flash_attn_3 cannot be activated: .*undefined symbol.*; use auto"):
        start_backend("flash_attn_3", device=CPU, dtype=torch.bfloat16, head_dim=16)


@pytest.fixture
def registered_fa3() -> Iterator[None]:
    """Pretends that the package is installed: registering does nothing, so the kernels stay torch's own."""
    from torch.nn.attention._fa3 import register_flash_attention_fa3

    class Handle:
        def remove(self) -> None:
            pass

    registry.register_flash_attention_impl("FA3", register_fn=Handle)
    yield
    registry.restore_flash_attention_impl()
    registry.register_flash_attention_impl("FA3", register_fn=register_flash_attention_fa3)


@has_fa3
def test_flash_attention_3_is_activated_in_torch_and_used_as_its_flash_kernel(registered_fa3: None) -> None:
    start_backend("flash_attn_3", device=CPU, dtype=torch.bfloat16, head_dim=16)
    assert registry.current_flash_attention_impl() == "FA3"
    q, k, v = make_qkv(72, 130)
    assert torch.equal(Attend("flash_attn_3")(q, k, v), Attend("sdpa_flash")(q, k, v))


@pytest.mark.parametrize("wrong", ["output", "log-sum-exp", "nan"])
def test_a_kernel_with_wrong_results_is_refused_at_the_start(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        out, lse = attend_with_lse(q, k, v, backend)
        factor = {"output": (1.5, 1.0), "log-sum-exp": (1.0, 1.02), "nan": (float("nan"), 1.0)}[wrong]
        return out * factor[0], lse * factor[1]

    monkeypatch.setattr(attention, "attend_with_lse", broken)
    with pytest.raises(ConfigError, match="its results differ from exact attention"):
        start_backend("auto", device=CPU, dtype=torch.bfloat16, head_dim=16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "sdpa_cudnn"])
def test_a_backend_equals_exact_attention_on_a_gpu(backend: str) -> None:
    q, k, v = make_qkv(72, 130, torch.bfloat16, device="cuda")
    expected_out, expected_lse = exact(q, k, v)
    out, lse = attend_with_lse(q, k, v, backend)
    for result in (Attend(backend)(q, k, v), out):
        torch.testing.assert_close(result.double(), expected_out, atol=0.03, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.01, rtol=0.01)
