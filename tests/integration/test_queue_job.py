"""A real job of two replicas whose queue is changed by commands while it runs, and of which one replica is killed."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.cli.queue import main as queue_command
from tests.helpers.commands import run_in_fork
from tests.helpers.small_job import SMALL, media_bytes, records, render_small, write_storyboard
from tests.helpers.workers import wait_until

ROOT = Path(__file__).parents[2]
LENGTHS = {"fox": 2, "owl": 2, "elk": 2, "hen": 1}
STEPS = "sampler.num_inference_steps=12"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, of all processes, by time."""
    found = []
    for path in sorted((run / "events").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == kind:
                found.append(event)
    return sorted(found, key=lambda event: float(event["wall_time"]))


def test_the_queue_of_a_job_whose_replica_is_killed(tmp_path: Path) -> None:
    stories, run = tmp_path / "stories", tmp_path / "run"
    for name, length in LENGTHS.items():
        write_storyboard(stories / f"{name}.json", [[True] * length])
    late = write_storyboard(tmp_path / "late.json", [[True, True]])
    command = [*SMALL, f"stories.path='{stories}'", f"output='{run}'", STEPS, "parallel=replicas"]
    command += ["launch=torchrun", "launch.processes_per_node=2", "dispatch.poll_seconds=0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = ThreadPoolExecutor(1).submit(run_in_fork, command, module="storymem_dist", cwd=ROOT, env=environment)
    try:
        wait_until(lambda: bool(list(run.glob("stories/*/shot_01.mp4"))), 60.0)

        def ask(*words: str) -> None:
            assert queue_command([str(run), *words]) == 0, words

        def wait_for_both(action: str) -> None:
            wait_until(lambda: sum(one["action"] == action for one in events(run, "RequestApplied")) == 2, 60.0)

        ask("pause")
        wait_for_both("pause")
        done = next(run.glob("stories/*/shot_01.mp4")).parent.name
        waiting = [name for name in LENGTHS if not (run / f"stories/{name}/shot_01.mp4").exists()]
        skipped, first = waiting[0], waiting[1]
        ask("add", str(late))
        ask("first", first)
        ask("skip", skipped)
        ask("rerender", f"{done}:1")
        wait_for_both("rerender")
        wait_until(lambda: not list(run.glob("leases/*.lease")), 60.0)  # nothing is rendered any more
        num_begun = len(events(run, "ShotStarted"))
        os.kill(json.loads(next(run.glob("leases/*.alive")).read_text())["pid"], signal.SIGKILL)
        wait_until(lambda: len(events(run, "JobStarted")) == 4, 60.0)  # torchrun starts both again
        assert not job.done()
        assert len(events(run, "ShotStarted")) == num_begun, "the pause holds for replicas that start again"
        ask("resume")
        ended = job.result(120.0)
        assert ended.returncode == 0, ended.stderr
    except BaseException:
        (run / "STOP").touch()
        raise
    made = {path.parent.name for path in run.glob("stories/*/story.mp4")}
    assert made == {*LENGTHS, "late"} - {skipped}
    begun = [event["story_id"] for event in events(run, "ShotStarted")[num_begun:]]
    assert first in begun[:2]
    assert records(run)[f"{done}/shot_01"]["inputs"]["forced_rerenders"] == 1
    assert json.loads((run / "stop.json").read_text())["state"] == "done"

    assert queue_command([str(run), "unskip", skipped]) == 0
    assert render_small(stories, run, STEPS) == 0
    alone = tmp_path / "alone"  # the same requests to a run folder of one process
    RunFolder(alone).open()
    shutil.copytree(run / "requests", alone / "requests", ignore=shutil.ignore_patterns("jobs"))
    assert render_small(stories, alone, STEPS) == 0
    assert media_bytes(run) == media_bytes(alone)
    assert records(run) == records(alone)
