import subprocess
from pathlib import Path

import pytest

from storymem_dist.config.launch import SlurmSettings
from storymem_dist.errors import ConfigError
from storymem_dist.launch.slurm import job_arguments, sbatch_options, submit, template_path
from storymem_dist.resources import assets_folder
from tests.helpers.small_job import small_point, write_storyboard


def test_only_what_is_set_goes_before_the_template(tmp_path: Path) -> None:
    assert sbatch_options(SlurmSettings(), tmp_path, is_array=False) == [f"--output={tmp_path}/logs/slurm-%j.out"]


def test_settings_become_options_of_sbatch(tmp_path: Path) -> None:
    slurm = SlurmSettings(
        template="render_array", tasks=4, gpus_per_node=8, time="2:00:00", qos="high", options=["--exclude=n7"]
    )
    assert sbatch_options(slurm, tmp_path, is_array=True) == [
        "--array=0-3",
        "--gres=gpu:8",
        "--time=2:00:00",
        "--qos=high",
        f"--output={tmp_path}/logs/slurm-%A_%a.out",
        "--exclude=n7",
    ]


def test_a_job_without_gpus_asks_for_none(tmp_path: Path) -> None:
    assert "--gres=none" in sbatch_options(SlurmSettings(gpus_per_node=0), tmp_path, is_array=False)


def test_the_job_gets_the_command_line_without_the_arguments_about_submission() -> None:
    given = ["-m", "launch=slurm", "launch.slurm.nodes=2", "+launch.dry_run=true", "launch.max_restarts=5", "a.b=1,2"]
    assert job_arguments(given) == ["-m", "launch.max_restarts=5", "a.b=1,2"]


def test_a_template_is_one_of_this_project_or_a_file(tmp_path: Path) -> None:
    own = tmp_path / "mine.sbatch"
    own.write_text("#!/bin/bash\n")
    assert template_path("render") == assets_folder("slurm") / "render.sbatch"
    assert template_path(str(own)) == own
    with pytest.raises(ConfigError, match="neither a template of this project"):
        template_path("redner")


def test_a_dry_run_shows_the_command_and_submits_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was submitted"))
    stories = write_storyboard(tmp_path / "fox.json", [[True, False]])
    run = tmp_path / "my run"
    arguments = [f"stories='{stories}'", f"output='{run}'", "launch=slurm", "launch.dry_run=true"]
    point = small_point(
        "launch=slurm",
        "launch.dry_run=true",
        "launch.slurm.report=true",
        "launch.slurm.nodes=2",
        f"stories.path='{stories}'",
        f"output='{run}'",
    )
    assert submit([point], arguments) == 0
    printed = capsys.readouterr().out
    assert "sbatch --parsable --nodes=2" in printed and "render.sbatch" in printed
    assert "--dependency=afterany:JOB" in printed and "report.sbatch" in printed
    assert "2 of 2 shots are left" in printed and "estimated time: not known" in printed
    assert not run.exists()


def test_without_slurm_the_message_says_where_to_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stories = write_storyboard(tmp_path / "fox.json", [[True]])
    point = small_point("launch=slurm", f"stories.path='{stories}'", f"output='{tmp_path / 'run'}'")
    with pytest.raises(ConfigError, match="no sbatch on this machine's PATH; submit from a login node"):
        submit([point], [])
    assert not (tmp_path / "run").exists()
