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
from tests.helpers.workers import wait_until

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
    assert shell(names, STORYMEM_JOB_ID="a", JOB_COMPLETION_INDEX="1") == "a 1"
    assert shell(names, STORYMEM_JOB_ID="a", JOB_COMPLETION_INDEX="1", STORYMEM_GROUP="3", STORYMEM_NODES="2") == "a 7"


def node(tmp_path: Path, script: str, **variables: str) -> subprocess.Popen[bytes]:
    """``launch/node.sh`` with a Python that is a script; ``$RUN`` there is the run folder."""
    (tmp_path / "run").mkdir()
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/arguments\nRUN={tmp_path}/run\n{script}\n')
    fake.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "STORYMEM_"))}
    return subprocess.Popen(
        ["bash", "launch/node.sh", f"output={tmp_path}/run", "a.b=c d"],
        cwd=ROOT,
        env={**clean, "STORYMEM_PYTHON": str(fake), **variables},
    )


def stop_json(state: str, reason: str = "") -> str:
    return f"echo '{json.dumps({'state': state, 'reason': reason})}' > $RUN/stop.json"


@pytest.mark.parametrize(("code", "state", "expected"), [
    (0, "done", 0), (0, "stopped", 75), (6, "failed", 6), (2, "stopped", 2), (0, "failed", 0), (143, "failed", 143),
])  # fmt: skip
def test_node_maps_the_end_of_a_render_to_what_a_batch_system_understands(
    tmp_path: Path, code: int, state: str, expected: int
) -> None:
    assert node(tmp_path, f"{stop_json(state)}\nexit {code}").wait() == expected
    assert (tmp_path / "arguments").read_text().split() == (
        f"-m storymem_dist.cli output={tmp_path}/run a.b=c d launch=torchrun".split()
    )


@pytest.mark.parametrize(("reason", "expected"), [("STOP file", 0), ("storymem-queue: stop", 0), ("SIGTERM", 75)])
def test_a_pod_that_a_person_stopped_is_done_and_one_that_is_preempted_is_not(
    tmp_path: Path, reason: str, expected: int
) -> None:
    assert node(tmp_path, stop_json("stopped", reason), STORYMEM_STOP_CODE="0").wait() == expected


@pytest.mark.parametrize("ready", [True, False])
def test_a_signal_reaches_the_launcher_or_ends_it_before_it_has_begun(tmp_path: Path, ready: bool) -> None:
    """A launcher that is still importing has no handler yet: nothing is lost, and the node is asked to come back."""
    handler = f"end() {{ {stop_json('stopped', 'SIGTERM')}; exit 0; }}\ntrap end TERM\n"
    waiting = f"{handler if ready else ''}touch {tmp_path}/ready\nwhile :; do sleep 0.05; done"
    started = node(tmp_path, waiting)
    wait_until((tmp_path / "ready").exists)
    started.terminate()
    assert started.wait(20) == 75


def test_the_nodes_of_a_replica_meet_and_stop_together(tmp_path: Path) -> None:
    own = f"{tmp_path}/run/logs/STOP.job.1"
    waits = f'[ "$STORYMEM_STOP_FILES" = {own} ] && touch {tmp_path}/ready\nuntil [ -e {own} ]; do sleep 0.05; done'
    started = node(
        tmp_path,
        f"trap '' TERM\n{waits}\n{stop_json('stopped', 'SIGTERM')}",
        STORYMEM_JOB_ID="job",
        STORYMEM_GROUP="1",
        STORYMEM_NODES="2",
        JOB_COMPLETION_INDEX="1",
        STORYMEM_HEAD="job-replica-1-0.job",
    )
    wait_until((tmp_path / "ready").exists)
    started.terminate()
    assert started.wait(20) == 75
    assert Path(own).read_text() == "SIGTERM\n"
    assert (
        (tmp_path / "arguments")
        .read_text()
        .endswith(
            "launch=torchrun launch.num_nodes=2 launch.node_rank=1 launch.head=job-replica-1-0.job launch.port=29400\n"
        )
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
