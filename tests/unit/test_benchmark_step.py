"""``benchmarks.step``: FlashAttention 3 is really active where it is measured, and nowhere else (C7)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import attention as registry

from benchmarks import harness, step
from storymem_dist.models import attention

SMALL = ["--dim", "64", "--heads", "4", "--layers", "1", "--latents", "2", "4", "4", "--no-compile", "--repeats", "1"]
needs_fa3 = pytest.mark.skipif("FA3" not in registry.list_flash_attention_impls(), reason="torch knows no FA3")


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    results = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["step.py", *SMALL, *arguments, "--json", str(results)])
    step.main()
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    return rows


@needs_fa3
def test_flash_attention_3_is_activated_after_diffusers_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted: list[str] = []

    def activate(name: str) -> None:
        noted.append(f"activate {name}")

    timing = step.interleaved_seconds

    def time_it(*args: Any, **more: Any) -> Any:
        noted.append("time")
        return timing(*args, **more)

    monkeypatch.setattr(attention.registry, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(step, "interleaved_seconds", time_it)
    monkeypatch.setattr(step, "measured_tflops", lambda *_: 1.0)
    rows = run(monkeypatch, tmp_path, "--memory", "0", "1", "--backends", "flash_attn_3", "--alone")
    assert noted == ["time", "time", "activate FA3", "time", "time"]
    assert [(row["rival"], row["num_tokens"]) for row in rows] == [("ours flash_attn_3", 8), ("ours flash_attn_3", 12)]
    assert all(row["speed-up"] > 0 and row["difference"] < 1e-4 for row in rows)


def test_it_runs_in_a_process_of_its_own_whose_rows_join_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        row = {"num_tokens": 8, "rival": "ours flash_attn_3", "s/step": 0.5, "speed-up": 2.0}
        Path(command[-1]).write_text(json.dumps({"rows": [row]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", child)
    started: list[str] = []
    monkeypatch.setattr(step, "start_backend", lambda backend, **_: started.append(backend))
    rows = run(monkeypatch, tmp_path, "--backends", "flash_attn_3", "sdpa_flash")
    assert [row["rival"] for row in rows] == ["diffusers", "ours", "ours sdpa_flash", "ours flash_attn_3"]
    assert started == ["sdpa_flash"], "this process must keep torch's own flash kernel"
    (command,) = commands
    assert command[1:3] == ["-m", "benchmarks.step"]
    assert command[-3:-1] == ["--alone", "--json"]


@needs_fa3
def test_without_the_package_it_ends_with_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(SystemExit, match="flash_attn_3 needs the package flash_attn_interface"):
        run(monkeypatch, tmp_path, "--backends", "flash_attn_3", "--alone")


@pytest.mark.parametrize("name", ["flash_attn::_flash_attn_forward", "flash_attn_3::fwd"])
def test_the_packages_own_operators_count_as_attention(name: str) -> None:
    namespace, _, operator = name.partition("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(f"{operator}(Tensor x) -> Tensor")
    library.impl(operator, lambda x: x.sort().values, "CPU")
    call = getattr(getattr(torch.ops, namespace), operator)
    x = torch.randn(300_000)
    profile = harness.profile_run(lambda: call(x), torch.device("cpu"))
    library._destroy()
    assert harness._is_heavy(name)
    assert profile.matmul_attention_seconds > 0
