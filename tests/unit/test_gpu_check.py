"""``benchmarks.gpu_check``: every step runs on a CPU, and no step can cost more than its own results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_steps import blocks, programs, vae
from benchmarks.gpu_steps.programs import Done, run_program
from benchmarks.gpu_steps.step import DRY, FULL, Bench, Row, SkippedError, attempt
from benchmarks.gpu_steps.steps import STEPS
from benchmarks.gpu_steps.worker import DONE, FAILED, SKIPPED, run_step, worker_for
from storymem_dist.config.composing import compose_settings
from storymem_dist.models.quantized_linear import LINEARS
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.selftest.__main__ import _parse
from tests.helpers.gpu_steps import FAKE

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BY_NUMBER = {step.number: step for step in STEPS}


def bench(seconds: float = 100.0) -> Bench:
    return Bench(device=CPU, sizes=DRY, ends_at=time.monotonic() + seconds)


def run(number: int) -> list[Row]:
    rows: list[Row] = []
    with torch.no_grad():
        outcome = run_step(BY_NUMBER[number].run, bench(), rows.append)
    assert outcome == (DONE, "")
    return rows


def test_the_steps_are_those_of_the_plan_in_the_order_of_their_value() -> None:
    assert [step.number for step in STEPS] == [1, 2, 3, 4, 8, 9, 10, 5, 6, 7, 11, 12, 13]
    assert sum(step.seconds for step in STEPS) <= 570, "the plan must fit ten minutes"
    assert FULL.config.dim == 5120 and FULL.attention_tokens == (32_760, 48_360, 111_600)


def test_step_1_describes_the_machine_and_says_which_kernels_start() -> None:
    rows = {row["what"]: row for row in run(1)}
    assert rows["torch"]["value"] == torch.__version__
    assert "log-sum-exp [1, 2, 130]" in rows["model.attention=sdpa_flash"]["value"]
    assert "cannot be used on cpu" in rows["model.attention=sdpa_cudnn"]["error"]


def test_step_2_times_every_kernel_on_every_form() -> None:
    *rows, choice = run(2)
    forms = {(row["tokens"], row["memory"], row["lse"]) for row in rows}
    assert len(forms) == len(DRY.attention_tokens) * 4
    assert {row["kernel"] for row in rows} == {"auto", "sdpa_flash"}
    assert all(row["ms"] > 0 and row["difference"] < 0.01 for row in rows)
    assert {row["heads"] for row in rows if row["memory"] == "Ulysses-strided"} == {DRY.config.num_heads // DRY.ulysses}
    assert choice["device kernel"] == "auto"


@pytest.mark.float8
def test_step_3_compares_products_and_layers_of_every_format() -> None:
    rows = run(3)
    assert not [row for row in rows if "error" in row]
    for linears in LINEARS:
        found = [row for row in rows if row["what"] == f"layer, {linears}"]
        assert len(found) == 2 * len(DRY.linear_rows)
        assert all(row["difference"] < 0.06 for row in found)


@pytest.mark.float8
def test_step_4_measures_a_block_in_every_format() -> None:
    rows = run(4)
    assert [row["layers"] for row in rows] == list(LINEARS)
    assert all(row["ms"] > 0 and row["peak GiB"] > 0 and row["kernels"] > 50 for row in rows)
    assert rows[0]["difference"] == 0 < rows[1]["difference"] < 0.05


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles to graphs, but to no machine code, which takes half a minute."""

    def compile_blocks(dit: WanDiT) -> None:
        for block in dit.blocks:
            block.compile(dynamic=True, backend="aot_eager")

    monkeypatch.setattr(blocks, "compile_blocks", compile_blocks)


def test_step_5_counts_the_graphs_of_several_lengths(without_inductor: None) -> None:
    rows = run(5)
    assert [(row["layers"], row["new graphs"]) for row in rows] == [("exact", 1), ("exact", 0)]


def test_step_6_runs_a_guided_step_of_every_model(without_inductor: None) -> None:
    rows = run(6)
    assert [row["model"] for row in rows] == ["ours", "ours, compiled", "diffusers"]
    assert all(row["finite"] and row["s/step"] >= row["host done after, s"] > 0 for row in rows)


def test_step_7_forbids_waiting_in_all_steps_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    monkeypatch.setattr(blocks, "_forbid_waiting", lambda device, forbid: modes.append(forbid))
    assert run(7) == [{"steps without waiting": 6, "finite": True}]
    assert modes == [True] * 6 + [False, False]


def test_the_device_refuses_to_wait_where_it_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    for forbid in (True, False):
        blocks._forbid_waiting(torch.device("cuda", 0), forbid)
    blocks._forbid_waiting(CPU, True)
    assert modes == ["error", "default"]


def test_step_8_compares_resident_swapped_and_streamed_weights() -> None:
    rows = run(8)
    assert [row["same bits"] for row in rows if "same bits" in row] == [True, True, True]
    assert {"resident", "to page-locked memory", "back to the device"} <= {row["weights"] for row in rows}


def test_step_9_runs_an_offloaded_expert_and_counts_page_locked_memory() -> None:
    rows = run(9)
    assert [row["weights"] for row in rows[:3]] == ["resident", "fsdp_offload, no process group", "fsdp, gloo"]
    assert rows[1]["same bits"] and rows[2]["same bits"]
    assert [row["skipped"] for row in rows[3:]] == ["page-locked memory needs a GPU"] * 2


def test_step_10_measures_the_vae_in_every_precision() -> None:
    rows = run(10)
    ways = [("float32", ""), ("tf32", ""), ("tf32", "channels last"), ("bfloat16", "channels last")]
    for what in ("decode", "encode"):
        assert [(row["precision"], row["memory"]) for row in rows if row["what"] == what] == ways
    assert all(row["s"] > 0 and row["peak GiB"] > 0 for row in rows)
    decoded = [row for row in rows if row["what"] == "decode"]
    assert decoded[1]["difference"] == 0, "a CPU has no TF32"
    assert decoded[2]["difference"] < 1e-4 < decoded[3]["difference"] < 0.2


def test_step_11_decodes_again_without_the_experts() -> None:
    (row,) = run(11)
    assert (row["decodes tried"], row["experts freed"], row["difference"]) == (2, True, 0)


def test_the_memory_of_a_gpu_is_limited_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80

    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: fractions.append(part))
    with vae._memory_limit(torch.device("cuda", 0), 20):
        assert fractions == [0.25]
    assert fractions == [0.25, 1.0]


@pytest.mark.parametrize("exit_code", [0, 3])
def test_steps_12_and_13_start_the_programs_that_a_person_starts(
    exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def done(command: list[str], seconds: float, environment: Any = None) -> Done:
        commands.append(command)
        return Done(exit_code=exit_code, seconds=1.0, output="first\nlast\n")

    monkeypatch.setattr(programs, "run_program", done)
    for number in (12, 13):
        (row,) = run(number)
        assert (row["exit code"], row["last line"]) == (exit_code, "last")
        assert ("error" in row) == bool(exit_code)
    selftest, render = commands
    assert selftest[1:3] == ["-m", "storymem_dist.selftest"]
    assert _parse(selftest[3:]).device == "cpu"
    assert render[1:3] == ["-m", "storymem_dist"]
    settings = compose_settings(render[3:])
    assert (settings.launch.mode, settings.parallel.device) == ("torchrun", "cpu")


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
    script += f"open({str(pid_file)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    with pytest.raises(TimeoutError, match="did not end within 3 s"):
        run_program([sys.executable, "-c", script], 3.0)
    child = int(pid_file.read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        raise AssertionError("the child of the program is still running")


def test_what_a_row_cannot_measure_is_in_that_row() -> None:
    def fail() -> Row:
        raise RuntimeError("CUDA error: no kernel image\nand more lines")

    def skip() -> Row:
        raise SkippedError("not installed: x")

    assert attempt({"a": 1}, fail) == {"a": 1, "error": "RuntimeError: CUDA error: no kernel image"}
    assert attempt({"a": 1}, skip) == {"a": 1, "skipped": "not installed: x"}


def test_a_step_that_fails_dies_or_hangs_costs_its_own_results_only() -> None:
    rows: list[list[Row]] = [[] for _ in FAKE]
    with worker_for(bench(), FAKE) as start:
        outcomes = [start(step.number, 100.0, rows[step.number].append) for step in FAKE[:-1]]
        outcomes.append(start(FAKE[-1].number, 1.0, rows[-1].append))
    assert [outcome[0] for outcome in outcomes] == [DONE, FAILED, DONE, FAILED, DONE, SKIPPED, FAILED]
    assert outcomes[1][1] == "ValueError: wrong"
    assert outcomes[3][1] == "its process ended with code 9"
    assert outcomes[5][1] == "not installed: x"
    assert outcomes[6][1] == "it did not end within 1 s"
    assert [rows[number][0]["measured"] for number in (1, 3, 6)] == [1, 2, 3]
    pids = [rows[number][0]["pid"] for number in (0, 2, 4)]
    assert pids[0] == pids[1] != pids[2], "an ordinary error needs no new process"
    assert os.getpid() not in pids


def test_both_files_are_whole_after_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = gpu_check.Check(tmp_path / "new", bench(), time.monotonic(), dry=True, json_file=None)
    check.add(FAKE[0], DONE, "", [{"ms": 0.123456, "name": "a"}, {"ms": 2.0, "error": "x" * 500}], 1.0)
    first = json.loads(check.json_path.read_text())
    assert [step["state"] for step in first["steps"]] == ["done"]
    assert first["steps"][0]["rows"][1]["error"] == "x" * 500
    check.add(FAKE[1], FAILED, "ValueError: wrong", [], 2.0)
    check.add(FAKE[5], SKIPPED, "not installed: x", [], 0.0)
    found = json.loads(check.json_path.read_text())
    assert [step["state"] for step in found["steps"]] == ["done", "failed", "skipped"]
    assert (found["format"], found["dry"], found["torch"]) == (1, True, torch.__version__)
    text = check.text_path.read_text()
    assert "FAILED: ValueError: wrong" in text and "skipped: not installed: x" in text and "0.1235" in text
    assert max(map(len, text.splitlines())) < 200
    assert check.num_failed == 1 and "3 steps: 1 done, 1 failed, 1 skipped" in check.summary()
    assert "FAILED: ValueError: wrong" in capsys.readouterr().out


def test_without_time_left_a_step_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_check, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", "5", "--seconds", "20", "--output", str(tmp_path)])
    gpu_check.main()
    (step,) = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert (step["state"], step["reason"]) == ("not started", "about 110 s are needed, 20 s are left")


@pytest.mark.parametrize(("given", "expected"), [(["3", "4"], {3, 4}), (["3,4"], {3, 4}), (["1,3", "12"], {1, 3, 12})])
def test_steps_are_chosen_with_blanks_or_commas(
    given: list[str], expected: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", *given])
    assert set().union(*gpu_check.parse_arguments().only) == expected


@pytest.mark.parametrize("given", ["14", "0", "x", ""])
def test_a_step_that_does_not_exist_is_refused(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", given])
    with pytest.raises(SystemExit):
        gpu_check.parse_arguments()
    assert f"{given!r} is no step; there are 1 to 13" in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_of_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match="torch sees no GPU here; --dry runs every step tiny on the CPU"):
        gpu_check.main()


BLOCKER = """
import sys

MISSING = {"hydra", "omegaconf", "wandb", "diffusers", "peft"}
MISSING |= {"av", "rich", "json5", "ftfy", "regex", "yaml", "submitit"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_the_command_needs_none_of_the_packages_of_a_render(tmp_path: Path) -> None:
    """The dry run as a process of its own, on a machine without hydra, wandb and diffusers."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    numbers = [1, 3, 7, 10, 11, 12, 13]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--output", str(tmp_path / "out"), "--only"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, numbers)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = {step["step"]: step for step in json.loads((tmp_path / "out" / "gpu_check.json").read_text())["steps"]}
    assert sorted(steps) == numbers
    for number in (1, 3):
        assert steps[number]["state"] == "done" and steps[number]["rows"], steps[number]
    for number in (7, 10, 11, 12):
        assert (steps[number]["state"], steps[number]["reason"]) == ("skipped", "not installed: diffusers")
    assert steps[13]["reason"].startswith("not installed: hydra, omegaconf, wandb, diffusers")
    assert "7 steps: 2 done, 5 skipped" in done.stdout.replace("\n", " ")
