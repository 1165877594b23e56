"""Independent processes that share one run folder: several jobs, killed, paused, asked to stop."""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts import shot_folder
from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import Replica
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import Story
from tests.helpers.batches import render
from tests.helpers.fake_renderer import FakeRenderer, finished_files, make_part, make_story
from tests.helpers.workers import (
    begun,
    begun_by,
    exit_code,
    fork_worker,
    in_flight,
    kill,
    quick_folder,
    start_worker,
    wait_until,
)

STORIES = [make_story(f"story_{number}", length) for number, length in enumerate((5, 3, 4, 2))]
# Long enough that a living process on a busy machine does not look dead, short enough for a test.
IMPATIENT = DispatchSettings(poll_seconds=0.02, lease_seconds=3.0, checkpoint_every_steps=1)


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


@pytest.fixture
def whole(root: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    render(root.parent / "whole", STORIES)
    return finished_files(root.parent / "whole")


def committed_by(root: Path, stories: list[Story]) -> Counter[int]:
    """Checks that every shot has one record and one attempt; counts the records of each process."""
    counts: Counter[int] = Counter()
    for story in stories:
        for shot in story.shots:
            folder = RunFolder(root).shot(story.story_id, shot.shot_id)
            (name,) = folder.record_names()
            record = ShotRecord.from_json(json.loads((folder.folder / "records" / name).read_text()))
            assert [path.name for path in (folder.folder / "attempts").iterdir()] == [record.attempt_id]
            counts[int(record.attempt_id.rsplit("-", 3)[1])] += 1
    return counts


@pytest.mark.parametrize("num_jobs", [2, 4])
def test_jobs_that_join_one_folder_share_the_shots_and_commit_each_once(
    root: Path, whole: dict[str, bytes], num_jobs: int
) -> None:
    log = root.parent / "log"
    # steps long enough that a process which starts late on a busy machine still finds shots
    workers = [start_worker(root, STORIES, log=log, step_seconds=0.06) for _ in range(num_jobs)]
    assert [exit_code(worker) for worker in workers] == [0] * num_jobs
    assert finished_files(root) == whole
    assert Counter(begun(log)).most_common(1)[0][1] == 1, "no shot is begun twice"
    counts = committed_by(root, STORIES)
    assert set(counts) == set(workers), "all of them worked"


def test_jobs_that_wait_for_each_other_work_one_after_the_other(root: Path, whole: dict[str, bytes]) -> None:
    log = root.parent / "log"
    settings = DispatchSettings(poll_seconds=0.05, on_busy="wait")
    workers = [start_worker(root, STORIES, log=log, step_seconds=0.01, settings=settings) for _ in range(3)]
    assert [exit_code(worker) for worker in workers] == [0, 0, 0]
    assert finished_files(root) == whole
    assert len({line.split()[1] for line in log.read_text().splitlines()}) == 1, "the first one left nothing to do"


def test_a_job_paused_past_its_lease_loses_its_shot_and_changes_nothing_when_it_resumes(
    root: Path, whole: dict[str, bytes]
) -> None:
    log = root.parent / "log"
    sleeper = start_worker(root, STORIES, log=log, step_seconds=0.2, settings=IMPATIENT)
    wait_until(lambda: len(begun(log)) == 1)
    kill(sleeper, signal.SIGSTOP)
    asleep = begun(log)[0]
    others = [start_worker(root, STORIES, log=log, settings=IMPATIENT) for _ in range(3)]
    assert [exit_code(worker) for worker in others] == [0, 0, 0]
    assert finished_files(root) == whole
    before = {path: path.stat().st_mtime_ns for path in (root / "stories").rglob("*") if path.is_file()}
    kill(sleeper, signal.SIGCONT)
    assert exit_code(sleeper) == 0
    after = {path: path.stat().st_mtime_ns for path in (root / "stories").rglob("*") if path.is_file()}
    assert after == before
    assert {name: times for name, times in Counter(begun(log)).items() if times > 1} == {asleep: 2}
    assert sleeper not in committed_by(root, STORIES)


@pytest.mark.parametrize("operation", ["write_png", "publish_exclusively"])
def test_a_job_paused_in_the_middle_of_its_commit_cannot_publish_any_more(
    root: Path, whole: dict[str, bytes], operation: str
) -> None:
    """While it writes, or at the worst moment: after it checked its lease and before it publishes."""
    log = root.parent / "log"
    sleeper = fork_worker(lambda: _render_and_pause_before(operation, root, log))
    wait_until(lambda: _is_stopped(sleeper))
    both = begun(log)
    assert len(both) == 2, "one is being saved, one rendered"
    others = [start_worker(root, STORIES, log=log, settings=IMPATIENT) for _ in range(2)]
    assert [exit_code(worker) for worker in others] == [0, 0]
    assert finished_files(root) == whole
    kill(sleeper, signal.SIGCONT)
    assert exit_code(sleeper) == 0
    assert finished_files(root) == whole
    assert sleeper not in committed_by(root, STORIES)
    assert {name for name, times in Counter(begun(log)).items() if times > 1} == set(both)
    assert not list((root / "leases").iterdir()) and not list((root / "failures").iterdir())


def _render_and_pause_before(operation: str, root: Path, log: Path) -> int:
    act, paused = getattr(shot_folder, operation), []

    def pause_then_act(*arguments: Any) -> Any:
        if not paused:
            paused.append(True)
            wait_until(lambda: len(begun(log)) == 2)
            signal.raise_signal(signal.SIGSTOP)
        return act(*arguments)

    setattr(shot_folder, operation, pause_then_act)
    parts = [make_part(root, STORIES)]
    renderer = FakeRenderer(log=log, step_seconds=0.2)
    return render_batch(parts=parts, renderer=renderer, settings=IMPATIENT).exit_code


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("found_by", ["a later job", "a concurrent job"])
def test_another_job_completes_a_commit_whose_job_died_right_after_publishing(root: Path, found_by: str) -> None:
    """Also where the story is not one of those that the finder checks at its start."""
    stories, log = [make_story(f"story_{number}", 2) for number in range(4)], root.parent / "log"
    render(root.parent / "whole", stories)
    first, concurrent = Replica(index=0, count=2, job_id="job"), found_by == "a concurrent job"
    dying = start_worker(
        root,
        stories,
        log=log,
        step_seconds=0.2,
        replica=first,
        settings=IMPATIENT,
        before=lambda: _die_before_views(log, concurrent),
    )
    wait_until(lambda: "story_1:shot_01" in begun(log))
    finders = [start_worker(root, stories, log=log, replica=first, settings=IMPATIENT) for _ in range(concurrent)]
    assert exit_code(dying) == 9
    assert [exit_code(worker) for worker in finders] == [0] * concurrent
    if not concurrent:
        assert render(root, stories, replica=first).state == "done"
    assert finished_files(root) == finished_files(root.parent / "whole")
    assert not list((root / "leases").glob("*.lease"))


def _die_before_views(log: Path, concurrent: bool) -> None:
    publish, repair_views = shot_folder.publish_exclusively, shot_folder.ShotFolder.repair_views

    def wait_and_publish(source: Path, path: Path) -> bool:
        if "story_1" in str(path) and concurrent:
            wait_until(lambda: len({line.split()[1] for line in log.read_text().splitlines()}) == 2)
        return publish(source, path)

    def die_or_repair(folder: shot_folder.ShotFolder, record: ShotRecord) -> None:
        if record.story_id == "story_1":
            os._exit(9)
        repair_views(folder, record)

    shot_folder.publish_exclusively = wait_and_publish
    shot_folder.ShotFolder.repair_views = die_or_repair


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_job_between_two_steps_and_the_next_one_continues_there(
    root: Path, whole: dict[str, bytes], number: signal.Signals
) -> None:
    log = root.parent / "log"
    worker = fork_worker(lambda: _render_listening(root, log))
    wait_until(lambda: len(begun(log)) >= 3)
    kill(worker, number)
    assert exit_code(worker) == 0
    stop = json.loads((root / "stop.json").read_text())
    assert (stop["state"], stop["reason"]) == ("stopped", number.name)
    assert len(list((root / "checkpoints").rglob("*.safetensors"))) == 1
    assert list((root / "leases").iterdir()) == []
    renderer = FakeRenderer()
    render(root, STORIES, renderer=renderer)
    assert len(renderer.resumed) == 1
    assert finished_files(root) == whole


def test_a_stop_file_stops_all_jobs_of_a_folder(root: Path, whole: dict[str, bytes]) -> None:
    log = root.parent / "log"
    workers = [fork_worker(lambda: _render_listening(root, log)) for _ in range(2)]
    wait_until(lambda: len(begun(log)) >= 3)
    (root / "STOP").touch()
    assert [exit_code(worker) for worker in workers] == [0, 0]
    assert json.loads((root / "stop.json").read_text())["reason"] == "STOP file"
    assert finished_files(root) != whole
    render(root, STORIES, stop=StopSwitch([root / "STOP"]))
    assert finished_files(root) == whole, "the old STOP file does not stop the next job"


def test_a_second_interrupt_ends_at_once_and_leaves_nothing_locked(root: Path, whole: dict[str, bytes]) -> None:
    log = root.parent / "log"
    rendering = root.parent / "rendering"
    worker = fork_worker(
        lambda: _render_listening(root, log, step_seconds=30.0, before_step=lambda job, step: rendering.touch())
    )
    wait_until(rendering.exists)
    kill(worker, signal.SIGINT)
    time.sleep(2.0)  # two signals before the worker runs again would be one
    kill(worker, signal.SIGINT)
    began = time.monotonic()
    assert exit_code(worker) == 70
    assert time.monotonic() - began < 10
    assert list((root / "leases").iterdir()) == []
    render(root, STORIES)
    assert finished_files(root) == whole


def _render_listening(
    root: Path,
    log: Path,
    step_seconds: float = 0.05,
    before_step: Callable[[ShotJob, int], None] = lambda job, step: None,
) -> int:
    with StopSwitch([root / "STOP"], file_seconds=0.0).listening() as stop:
        return render_batch(
            parts=[make_part(root, STORIES)],
            renderer=FakeRenderer(log=log, step_seconds=step_seconds, before_step=before_step),
            settings=DispatchSettings(poll_seconds=0.02, checkpoint_every_steps=0),
            stop=stop,
        ).exit_code


@pytest.mark.parametrize("seed", range(2))
def test_replicas_killed_at_random_moments_end_with_the_undisturbed_result(root: Path, seed: int) -> None:
    """The short version of ``benchmarks/chaos.py``: 12 stories of 8 shots over 4 replicas, one killed with -9."""
    stories = [make_story(f"story_{number:02d}", 8) for number in range(12)]
    whole = root.parent / "whole"
    undisturbed = [start_worker(whole, stories) for _ in range(2)]
    assert [exit_code(worker) for worker in undisturbed] == [0, 0]
    rng, log = random.Random(seed), root.parent / "log"

    def start(index: int) -> int:
        replica = Replica(index=index, count=4, job_id="job")
        return start_worker(root, stories, log=log, step_seconds=0.01, replica=replica)

    workers = [start(index) for index in range(4)]
    victim, moment = rng.randrange(4), rng.randrange(5, 85)
    wait_until(lambda: len(begun(log)) >= moment, seconds=60)
    time.sleep(rng.uniform(0.0, 0.1))
    kill(workers[victim])
    exit_code(workers[victim])
    lost = in_flight(root, begun_by(log, workers[victim]), workers[victim])
    workers[victim] = start(victim)
    assert [exit_code(worker) for worker in workers] == [0, 0, 0, 0]
    assert finished_files(root) == finished_files(whole)
    committed_by(root, stories)
    assert len(lost) <= 2, "the shot that it rendered and the one that it saved"
    twice = {name for name, times in Counter(begun(log)).items() if times > 1}
    assert twice <= lost, "nothing is rendered twice but the shots in flight"
