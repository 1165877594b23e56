import os
from pathlib import Path

import pytest

from storymem_dist.dispatch.stop import StopSwitch, own_stop_files
from storymem_dist.render.identity import group_identity, job_identity


def test_a_file_for_this_job_alone_counts_although_it_was_there_before(tmp_path: Path) -> None:
    of_all, own = tmp_path / "STOP", tmp_path / "STOP.7"
    of_all.touch()
    own.touch()
    assert StopSwitch([of_all]).reason() is None
    assert StopSwitch([of_all], own_files=[own]).reason() == "STOP file"


@pytest.mark.parametrize(("text", "reason"), [("SIGTERM\n", "SIGTERM"), ("SIGNOT", "STOP file"), ("", "STOP file")])
def test_a_launcher_names_the_signal_that_it_received(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "STOP.7").write_text(text)
    assert StopSwitch(own_files=[tmp_path / "STOP.7"]).reason() == reason


def test_what_a_person_writes_into_a_stop_file_is_no_signal(tmp_path: Path) -> None:
    (tmp_path / "STOP").write_text("SIGTERM")
    assert StopSwitch([tmp_path / "STOP"], restarted=True).reason() == "STOP file"


def test_files_for_this_job_come_from_its_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_STOP_FILES", os.pathsep.join(["/a/STOP.7", "/b/STOP"]))
    assert own_stop_files() == [Path("/a/STOP.7"), Path("/b/STOP")]
    monkeypatch.delenv("STORYMEM_STOP_FILES")
    assert own_stop_files() == []


def test_nodes_of_a_job_share_its_name_and_differ_in_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_JOB_ID", "slurm-7")
    monkeypatch.setenv("STORYMEM_NODE", "1")
    assert (job_identity(), group_identity()) == ("slurm-7", "slurm-7.node1")
