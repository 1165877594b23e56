"""The stand-in for CUDA skips the tests that need it where it cannot take CUDA's place in torch."""

import pytest
import torch

from tests.helpers.fake_cuda import CUDA, fake_cuda

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a torch built for CUDA needs no stand-in guard")


@pytest.mark.parametrize("missing", ["_acc", "_acc.register_python_privateuseone_device_guard"])
def test_a_torch_that_takes_no_guards_from_python(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"torch._C.{missing}")
    with pytest.raises(pytest.skip.Exception, match="no device guards to take CUDA's place"), fake_cuda():
        pass


def test_a_place_that_is_taken_is_left_alone() -> None:
    with fake_cuda():
        with pytest.raises(pytest.skip.Exception, match="something in CUDA's place"), fake_cuda():
            pass
        assert torch.empty(2, 3, device=CUDA)[:, 1].device == CUDA


def test_a_torch_that_keeps_guards_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._C._acc.register_python_privateuseone_device_guard", lambda guard: None)
    with pytest.raises(pytest.skip.Exception, match="in another place"), fake_cuda():
        pass
