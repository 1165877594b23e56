"""The command of the pods, run as the manifest has it: preempted in the middle of a shot, and started again."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from storymem_dist.cli.render import run
from storymem_dist.files import read_json
from tests.helpers.small_job import SMALL, write_storyboard
from tests.helpers.workers import wait_until

ROOT = Path(__file__).parents[2]
IN_THE_IMAGE = {"/opt/storymem_dist/": f"{ROOT}/", "python3": sys.executable}
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Starts a program as process 1, as a container does; needs root."""


def has_containers() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*CONTAINER, "true"], check=False).returncode == 0


def start(container: dict[str, Any], index: int) -> subprocess.Popen[str]:
    """Start a container of a pod as the kubelet would; the image is this tree."""

    def here(text: str) -> str:
        for there, path in IN_THE_IMAGE.items():
            text = path + text.removeprefix(there) if text.startswith(there) else text
        return text.replace("$$", "$")

    given = {one["name"]: here(one.get("value", "the-uid-of-the-job")) for one in container["env"]}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("STORYMEM_", "SLURM_"))}
    return subprocess.Popen(
        [*(CONTAINER if has_containers() else ()), *map(here, container["command"]), *map(here, container["args"])],
        cwd=container["workingDir"],
        env={**clean, "OMP_NUM_THREADS": "1", **given, "JOB_COMPLETION_INDEX": str(index)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def process_one(pod: subprocess.Popen[str]) -> int:
    """The process of the container that gets its signals."""
    if not has_containers():
        return pod.pid
    return int(Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()[0])


def test_a_pod_that_is_preempted_in_a_shot_comes_back_and_ends_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_storyboard(tmp_path / "fox.json", [[True]])
    steps = ["sampler.num_inference_steps=500", "sampler.solver=euler", "dispatch.checkpoint_every_steps=0"]
    volume = [f"launch.kubernetes.mount={tmp_path}", "launch.kubernetes.gpus=0", "launch.kubernetes.pods=2"]
    given = ["launch=kubernetes", "launch.dry_run=true", *volume, "stories=fox.json", "output=a run/$(night)"]
    assert run([*SMALL, *steps, *given]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    folder = tmp_path / "a run" / "$(night)"

    def said(word: str) -> bool:
        return any(word in path.read_text() for path in folder.glob("events/*.jsonl"))

    pod = start(container, 1)
    try:
        wait_until(lambda: said("StepFinished") or pod.poll() is not None, seconds=120)
        os.kill(process_one(pod), signal.SIGTERM)
        output, _ = pod.communicate(timeout=100)
    finally:
        pod.kill()
    assert pod.returncode == 75, output
    stop = read_json(folder / "stop.json")
    assert (stop["state"], stop["reason"], stop["job_id"]) == ("stopped", "SIGTERM", "the-uid-of-the-job")
    assert len(list((folder / "checkpoints").rglob("*.safetensors"))) == 1

    again = start(container, 1)
    output, _ = again.communicate(timeout=150)
    assert again.returncode == 0, output
    assert read_json(folder / "stop.json")["state"] == "done"
    assert said("ShotResumed") and (folder / "stories" / "fox" / "story.mp4").exists()
