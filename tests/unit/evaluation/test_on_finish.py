"""The last process to leave a run folder scores it, in a process of its own; whatever happens there is a warning."""

import dataclasses
import json
from pathlib import Path
from unittest.mock import patch

import pytest

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.scores import read_scores
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.owners import Owner
from storymem_dist.evaluation import on_finish
from storymem_dist.evaluation.cache import CACHE_FOLDER
from storymem_dist.evaluation.on_finish import is_last, score_finished_run
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.events import WarningIssued
from storymem_dist.files import hold_lock
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.settings import ConsoleSettings, TrackingSettings, WandbSettings
from tests.helpers.fake_run import FakeRun

SETTINGS = EvaluationSettings(mode="on_finish", viclip="none/a", clip_l="none/b", aesthetic="none/c", device="cpu")
TRACKING = TrackingSettings(console=ConsoleSettings(mode="off"), wandb=WandbSettings(mode="off"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    with run.replica() as replica:
        run.shot(replica, 0, 0)
        run.finish(replica)
    return run.root


def warnings_of(root: Path) -> list[str]:
    return [one.event.message for one in read_journal(root / "events") if isinstance(one.event, WarningIssued)]


def test_the_run_is_scored_and_its_report_shows_it(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert score_finished_run(root, SETTINGS, TRACKING)
    scores = read_scores(root)
    assert scores is not None and "sharpness" in scores.values
    assert '<section id="scores"' in (root / "report.html").read_text()
    assert f"scores: {root / 'scores.json'}" in capfd.readouterr().out
    assert warnings_of(root) == []


def test_a_run_that_cannot_be_scored_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1)
    assert not score_finished_run(run.root, SETTINGS, TRACKING)
    assert "was rendered but not scored" in capsys.readouterr().err
    (message,) = warnings_of(run.root)
    assert "there is no finished shot to score" in message


@pytest.mark.parametrize("error", [OSError("no such program"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_no_error_leaves_it(root: Path, error: BaseException) -> None:
    with patch.object(on_finish, "_in_own_process", side_effect=error):
        assert not score_finished_run(root, SETTINGS, TRACKING)
    assert len(warnings_of(root)) == 1


def test_it_is_off_by_default(root: Path) -> None:
    with patch.object(on_finish, "_in_own_process") as started:
        assert not score_finished_run(root, EvaluationSettings(), TRACKING)
    assert not started.called


def test_only_the_last_process_scores(root: Path) -> None:
    leases = LeaseFolder(folder=RunFolder(root).leases_folder, owner=Owner.this_process("job", 1), lease_seconds=60.0)
    leases.start()
    with patch.object(on_finish, "_in_own_process", return_value=None) as started:
        assert not score_finished_run(root, SETTINGS, TRACKING)
        leases.close()
        assert score_finished_run(root, SETTINGS, TRACKING)
        assert started.call_count == 1
        (root / CACHE_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = hold_lock(root / CACHE_FOLDER / "on_finish.lock")
        assert lock is not None and not score_finished_run(root, SETTINGS, TRACKING), "another one scores it"
        lock.release()


def test_a_process_of_another_machine_counts_and_one_that_died_here_does_not(root: Path) -> None:
    own = Owner.this_process()
    elsewhere = dataclasses.replace(own, owner_id="other-1", boot_id="another start", pid=1, pid_start="1")
    dead = dataclasses.replace(own, owner_id="dead-1", pid_start="1")
    folder = RunFolder(root).leases_folder
    for owner in (dead, elsewhere):
        leases = LeaseFolder(folder=folder, owner=owner, lease_seconds=60.0)
        leases.start()
        leases._closing.set()  # it ends without removing its heartbeat
        assert is_last(root) == (owner is dead)
    assert json.loads((folder / "other-1.alive").read_text())
