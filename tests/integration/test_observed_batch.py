"""A batch of the tiny model on two replicas, started twice by torchrun, as its observers see it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import storymem_dist.events as ev
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.report.lineage import edges
from storymem_dist.observe.report.model import read_run
from tests.helpers.small_job import SMALL, records, write_storyboard
from tests.helpers.wandb_file import WandbRun, memory_rows_of_events, read_segments

ROOT = Path(__file__).parents[2]
WATCHED = ("tracking.console.mode=plain", "tracking.wandb.mode=offline", "tracking.report=true")


def torchrun(stories: Path, output: Path, *overrides: str) -> str:
    """Two ranks, each a replica; what they wrote to standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "storymem_dist.cli", *SMALL, *WATCHED, "parallel=replicas", "parallel.device=cpu"]
    command += [f"stories.path='{stories}'", f"output='{output}'", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[WandbRun], str]:
    root = tmp_path_factory.mktemp("watched")
    for name in ("fox", "owl"):
        write_storyboard(root / "in" / f"{name}.json", ((True, False, True),))
    torchrun(root / "in", root / "run", "stories.max_shots=2")
    log = torchrun(root / "in", root / "run")
    return root / "run", read_segments(root / "run" / "wandb"), log


def events_of(root: Path, cls: type[ev.Event]) -> list[Any]:
    return [stamped.event for stamped in read_journal(root / "events") if isinstance(stamped.event, cls)]


def test_the_wandb_run_equals_the_event_files_of_both_replicas_over_a_restart(
    watched: tuple[Path, list[WandbRun], str],
) -> None:
    root, (whole,), log = watched
    run_id = json.loads((root / "storymem_run.json").read_text())["run_id"]
    assert whole.run_id == run_id and whole.finished
    (first,) = read_segments(root / "wandb" / "superseded")
    assert first.run_id == run_id and len(first.series("shot/done")) == 4
    assert f"the run is kept offline; upload it with: wandb sync {whole.folder}" in log
    steps = events_of(root, ev.StepFinished)
    assert len(steps) == 6 * 3
    assert whole.series("step/done") == list(range(1, len(steps) + 1))
    logged = sorted(whole.series("step/seconds"))
    assert logged == sorted(step.elapsed_seconds for step in steps)
    assert whole.series("shot/done") == [1, 2, 3, 4, 5, 6]
    per_replica = [key for key in whole.axes if re.fullmatch(r"replica_\d+/steps_done", key)]
    replicas = {
        stamped.replica for stamped in read_journal(root / "events") if isinstance(stamped.event, ev.StepFinished)
    }
    assert len(per_replica) == len(replicas)
    _, rows = whole.table("memory_frames")
    assert sorted((row[1:-1] for row in rows), key=repr) == memory_rows_of_events(root)
    assert {"recalled", "kept"} <= {row[3] for row in rows}
    assert all(row[0] == "Image" for row in rows)
    assert whole.config["sampler"]["num_inference_steps"] == 3
    assert len(whole.series("shot/video")) == 6


def test_event_files_hold_every_decision_of_the_records(watched: tuple[Path, list[WandbRun], str]) -> None:
    root, _, _ = watched
    recorded = [
        event
        for key, record in records(root).items()
        for event in ev.memory_events(*key.split("/"), record["shot_index"], record["memory"])
    ]
    assert sorted(map(repr, events_of(root, ev.MemoryDecided))) == sorted(map(repr, recorded)) and recorded
    for writer in (root / "events").glob("*.jsonl"):
        numbers = [json.loads(line)["sequence"] for line in writer.read_text().splitlines()]
        assert numbers == list(range(len(numbers)))


def test_the_report_that_the_job_wrote_shows_the_recalls_of_the_records(
    watched: tuple[Path, list[WandbRun], str],
) -> None:
    root, _, _ = watched
    page = (root / "report.html").read_text(encoding="utf-8")
    drawn = re.findall(r'class="edge shown"[^>]* data-from="(\d+):(\d+)" data-to="(shot_\d+)"', page)
    recalled = [
        (str(one["shot_index"]), str(one["slot"]), record["shot_id"])
        for record in records(root).values()
        for one in record["memory"]["recalled"]
        if one["verdict"] != "evicted"
    ]
    assert sorted(drawn) == sorted(recalled) and drawn
    view = read_run(root)
    assert view.status == "finished" and sum(len(edges(story)) for story in view.stories) == len(drawn)
    assert len(view.state.rows) == 2, "a restart continues the rows of its replicas"


def test_the_log_shows_both_replicas_and_sums_up_the_whole_run(watched: tuple[Path, list[WandbRun], str]) -> None:
    _, _, log = watched
    assert re.search(r"^\d\d:\d\d:\d\d r[01]  (fox|owl)/shot_03 finished", log, re.MULTILINE)
    assert "2 of 2 stories done · 6 shots rendered · 0 failed" in log
    assert re.search(r"^replica 1 ", log, re.MULTILINE)
