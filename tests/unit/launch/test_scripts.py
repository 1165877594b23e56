"""The shell scripts, as far as they can be tested without a cluster. ``tests/slurm`` runs them on one."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from storymem_dist.resources import assets_folder

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(
    path for folder in ("launch", "slurm", "tests/slurm") for path in (ROOT / folder).glob("*") if path.is_file()
)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    found = subprocess.run(
        ["shellcheck", "-x", "-S", "warning", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_every_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(("states", "expected"), [
    (["done"], "done"),
    (["stopped"], "stopped"),
    (["done", "failed"], "failed"),
    (["failed", "stopped", "done"], "stopped"),
    ([], ""),
])  # fmt: skip
def test_a_folder_of_points_has_the_state_of_its_worst_point(tmp_path: Path, states: list[str], expected: str) -> None:
    for number, state in enumerate(states):
        folder = tmp_path / f"point={number}"
        folder.mkdir()
        (folder / "stop.json").write_text(json.dumps({"state": state}, indent=2))
    assert shell(f"source launch/env.sh; storymem_state {tmp_path}") == expected


def test_the_output_folder_is_found_on_the_command_line() -> None:
    assert shell("source launch/env.sh; storymem_output stories=a output=runs/b", STORYMEM_OUTPUT="") == "runs/b"
    assert shell("source launch/env.sh; storymem_output output=runs/b", STORYMEM_OUTPUT="/x") == "/x"


def test_all_nodes_and_restarts_are_one_job_and_tasks_of_an_array_too() -> None:
    names = 'source launch/env.sh; echo "$STORYMEM_JOB_ID $STORYMEM_NODE"'
    assert shell(names, SLURM_JOB_ID="7", SLURM_NODEID="1") == "slurm-7 1"
    assert shell(names, SLURM_JOB_ID="9", SLURM_ARRAY_JOB_ID="8", SLURM_ARRAY_TASK_ID="3", SLURM_NODEID="0") == (
        "slurm-8 3"
    )


@pytest.mark.parametrize(("code", "state", "expected"), [
    (0, "done", 0), (0, "stopped", 75), (6, "failed", 6), (2, "stopped", 2), (0, "failed", 0),
])  # fmt: skip
def test_node_maps_the_end_of_a_render_to_what_a_batch_system_understands(
    tmp_path: Path, code: int, state: str, expected: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    fake = tmp_path / "python"
    stop = json.dumps({"state": state})
    fake.write_text(f"#!/bin/bash\necho \"$@\" > {tmp_path}/arguments\necho '{stop}' > {run}/stop.json\nexit {code}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/node.sh", f"output={run}", "a.b=c d"],
        cwd=ROOT,
        env={**os.environ, "STORYMEM_PYTHON": str(fake)},
        check=False,
    )
    assert done.returncode == expected
    assert (tmp_path / "arguments").read_text().split() == (
        f"-m storymem_dist.cli output={run} a.b=c d launch=torchrun".split()
    )


@pytest.mark.parametrize("name", ["render", "render_array"])
def test_templates_leave_time_to_stop_and_come_back(name: str) -> None:
    text = (assets_folder("slurm") / f"{name}.sbatch").read_text()
    for line in ("#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append", "# SITE:"):
        assert line in text
    assert re.search(r"^#SBATCH --gres=gpu", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_start_real_ranks(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert not config["use_cpu"]  # accelerate's CPU modes start one process only
    assert (config["distributed_type"] == "MULTI_GPU") == (config["num_processes"] > 1)


def shell(command: str, **variables: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "STORYMEM_"))}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
