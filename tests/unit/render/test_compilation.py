"""Whether a job compiles: the default on GPUs where the work ahead is worth it, with the reason in one line."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from storymem_dist.errors import ConfigError
from storymem_dist.models.wan.presets import TINY, WAN22_A14B
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.mesh import lone_mesh
from storymem_dist.parallel.session import Session, Team
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render import compilation
from storymem_dist.render.compilation import decide_compile, missing_tool

A14B = WAN22_A14B.t2v
H100 = "NVIDIA H100 80GB HBM3"
LONG, SHORT = 300_000.0, 30_000.0  # TFLOP: a shot of 40 steps has a good 200,000, one of 4 steps a tenth


def a_session(device: str = "cuda", num_replicas: int = 1) -> Session:
    return Session(
        rank=0,
        local_rank=0,
        layout=Layout(replica=num_replicas),
        device=torch.device(device),
        backend=None,
        mesh=lone_mesh(),
        team=Team(),
        readers=Team(),
        readers_group=None,
        owns_default_group=False,
    )


@pytest.fixture(autouse=True)
def a_gpu_with_its_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "device_name", lambda device: H100)
    monkeypatch.setattr(compilation, "missing_tool", lambda: None)
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that monkeypatch restores it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def never() -> float:
    raise AssertionError("the work ahead does not matter here")


@pytest.mark.parametrize(
    ("settings", "device", "expected", "why"),
    [
        (ParallelSettings(), "cpu", False, "off: the default on CPUs"),
        (ParallelSettings(compile=True), "cpu", True, "on: parallel.compile=true"),
        (ParallelSettings(compile="true"), "cuda", True, "on: parallel.compile=true"),
        (ParallelSettings(compile=False), "cuda", False, "off: parallel.compile=false"),
        (ParallelSettings(weights="zero3"), "cuda", False, "off: parallel.weights=zero3 runs in eager mode only"),
    ],
)
def test_what_needs_no_estimate(settings: ParallelSettings, device: str, expected: bool, why: str) -> None:
    parallel, found = decide_compile(settings, a_session(device), A14B, never)
    assert (parallel.compile, found) == (expected, why)
    assert parallel == replace(settings, compile=expected)
    assert ("TORCHINDUCTOR_CACHE_DIR" in os.environ) == expected


def test_a_long_job_compiles_and_a_short_one_does_not_pay_for_it() -> None:
    parallel, why = decide_compile(ParallelSettings(), a_session(), A14B, lambda: 3 * LONG)
    assert parallel.compile is True
    expected = "on: about 30 min of work are ahead, of which compiled code saves 2 min; to compile takes 60 s"
    assert why == expected
    parallel, why = decide_compile(ParallelSettings(), a_session(), A14B, lambda: SHORT)
    assert parallel.compile is False
    expected = "off: only about 61 s of work are ahead, of which compiled code saves 4 s; to compile takes 60 s"
    assert why == expected


def test_the_work_is_shared_by_all_ranks_and_small_models_have_less() -> None:
    parallel, _ = decide_compile(ParallelSettings(), a_session(num_replicas=8), A14B, lambda: 3 * LONG)
    assert parallel.compile is False
    parallel, why = decide_compile(ParallelSettings(), a_session(), TINY.t2v, lambda: 3 * LONG)
    assert parallel.compile is False and "only about 0 s" in why, why


def test_code_that_is_in_the_cache_is_worth_it_sooner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decided() -> object:
        return decide_compile(ParallelSettings(), a_session(), A14B, lambda: LONG)[0].compile

    assert decided() is False
    (tmp_path / "cache/inductor/fxgraph/ab").mkdir(parents=True)
    assert decided() is True
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert decided() is False, "the folder that is used has nothing"


def test_what_the_compiler_makes_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide_compile(ParallelSettings(compile=True), a_session(), A14B, never)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    decide_compile(ParallelSettings(compile=True), a_session(), A14B, never)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"


def test_torchs_own_folder_is_nobodys_choice(tmp_path: Path) -> None:
    """torch sets the variable as soon as anything asks it for its cache."""
    temporary = cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == temporary
    decide_compile(ParallelSettings(compile=True), a_session(), A14B, never)
    assert cache_dir() == str(tmp_path / "cache" / "inductor")


def test_a_machine_without_the_tools_renders_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "missing_tool", missing_tool)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    _, why = decide_compile(ParallelSettings(), a_session(), A14B, never)
    assert why == "off: torch.compile needs the package triton, which is not installed"
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    _, why = decide_compile(ParallelSettings(), a_session(), A14B, never)
    assert why == "off: torch.compile needs a C compiler (gcc or clang or cc), which is not installed"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert missing_tool() is None


@pytest.mark.parametrize("value", ["maybe", "", "on", 2, None])
def test_another_value_is_refused_in_words(value: object) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.compile=.*auto.*true.*false"):
        ParallelSettings(compile=value)  # type: ignore[arg-type]
