import subprocess
import sys
from pathlib import Path

import pytest

from storymem_dist.errors import RunFolderError
from storymem_dist.observe.run.files import RunFiles
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.observe.wandb.process import WandbProcess, choose_mode, main
from tests.helpers.fake_run import FakeRun


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("off", {"WANDB_API_KEY": "k"}, "off"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {}, "online"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "off"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"NETRC": "/nonexistent"}, "offline"),
    ],
)
def test_the_mode_follows_setting_then_environment_then_key(
    mode: str, environment: dict[str, str], expected: str
) -> None:
    assert choose_mode(mode, environment) == expected


def test_a_login_kept_in_netrc_counts_as_a_key(tmp_path: Path) -> None:
    login = tmp_path / "netrc"
    login.write_text("machine api.wandb.ai\n  login user\n  password key\n")
    assert choose_mode("auto", {"NETRC": str(login)}) == "online"
    assert choose_mode("auto", {"NETRC": str(login), "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"


def test_a_folder_that_is_no_run_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunFolderError, match=r"is not a run folder \(it has no storymem_run.json\)"):
        RunFiles(tmp_path)
    assert main([str(tmp_path)]) == RunFolderError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "storymem_run.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read as the marker"):
        RunFiles(tmp_path)


def test_a_feeder_that_dies_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    (run.root / "storymem_run.json").write_text("{}")
    feeder = WandbProcess(run.root, WandbSettings(mode="offline"))
    feeder._process.wait(60)
    with pytest.raises(RuntimeError, match=r"its feeder ended with exit code 5; see .*feed\.log"):
        feeder.tick()
    assert "storymem_run.json" in (run.root / "wandb" / "feed.log").read_text()


def test_a_feeder_that_hangs_is_killed_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    real = subprocess.Popen

    def hang(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        return real([sys.executable, "-c", "import time; time.sleep(600)"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", hang)
    monkeypatch.setattr("storymem_dist.observe.wandb.process.GRACE_SECONDS", 0.2)
    feeder = WandbProcess(run.root, WandbSettings(mode="offline", finish_timeout_seconds=0.1))
    with pytest.raises(RuntimeError, match="exit code -9"):
        feeder.close()
