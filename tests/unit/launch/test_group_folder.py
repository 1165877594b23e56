from pathlib import Path

from storymem_dist.errors import ConfigError, WeightsNotFound
from storymem_dist.launch.group_folder import GroupFolder


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
