"""What ``launch=torchrun`` puts into the environment of its ranks."""

import os
from pathlib import Path

import pytest

from storymem_dist.dispatch.stop import STOP_FILES_VARIABLE, own_stop_files
from storymem_dist.launch.environment import set_cache_folders, set_rank_environment

NAMES = (
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "NCCL_DEBUG",
    "TOKENIZERS_PARALLELISM",
    "OMP_NUM_THREADS",
    "STORYMEM_JOB_ID",
    STOP_FILES_VARIABLE,
)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)


def test_every_variable_is_set_for_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    set_rank_environment(num_processes=8, stop_file=Path("/x/STOP"))
    assert all(os.environ.get(name) for name in NAMES)
    assert os.environ["OMP_NUM_THREADS"] == "6"
    assert own_stop_files() == [Path("/x/STOP")]


def test_what_nccl_does_with_errors_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 would abort communicators, which can hang; torch's own default does not."""
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    set_rank_environment(num_processes=1, stop_file=Path("/x/STOP"))
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


def test_more_ranks_than_cores_compute_with_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    set_rank_environment(num_processes=8, stop_file=Path("/x/STOP"))
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_variable_that_is_set_stays_except_the_one_that_restarts_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "0")
    set_rank_environment(num_processes=1, stop_file=Path("/x/STOP"))
    changed = {name: os.environ[name] for name in NAMES if os.environ[name] != "0"}
    assert changed == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", STOP_FILES_VARIABLE: "0:/x/STOP"}


CACHES = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*CACHES, "HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_caches")
@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("where", ["a file", "/proc", "", "relative/home"])
def test_without_a_home_that_can_be_written_caches_go_to_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, where: str
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "a file"))
    monkeypatch.setenv(variable, str(tmp_path / where) if where == "a file" else where)
    set_cache_folders("runs/night")
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "runs/night/cache/home")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "runs/night/cache/home/triton")
    assert {path.name for path in tmp_path.iterdir()} == {"a file"}


@pytest.mark.usefixtures("no_caches")
def test_a_cache_that_can_be_written_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    set_cache_folders(tmp_path / "run")
    assert not any(name in os.environ for name in CACHES)
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    set_cache_folders(tmp_path / "run")
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "caches") and not (tmp_path / "run").exists()
