"""What needs no plan about compiled code: settings, CPUs, missing tools; and where compiled code is kept."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from storymem_dist.errors import ConfigError
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render import compilation
from storymem_dist.render.compilation import compile_fact, has_compiled_code, keep_compiled_code, missing_tool

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def a_gpu_with_its_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "missing_tool", lambda: None)
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that monkeypatch restores it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        (ParallelSettings(), "cpu", (False, "the default on CPUs")),
        (ParallelSettings(compile=True), "cpu", (True, "parallel.compile=true")),
        (ParallelSettings(compile="true"), "cuda", (True, "parallel.compile=true")),
        (ParallelSettings(compile=False), "cuda", (False, "parallel.compile=false")),
        (ParallelSettings(weights="zero3"), "cuda", (False, "parallel.weights=zero3 runs in eager mode only")),
        (ParallelSettings(), "cuda", (None, "")),
    ],
)
def test_what_needs_no_plan(settings: ParallelSettings, device: str, expected: tuple[bool | None, str]) -> None:
    assert compile_fact(settings, torch.device(device)) == expected


def test_code_that_is_in_the_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_compiled_code()
    (tmp_path / "cache/inductor/fxgraph/ab").mkdir(parents=True)
    assert has_compiled_code()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert not has_compiled_code(), "the folder that is used has nothing"


def test_what_the_compiler_makes_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"


def test_torchs_own_folder_is_nobodys_choice(tmp_path: Path) -> None:
    """torch sets the variable as soon as anything asks it for its cache."""
    temporary = cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == temporary
    keep_compiled_code()
    assert cache_dir() == str(tmp_path / "cache" / "inductor")


def test_a_machine_without_the_tools_renders_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "missing_tool", missing_tool)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    expected = (False, "torch.compile needs the package triton, which is not installed")
    assert compile_fact(ParallelSettings(), CUDA) == expected
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    expected = (False, "torch.compile needs a C compiler (gcc or clang or cc), which is not installed")
    assert compile_fact(ParallelSettings(), CUDA) == expected
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert missing_tool() is None


@pytest.mark.parametrize("value", ["maybe", "", "on", 2, None])
def test_another_value_is_refused_in_words(value: object) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.compile=.*auto.*true.*false"):
        ParallelSettings(compile=value)  # type: ignore[arg-type]
