"""Several ranks of one replica, and another job in the same folder."""

import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts import run_folder, shot_folder
from storymem_dist.dispatch.leases import WAITING, WORKING, LeaseFolder
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.errors import MachineError, RunFolderError, ShotError
from storymem_dist.events import ShotFailed, ShotSkipped
from storymem_dist.render.batch import render_batch
from tests.helpers.batches import STORIES, render
from tests.helpers.fake_renderer import Events, FakeRenderer, make_part, make_story
from tests.helpers.workers import quick_folder


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


class LockStep:
    """``leader_decides`` of two ranks that are threads: rank 0 computes, both get the outcome."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=30)
        self._outcome: tuple[Any, BaseException | None] = (None, None)

    def of(self, rank: int) -> Callable[[Callable[[], Any]], Any]:
        def leader_decides(fn: Callable[[], Any]) -> Any:
            if rank == 0:
                try:
                    self._outcome = (fn(), None)
                except BaseException as error:
                    self._outcome = (None, error)
            self._barrier.wait()
            value, error = self._outcome
            self._barrier.wait()
            if error is not None:
                raise error
            return value

        return leader_decides


@pytest.mark.parametrize("trouble", ["none", "failure", "stop", "full disk"])
def test_all_ranks_of_a_replica_do_the_same_and_only_the_leader_touches_the_folder(
    root: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_step, summaries, stop = LockStep(), {}, StopSwitch()
    save_attempt = shot_folder.ShotFolder.save_attempt

    def save(folder: shot_folder.ShotFolder, *arguments: Any) -> Any:
        if trouble == "full disk" and folder.shot_id == "shot_02":
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_attempt(folder, *arguments)

    monkeypatch.setattr(shot_folder.ShotFolder, "save_attempt", save)

    def before_step(job: ShotJob, step: int) -> None:
        if job.index == 1 and step == 2:
            if trouble == "failure":
                raise ShotError("latents are not finite")
            if trouble == "stop":
                stop.request("SIGTERM")

    renderers = [FakeRenderer(before_step=before_step), FakeRenderer(before_step=before_step)]

    def run(rank: int) -> None:
        try:
            summaries[rank] = render_batch(
                parts=[make_part(root if rank == 0 else root.parent / "never", STORIES)],
                renderer=renderers[rank],
                settings=DispatchSettings(poll_seconds=0.01, checkpoint_every_steps=1),
                leader_decides=lock_step.of(rank),
                stop=stop if rank == 0 else StopSwitch(),
            )
        except MachineError as error:
            summaries[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert summaries[0] == summaries[1]
    if trouble == "full disk":
        assert "No space left on device; free space there" in summaries[0]
        assert not list((root / "leases").iterdir()) and not list((root / "failures").iterdir())
    else:
        assert summaries[0].state == {"none": "done", "stop": "stopped", "failure": "failed"}[trouble]
    assert renderers[0].rendered == renderers[1].rendered and renderers[0].prepared == renderers[1].prepared
    assert not (root.parent / "never").exists()


def other_job(root: Path, job_id: str = "other") -> LeaseFolder:
    run_folder.RunFolder(root).open()
    leases = LeaseFolder(folder=root / "leases", owner=Owner.this_process(job_id), lease_seconds=1.0)
    leases.start(WORKING)
    return leases


def test_a_folder_in_use_is_refused_on_demand(root: Path) -> None:
    other = other_job(root)
    with pytest.raises(RunFolderError, match=r"in use by another job \(process \d+ on .*on_busy=join or wait"):
        render(root, on_busy="refuse")
    other.close()
    assert render(root, on_busy="refuse").state == "done"


def test_two_jobs_that_enter_at_once_are_not_both_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, others_working = other_job(root), LeaseFolder.others_working
    looks: list[LeaseFolder] = []

    def both_withdraw(leases: LeaseFolder) -> list[Owner]:
        looks.append(leases)
        if len(looks) == 3:
            other.set_state(WAITING)
        return [] if len(looks) == 1 else others_working(leases)

    monkeypatch.setattr(LeaseFolder, "others_working", both_withdraw)
    assert render(root, on_busy="refuse").state == "done"
    other.close()


def test_replicas_of_the_same_job_do_not_refuse_each_other(root: Path) -> None:
    other = other_job(root, "mine")
    assert render(root, on_busy="refuse", replica=Replica(job_id="mine")).state == "done"
    other.close()


def test_a_second_job_waits_on_demand_until_the_first_is_gone(root: Path) -> None:
    other = other_job(root)
    done: list[BatchSummary] = []
    thread = threading.Thread(target=lambda: done.append(render(root, on_busy="wait")))
    thread.start()
    thread.join(1.0)
    assert not done and not (root / "stories/ocean").exists()
    other.close()
    thread.join(30)
    assert done[0].state == "done"


def test_a_stop_ends_the_wait_for_another_job(root: Path) -> None:
    other = other_job(root)
    stop = StopSwitch()
    stop.request("SIGTERM")
    summary = render(root, on_busy="wait", stop=stop)
    assert (summary.state, summary.reason, summary.exit_code) == ("stopped", "SIGTERM", 0)
    other.close()


def test_every_replica_checks_its_share_of_a_finished_run(root: Path) -> None:
    render(root)
    skipped: Counter[str] = Counter()
    for index in range(2):
        events = Events()
        summary = render(root, events=events, replica=Replica(index=index, count=2, job_id="job"))
        skipped.update(event.story_id for event in events.of(ShotSkipped))
        assert summary.state == "done" and summary.num_skipped in (2, 4)
    assert skipped == {"ocean": 4, "city": 2}


@pytest.mark.parametrize("then", ["continue", "publish", "fail"])
def test_a_replica_gives_up_a_shot_that_another_has_taken_over(root: Path, then: str) -> None:
    taken: list[str] = []

    def before_step(job: ShotJob, step: int) -> None:
        if step == (0 if then == "continue" else 3) and not taken:
            key = f"{job.story_id}.{job.shot_id}.{job.fingerprint[:16]}"
            thief = LeaseFolder(folder=root / "leases", owner=Owner.this_process(), lease_seconds=1.0)
            (root / "leases" / f"{key}.0.lease").rename(root / "leases" / f"{key}.gone")
            assert thief.try_claim(key) is not None
            taken.append(job.attempt_id)
            if then == "fail":
                raise ShotError("not reported: the shot is another replica's now")

    events, renderer = Events(), FakeRenderer(before_step=before_step, step_seconds=0.3 if then == "continue" else 0.0)
    summary = render(root, [make_story("city", 2)], renderer=renderer, events=events)
    assert (summary.state, summary.num_rendered, summary.num_failed) == ("done", 2, 0)
    (lost,) = events.of(ShotFailed)
    assert (lost.error_type, lost.will_retry, lost.attempt_id) == ("LeaseLost", True, taken[0])
    assert renderer.rendered == ["city:shot_01", "city:shot_01", "city:shot_02"]
    assert not (root / "stories/city/shot_01/attempts" / taken[0]).exists()
    assert not list((root / "failures").iterdir())
