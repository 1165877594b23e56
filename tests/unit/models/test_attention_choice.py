"""``attention=auto``: kernels are timed on the job's shape, the fastest exact one is taken, and remembered."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from storymem_dist.errors import ConfigError
from storymem_dist.models import attention, attention_choice
from storymem_dist.models.attention import attend_with_lse, cudnn_attention_off
from storymem_dist.models.attention_choice import AttentionForm, Choice, choose_kernel, seconds_of, time_kernels
from tests.helpers.fake_cuda import CUDA, fake_cuda

CPU = torch.device("cpu")
KERNELS = ("sdpa_math", "sdpa_flash")
FORM = AttentionForm(num_tokens=130, num_heads=3, head_dim=16, dtype=torch.float32)


class StubClock:
    """Runs each call once and says that it took the next of ``seconds``."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self.calls = 0

    def __call__(self, run: Callable[[], Any], device: torch.device) -> float:
        run()
        self.calls += 1
        return self._seconds.pop(0)


@pytest.mark.parametrize(("seconds", "fastest"), [((0.2, 0.1), "sdpa_flash"), ((0.1, 0.3), "sdpa_math")])
def test_the_fastest_kernel_is_chosen_and_the_choice_says_by_how_much(seconds: Sequence[float], fastest: str) -> None:
    choice = choose_kernel(FORM, CPU, kernels=KERNELS, clock=StubClock(*seconds))
    assert choice.kernel == fastest
    assert choice.seconds == dict(zip(KERNELS, seconds, strict=True))
    other = next(name for name in KERNELS if name != fastest)
    ratio = max(seconds) / min(seconds)
    assert str(choice) == f"{fastest} (100 ms, {ratio:.2f}x as fast as {other})"


def test_real_kernels_are_timed_by_the_real_clock() -> None:
    choice = choose_kernel(FORM, CPU, kernels=KERNELS)
    assert set(choice.seconds) == set(KERNELS)
    assert choice.seconds[choice.kernel] == min(choice.seconds.values()) > 0


def test_a_device_with_one_kernel_times_nothing_and_leaves_the_choice_to_torch(tmp_path: Path) -> None:
    clock = StubClock()
    assert choose_kernel(FORM, CPU, cache=tmp_path, clock=clock) == Choice(kernel="auto")
    assert (clock.calls, list(tmp_path.iterdir())) == (0, [])


def test_the_choice_is_remembered_for_the_same_device_versions_and_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose_kernel(FORM, CPU, cache=tmp_path, kernels=KERNELS, clock=StubClock(0.2, 0.1))
    again = choose_kernel(FORM, CPU, cache=tmp_path, kernels=KERNELS, clock=StubClock())
    assert (again.kernel, again.seconds, again.remembered) == (first.kernel, first.seconds, True)
    assert str(again).endswith("; measured before)")
    longer = AttentionForm(num_tokens=131, num_heads=3, head_dim=16, dtype=torch.float32)
    strided = AttentionForm(num_tokens=130, num_heads=3, head_dim=16, dtype=torch.float32, strided=True)
    for form in (longer, strided):
        choice = choose_kernel(form, CPU, cache=tmp_path, kernels=KERNELS, clock=StubClock(0.1, 0.2))
        assert choice.kernel == "sdpa_math"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99_999)
    updated = choose_kernel(FORM, CPU, cache=tmp_path, kernels=KERNELS, clock=StubClock(0.1, 0.2))
    assert (updated.kernel, updated.remembered) == ("sdpa_math", False)
    assert len(list((tmp_path / "attention").iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "list", "negative", "one", "unknown", "other key", "format"])
def test_a_damaged_file_is_measured_again_and_replaced(damage: str, tmp_path: Path) -> None:
    choose_kernel(FORM, CPU, cache=tmp_path, kernels=KERNELS, clock=StubClock(0.2, 0.1))
    (file,) = (tmp_path / "attention").iterdir()
    good = json.loads(file.read_text())
    seconds = good["seconds"]
    file.write_text(
        {
            "cut": file.read_text()[:-9],
            "empty": "",
            "list": "[1]",
            "negative": json.dumps(good | {"seconds": seconds | {"sdpa_math": -1}}),
            "one": json.dumps(good | {"seconds": {"sdpa_math": 0.1}}),
            "unknown": json.dumps(good | {"seconds": seconds | {"sage": 0.1}}),
            "other key": json.dumps(good | {"key": good["key"] | {"device": "cuda"}}),
            "format": json.dumps(good | {"format": 2}),
        }[damage]
    )
    choice = choose_kernel(FORM, CPU, cache=tmp_path, kernels=KERNELS, clock=StubClock(0.1, 0.4))
    assert (choice.kernel, choice.remembered) == ("sdpa_math", False)
    assert json.loads(file.read_text())["seconds"] == {"sdpa_math": 0.1, "sdpa_flash": 0.4}


def test_a_cache_that_cannot_be_written_ends_no_job(tmp_path: Path) -> None:
    (tmp_path / "attention").write_text("a file where the folder should be")
    choice = choose_kernel(FORM, CPU, cache=tmp_path, kernels=KERNELS, clock=StubClock(0.2, 0.1))
    assert choice.kernel == "sdpa_flash"


def test_a_kernel_that_is_wrong_on_the_jobs_shape_alone_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial at the start looks at 72 queries; a fault of long sequences must not win by being fast."""
    kernels = ("sdpa_math", "sdpa_flash", "sdpa_cudnn")
    real = AttentionForm.run

    def run(form: AttentionForm, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = real(form, "sdpa_flash" if kernel == "sdpa_cudnn" else kernel, q, k, v)
        return out * 1.5 if kernel == "sdpa_cudnn" else out

    monkeypatch.setattr(AttentionForm, "run", run)
    monkeypatch.setattr(attention_choice, "start_backend", lambda *_args, **_more: None)
    seconds = time_kernels(FORM, CPU, kernels, clock=StubClock(0.3, 0.2))
    assert seconds == {"sdpa_math": 0.3, "sdpa_flash": 0.2}


@pytest.mark.parametrize("error", [RuntimeError("no execution plan"), torch.OutOfMemoryError("no workspace")])
def test_a_kernel_that_fails_on_the_jobs_shape_alone_ends_no_job(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = ("sdpa_cudnn", "sdpa_math", "sdpa_flash")
    real = AttentionForm.run

    def run(form: AttentionForm, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kernel == "sdpa_cudnn":
            raise error
        return real(form, kernel, q, k, v)

    monkeypatch.setattr(AttentionForm, "run", run)
    monkeypatch.setattr(attention_choice, "start_backend", lambda *_args, **_more: None)
    choice = choose_kernel(FORM, CPU, kernels=kernels, clock=StubClock(0.3, 0.2))
    assert (choice.kernel, choice.seconds) == ("sdpa_flash", {"sdpa_math": 0.3, "sdpa_flash": 0.2})
    alone = choose_kernel(FORM, CPU, kernels=kernels[:2], clock=StubClock(0.3))
    assert alone == Choice(kernel="sdpa_math"), "torch's own choice might be the kernel that fails"


def test_without_memory_for_the_inputs_torch_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(form: AttentionForm, device: torch.device) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AttentionForm, "inputs", full)
    assert choose_kernel(FORM, CPU, cache=tmp_path, kernels=KERNELS) == Choice(kernel="auto")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_the_inputs_lie_in_memory_as_a_ranks_do(strided: bool, with_lse: bool) -> None:
    form = AttentionForm(
        num_tokens=20, num_heads=2, head_dim=16, dtype=torch.bfloat16, strided=strided, with_lse=with_lse
    )
    q, k, v = form.inputs(CPU)
    assert all((x.shape, x.dtype) == ((1, 20, 2, 16), torch.bfloat16) for x in (q, k, v))
    packed = (2 * 2 * 16, 16, 1)
    assert (q.stride()[1:] == packed) == strided
    assert (k.stride()[1:] == packed) == (strided and not with_lse)
    assert v.is_contiguous()
    exact = attend_with_lse(q, k, v, "sdpa_math")[0]
    torch.testing.assert_close(form.run("sdpa_flash", q, k, v), exact, atol=0.02, rtol=0.02)


def test_every_repeat_waits_for_the_device_and_the_first_call_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: noted.append("wait"))
    monkeypatch.setattr(attention_choice, "_SECONDS_PER_KERNEL", 0.0)
    seconds_of(lambda: noted.append("run"), torch.device("cuda", 0))
    assert noted == ["run", "wait", "run", "wait"]


def test_a_ring_with_auto_takes_the_kernel_that_torch_takes_without_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's choice on Hopper is cuDNN; the ring must not fall back to FlashAttention 2 (C6)."""

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.extend([func.overloadpacket.__name__] if "attention" in str(func) else [])
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    backends = attention.SDPBackend
    chosen: list[Any] = [backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION]
    with fake_cuda(), Noting():
        q = torch.empty(1, 10, 4, 16, device=CUDA, dtype=torch.bfloat16)
        for backend in chosen:
            monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_args, backend=backend: backend.value)
            out, lse = attend_with_lse(q, q, q, "auto")
            assert (out.shape, lse.shape, lse.dtype) == (q.shape, (1, 4, 10), torch.float32)
    assert called == ["_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention"]


@pytest.mark.parametrize("off", [False, True])
def test_torch_without_cudnns_kernel_is_noticed_and_its_kernel_is_not_timed(
    off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: not off)
    why = cudnn_attention_off()
    assert (why is not None) == off
    if why is not None:
        assert f"torch {torch.__version__} for CUDA 12.8 leaves cuDNN's attention kernel off" in why
        assert "install a torch for CUDA 12.9 or newer" in why
    tried: list[str] = []

    def start(kernel: str, **_here: object) -> None:
        tried.append(kernel)
        raise ConfigError("not here")

    monkeypatch.setattr(attention_choice, "start_backend", start)
    choose_kernel(FORM, CPU)
    assert ("sdpa_cudnn" in tried) == (not off)
    assert "sdpa_flash" in tried


def test_flash_attention_3_is_active_only_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces torch's flash kernel in the process, so the times of the other one must not be its own."""
    active: list[str] = []
    seen: dict[str, list[str]] = {}
    real = F.scaled_dot_product_attention

    def noting(*args: Any, **more: Any) -> Tensor:
        seen.setdefault(current[0], []).append(",".join(active))
        return real(*args, **more)

    current = [""]

    def start(kernel: str, **_here: object) -> None:
        current[0] = kernel
        active.extend([kernel] if kernel == "flash_attn_3" else [])

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    monkeypatch.setattr(attention_choice, "start_backend", start)
    monkeypatch.setattr(attention_choice, "stop_backend", lambda kernel: active.clear())
    choose_kernel(FORM, CPU, kernels=("flash_attn_3", "sdpa_flash"), clock=StubClock(0.1, 0.2))
    assert set(seen["flash_attn_3"]) == {"flash_attn_3"}
    assert set(seen["sdpa_flash"]) == {""}
    assert active == []
