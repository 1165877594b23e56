"""CUDA tensors without CUDA: they hold nothing, but every one has a device, and all that crosses devices is noted.

What this shows: that tensors which meet are on one device, and where the host would wait for the device. What it cannot
show: values, kernels that refuse a dtype or a size, streams and events, page-locked memory, communication, and where
``tensor.data = other`` puts a tensor (a fake one keeps its old device on the outside).
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

CUDA = torch.device("cuda", 0)

TO_DEVICE, TO_HOST, HOST_READS = "copy to the device", "copy to the host", "the host reads a value"

_COPIES = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}  # and where their source is
_CUDA_KIND, _PYTHON_KIND, _NUM_KINDS = 1, 20, 21  # c10::DeviceType


class Crossings(TorchDispatchMode):
    """Notes, while it is open, every operation that joins host and device, and collectives of host tensors.

    The host waits in each of them, but for a copy from page-locked memory. A number that it reads is 1 (True).
    """

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[str] = []

    def take(self) -> list[str]:
        """What was noted since this was last asked."""
        noted, self._noted = self._noted, []
        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_cuda:
            self._noted.append(HOST_READS)
            return args[0].dtype is torch.bool or 1
        if func is torch.ops.aten._fused_sdp_choice.default and args[0].is_cuda:  # needs a CUDA build; as on Ampere
            is_half = args[0].dtype in (torch.bfloat16, torch.float16)
            return int((SDPBackend.FLASH_ATTENTION if is_half else SDPBackend.EFFICIENT_ATTENTION).value)
        if func is torch.ops.aten._pin_memory.default:
            return args[0].clone()  # fake tensors do not know it
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            source, target = args[_COPIES[func]].device.type, result.device.type
            if {source, target} == {"cpu", "cuda"}:
                self._noted.append(TO_DEVICE if target == "cuda" else TO_HOST)
        elif func is not torch.ops.aten.empty_like.default:
            leaves = tree_leaves((args, kwargs, result))
            devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
            if devices >= {"cpu", "cuda"} or (func.namespace == "c10d" and "cpu" in devices):
                self._noted.append(f"{func} on {' and '.join(sorted(devices))}")
        return result


@contextmanager
def fake_cuda() -> Iterator[Crossings]:
    """Inside, all new tensors are fake and ``CUDA`` can be used. Ordinary tensors become fake when they are used."""
    with _guard_for_cuda(), _FakeMode(allow_non_fake_inputs=True) as mode, Crossings() as crossings:
        # ``Module.to`` swaps tensors, and torch swaps none that something refers to weakly, as this memo would do.
        mode.fake_tensor_converter.meta_converter.tensor_memo = {}
        yield crossings


class _FakeMode(FakeTensorMode):
    avoid_device_init = True  # where there is a GPU, too: tensors made of numbers begin on the host, which is noted


@contextmanager
def _guard_for_cuda() -> Iterator[None]:
    """Let indexing and ``Tensor.to`` pass through a device guard that does nothing.

    ``FakeTensorMode`` sees to that by itself, but only in a torch that was built for CUDA. Python can make a guard for
    one kind of device only, so this makes one that says it is CUDA's and puts it in CUDA's place. Skips the test where
    torch keeps its guards otherwise.
    """
    if torch.version.cuda is not None:
        yield
        return
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * _NUM_KINDS).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        guard, register = _cuda_guard(), torch._C._acc.register_python_privateuseone_device_guard
    except (OSError, ValueError, AttributeError) as error:  # no library, no registry in it, no guards from Python
        pytest.skip(f"this torch has no device guards to take CUDA's place: {error}")
    before = guards[:]
    if before[_CUDA_KIND] is not None:
        pytest.skip("this torch has something in CUDA's place among its device guards")
    register(guard)
    try:
        if guards[_PYTHON_KIND] is None:
            pytest.skip("this torch keeps device guards made by Python in another place")
        guards[_CUDA_KIND] = guards[_PYTHON_KIND]
        yield
    finally:
        guards[:] = before


@cache
def _cuda_guard() -> Any:
    """One for the whole process: torch does not keep it alive."""

    class CudaGuard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.CUDA

    return CudaGuard()


def really(make: Callable[..., T]) -> Callable[..., T]:
    """``make`` with ordinary tensors, inside ``fake_cuda``."""

    def made(*args: Any, **kwargs: Any) -> T:
        with _disable_current_modes():
            return make(*args, **kwargs)

    return made


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let code that asks for CUDA's streams or its current device run without: streams become the CPU's (none)."""
    for name in ("Stream", "Event", "current_stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cpu, name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA.index)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
