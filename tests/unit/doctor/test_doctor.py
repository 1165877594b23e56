"""The doctor's page: what it finds on strange machines, in wrong configurations, and how it says so."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from storymem_dist.cli.doctor import examine, main
from storymem_dist.config.composing import compose_settings
from storymem_dist.config.schema import RenderConfig
from storymem_dist.doctor import job, machine
from storymem_dist.doctor.finding import OK, PROBLEM, WARNING, Finding
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_the_page_of_a_machine_without_gpus_has_no_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "check_gpus", lambda: iter(()))
    with pytest.raises(SystemExit) as caught:
        main(["model=tiny", f"output={tmp_path / 'run'}", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert caught.value.code == 0
    assert {finding["area"] for finding in findings} >= {
        "software",
        "attention",
        "host",
        "network",
        "weights",
        "output",
    }
    assert {finding["name"] for finding in findings if finding["area"] == "weights"} >= {"t2v", "m2v"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("off", [True, False])
def test_a_torch_that_leaves_the_fastest_attention_kernel_off_is_a_warning(
    off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: not off)
    finding = by_name(machine.check_attention())["torch"]
    assert finding.state == (WARNING if off else OK)
    assert ("cudnn" in str(finding.value)) == (not off)
    if off:
        assert "for CUDA 12.8 leaves cuDNN's attention kernel off" in finding.fix
        assert "install a torch for CUDA 12.9 or newer" in finding.fix


def test_a_problem_is_printed_with_its_fix_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(SystemExit) as caught:
        main([f"model.t2v_checkpoint={missing}", f"output={tmp_path}"])
    page = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 1
    assert "weights t2v problem missing" in page
    assert "hf download Wan-AI/Wan2.2-T2V-A14B" in page
    assert "problems," in page


def test_without_a_home_small_weights_go_to_the_run_folder_as_in_a_render(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "STORYMEM_CACHE", "HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/proc/none")
    with pytest.raises(SystemExit):
        main(["model=tiny", f"output={tmp_path / 'run'}", "--json"])
    findings = by_name(Finding(**one) for one in json.loads(capsys.readouterr().out))
    assert findings["t2v"].state == OK and str(tmp_path / "run/cache/home") in findings["t2v"].value


def test_small_weights_that_cannot_be_written_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_CACHE", "/proc/none")
    [finding] = job.check_weights(compose_settings(["model=tiny"]))
    assert finding.state == PROBLEM and "set STORYMEM_CACHE to another folder" in finding.fix


def test_a_configuration_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["modle=tiny"])
    assert caught.value.code == 2
    assert "storymem-doctor: error: modle=tiny" in capsys.readouterr().err


def test_a_check_that_fails_itself_is_one_line_of_the_page() -> None:
    def broken() -> Iterable[Finding]:
        raise RuntimeError("strange machine")

    (finding,) = examine([broken])
    assert (finding.state, finding.name) == (WARNING, "broken")
    assert "RuntimeError: strange machine" in finding.value


def _gpu(monkeypatch: pytest.MonkeyPatch, *, total_gib: float = 80, free_gib: float = 79, major: int = 9) -> None:
    properties = SimpleNamespace(name="H100", major=major, minor=0, total_memory=int(total_gib * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(free_gib * GIB), int(total_gib * GIB)))
    monkeypatch.setattr(machine, "_output", lambda *command: "570.1")


@pytest.mark.parametrize(
    ("facts", "state", "text"),
    [
        ({}, OK, "H100, 80 GiB, compute 9.0"),
        ({"free_gib": 40}, WARNING, "40.0 GiB in use"),
        ({"total_gib": 16, "free_gib": 16}, WARNING, "16 GiB"),
        ({"major": 7}, WARNING, "compute 7.0"),
    ],
)
def test_a_gpu_is_judged_by_its_memory_and_age(monkeypatch, facts: dict, state: str, text: str) -> None:
    _gpu(monkeypatch, **facts)
    finding = by_name(machine.check_gpus())["cuda:0"]
    assert finding.state == state
    assert text in finding.value
    assert bool(finding.fix) == (state != OK)


def test_a_cpu_build_of_torch_on_a_gpu_machine_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "_output", lambda *command: "570.1")
    (finding,) = machine.check_gpus()
    assert finding.state == PROBLEM
    assert "driver 570.1" in finding.value
    assert "CUDA build of torch" in finding.fix


def test_gpus_that_do_not_reach_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) != (0, 2))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    found = by_name(machine.check_links())
    assert found["nccl"].value == "2.27.5"
    assert found["links"].value == "no direct access between 0-2"


def test_packages_are_held_against_what_the_project_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "torch>=99",
        "nowhere-to-be-found>=1",
        "rich>=13",
        'flash-attn>=2.8; extra == "flash-attn"',
        'ruff; extra == "dev"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    found = by_name(machine.check_versions())
    assert (found["torch"].state, found["torch"].fix) == (PROBLEM, "pip install 'torch>=99'")
    assert (found["nowhere-to-be-found"].state, found["nowhere-to-be-found"].value) == (PROBLEM, "not installed")
    assert found["rich"].state == OK
    assert "ruff" not in found


def test_little_memory_and_few_files_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 0))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 4096))
    found = by_name(machine.check_host())
    assert [found[name].state for name in ("memory", "/dev/shm", "open files")] == [WARNING] * 3
    assert "--ipc=host" in found["/dev/shm"].fix
    assert found["open files"].fix == "ulimit -n 65536"


def test_a_taken_port_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert by_name(machine.check_network())["port"].state == WARNING
    assert by_name(machine.check_network())["port"].state == OK


def test_a_slurm_job_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16"}.items():
        monkeypatch.setenv(key, value)
    (finding,) = machine.check_slurm()
    assert finding.value == "inside job 7: 2 nodes, 16 tasks"


def test_a_program_that_hangs_is_like_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("sbatch", 5)

    monkeypatch.setattr(subprocess, "run", hangs)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (finding,) = machine.check_slurm()
    assert finding.value == "not found"


def settings(**model: object) -> RenderConfig:
    config = compose_settings(["model=tiny"])
    for key, value in model.items():
        setattr(config.model, key, value)
    return config


def test_damaged_weights_are_a_problem_in_their_own_words(tmp_path: Path) -> None:
    tiny = generate_tiny_checkpoint(tmp_path / "tiny")
    shard = tiny.t2v_dir / "low_noise_model" / "diffusion_pytorch_model-00002-of-00006.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    paths = {
        "t2v_checkpoint": str(tiny.t2v_dir),
        "i2v_checkpoint": str(tiny.i2v_dir),
        "storymem_lora": str(tiny.lora_dir),
    }
    found = by_name(job.check_weights(settings(generate=None, **paths)))
    assert found["t2v"].state == PROBLEM
    assert f"{shard}: truncated" in found["t2v"].fix
    assert found["m2v"].state == OK


def test_weights_that_do_not_fit_a_gpu_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(experts="resident")
    _gpu(monkeypatch, total_gib=0.001, free_gib=0.001)
    found = by_name(job.check_weights(config))
    assert found["t2v fit"].state == PROBLEM
    assert "model.experts=stream" in found["t2v fit"].fix
    _gpu(monkeypatch, total_gib=80)
    assert by_name(job.check_weights(config))["t2v fit"].state == OK


@pytest.mark.parametrize(("seconds", "state"), [(10.0, WARNING), (0.01, OK)])
def test_a_slow_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, seconds: float, state: str) -> None:
    monkeypatch.setattr(job, "_timed_read", lambda path: (512 * 2**20, seconds))
    assert by_name(job.check_weights(settings()))["t2v disk"].state == state


def test_reading_is_timed_on_the_bytes_that_were_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(40 * 2**20))
    num_bytes, seconds = job._timed_read(tmp_path / "x")
    assert num_bytes == 40 * 2**20
    assert 0 < seconds < 30


@pytest.mark.parametrize("linears", ["exact", "float8", "int8"])
def test_layers_that_this_machine_can_multiply_are_fine(linears: str) -> None:
    (finding,) = job.check_layers(settings(linears=linears))
    assert (finding.state, finding.value) == (OK, linears)


def test_layers_that_it_cannot_multiply_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("compute capability too low")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", refuse)
    (finding,) = job.check_layers(settings(linears="float8"))
    assert finding.state == PROBLEM
    assert "compute capability too low); use model.linears=int8 or exact" in finding.fix


def _no_links(*_: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize(
    ("attribute", "replacement", "name", "state", "text"),
    [
        ((shutil, "disk_usage"), lambda path: Usage(10**9, 10**9, 10**8), "free space", WARNING, "0.1 GB"),
        ((os, "link"), _no_links, "hard links", PROBLEM, "Operation not supported"),
        ((os, "access"), lambda *_: False, "folder", PROBLEM, "cannot be written"),
    ],
)
def test_a_run_folder_that_will_not_do_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attribute: tuple,
    replacement: Callable,
    name: str,
    state: str,
    text: str,
) -> None:
    config = settings()
    config.output = str(tmp_path / "run")
    monkeypatch.setattr(*attribute, replacement)
    finding = by_name(job.check_output(config))[name]
    assert finding.state == state
    assert text in finding.value
    assert not list(tmp_path.glob(".storymem-doctor*"))


@pytest.mark.parametrize(
    ("mode", "key", "state"), [("online", "", PROBLEM), ("online", "k", OK), ("auto", "", OK), ("off", "", OK)]
)
def test_online_tracking_needs_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, key: str, state: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    config = settings()
    config.tracking.wandb.mode = mode
    (finding,) = job.check_tracking(config)
    assert finding.state == state


def test_storyboards_are_checked_as_a_render_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "my (first), draft.json"
    broken.write_text("{")
    with pytest.raises(SystemExit) as caught:
        main(["model=tiny", "--json", f"output={tmp_path}", f"stories={broken}"])
    findings = [one for one in json.loads(capsys.readouterr().out) if one["area"] == "stories"]
    assert caught.value.code == 1
    assert [one["state"] for one in findings] == ["problem"] and broken.name in findings[0]["fix"]
