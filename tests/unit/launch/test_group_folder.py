import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storymem_dist.errors import ConfigError, MachineError, WeightsNotFound
from storymem_dist.launch.group_folder import GroupFolder, remove_dead_folders


def test_the_first_error_is_kept_with_its_exit_code(tmp_path: Path) -> None:
    folder = GroupFolder(tmp_path)
    assert folder.error() is None
    folder.report_error(WeightsNotFound("no weights"), rank=1)
    folder.report_error(ConfigError("peer is gone"), rank=0)
    error = folder.error()
    assert error is not None and (str(error), error.exit_code) == ("no weights", 4)


def test_the_worst_rank_gives_the_exit_code(tmp_path: Path) -> None:
    folder = GroupFolder(tmp_path)
    assert folder.exit_code() == 0
    for rank, code in ((0, 0), (1, 6), (2, 0)):
        folder.write_end(rank, code)
    assert folder.exit_code() == 6


def test_a_restarted_rank_overwrites_how_it_ended_before(tmp_path: Path) -> None:
    folder = GroupFolder(tmp_path)
    folder.write_end(0, 6)
    folder.write_end(0, 0)
    assert folder.exit_code() == 0


def test_the_job_comes_back_as_it_was(tmp_path: Path) -> None:
    job = {"sweep": "steps", "points": [{"name": "é=1", "config": {"seed": -1, "path": None}}]}
    GroupFolder(tmp_path).write_job(job)
    assert GroupFolder(tmp_path).read_job() == job


def test_a_fault_of_the_machine_arrives_as_one(tmp_path: Path) -> None:
    folder = GroupFolder(tmp_path)
    folder.report_error(MachineError("the disk is full"), rank=0)
    error = folder.error()
    assert isinstance(error, MachineError) and (str(error), error.exit_code) == ("the disk is full", 5)


def test_a_launcher_removes_the_folders_of_dead_launchers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "from storymem_dist.launch.group_folder import GroupFolder; import os\n"
    code += "with GroupFolder.of_this_process() as folder: (folder.root / 'logs').mkdir(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    [dead] = tmp_path.iterdir()
    for name, change in {"elsewhere": {"boot_id": "x"}, "container": {"pid_namespace": "pid:[1]"}, "odd": {}}.items():
        (tmp_path / f"storymem-ranks-{name}").mkdir()
        owner = {**json.loads((dead / "owner.json").read_text()), **change}
        (tmp_path / f"storymem-ranks-{name}" / "owner.json").write_text(json.dumps(owner) if change else "[")
    (tmp_path / "storymem-ranks-new").mkdir()
    (tmp_path / "storymem-ranks-link").symlink_to(dead)
    with GroupFolder.of_this_process() as living:
        assert living.launcher() == os.getpid()
        remove_dead_folders(tmp_path)
        left = {path.name.removeprefix("storymem-ranks-") for path in tmp_path.iterdir()}
        assert left == {
            "elsewhere",
            "container",
            "odd",
            "new",
            "link",
            living.root.name.removeprefix("storymem-ranks-"),
        }
    assert not living.root.exists()
