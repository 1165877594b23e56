import subprocess
import sys
from pathlib import Path

import pytest

from storymem_dist.errors import RunFolderError
from storymem_dist.observe.run.files import RunFiles
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.observe.wandb.folder import Progress, load_progress, own_folder, save_progress
from storymem_dist.observe.wandb.process import WandbProcess, choose_mode, main
from tests.helpers.fake_run import FakeRun, whole_run


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


def replace_feeder(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let every feeder be a process that runs ``program``."""
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        return real([sys.executable, "-X", "utf8", "-c", program], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", start)


def test_a_feeder_that_dies_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    (run.root / "storymem_run.json").write_text("{}")
    feeder = WandbProcess(run.root, WandbSettings(mode="offline"))
    feeder._process.wait(60)
    with pytest.raises(RuntimeError) as caught:
        feeder.tick()
    (log,) = (run.root / "wandb").glob("feed-*.log")
    reason = log.read_text().strip().splitlines()[-1]
    assert "storymem_run.json cannot be read as the marker of a run folder" in reason
    assert str(caught.value) == (
        f"its feeder ended (exit code 5): {reason} (log: {log}). All events are in the run folder; send them with: "
        f"storymem-report {run.root} --wandb online"
    )


def test_the_last_words_of_a_feeder_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    replace_feeder(monkeypatch, r"import sys; sys.stderr.write('first\n\x1b[2J\u202eno space left\n\n'); sys.exit(3)")
    feeder = WandbProcess(run.root, WandbSettings(mode="offline"))
    feeder._process.wait(60)
    with pytest.raises(RuntimeError, match=r"\(exit code 3\): \\x1b\[2J\\u202eno space left \(log: "):
        feeder.tick()


def test_a_feeder_that_hangs_is_killed_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    replace_feeder(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr("storymem_dist.observe.wandb.process.GRACE_SECONDS", 0.2)
    feeder = WandbProcess(run.root, WandbSettings(mode="offline", finish_timeout_seconds=0.1))
    with pytest.raises(RuntimeError, match="signal 9"):
        feeder.close()


def test_a_server_that_hangs_is_waited_for_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(tmp_path / "a run", num_stories=1, num_shots=1)
    replace_feeder(monkeypatch, "import sys, time; sys.stdin.read(); time.sleep(1)")
    monkeypatch.setattr("storymem_dist.observe.wandb.process.SILENT_SECONDS", 0.2)
    WandbProcess(run.root, WandbSettings(mode="offline", finish_timeout_seconds=60.2)).close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "waiting for Weights & Biases to take the last values and videos, for at most 80 s" in line
    assert "nothing is lost" in line and f"storymem-report '{run.root}' --wandb online" in line
    assert list((run.root / "wandb").iterdir()) == [], "a feeder without a word leaves no log"


def test_a_quick_end_and_an_offline_run_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    replace_feeder(monkeypatch, "import sys; sys.stdin.read()")
    feeder = WandbProcess(run.root, WandbSettings(mode="offline"))
    (run.root / "wandb" / "offline-run-1-x").mkdir()
    feeder.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"upload it with: wandb sync {run.root}/wandb/offline-run-1-x")


@pytest.mark.parametrize("name", ["feed.lock", "feed.json", "data", "thumbnails", "superseded", ""])
def test_links_in_the_wandb_folder_are_not_followed(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    if name:
        (run.root / "wandb").mkdir()
    is_file = name.startswith("feed.")
    (run.root / "wandb" / name).symlink_to(outside / "file" if is_file else outside)
    code = main([str(run.root), "--settings", '{"mode": "offline"}'])
    assert [path.name for path in outside.iterdir()] == ["file"] and (outside / "file").read_text() == "precious"
    if name == "feed.json":
        assert code == 0, "the link is replaced"
    else:
        assert code == RunFolderError.exit_code
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "[" * 10_000, '{"logged": {"a": "b"}, "videos": {}, "row": 0}', '{"logged":1,"videos":2,"row":3}'],
)
def test_progress_that_is_damaged_counts_as_none(tmp_path: Path, content: str) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    (own_folder(run.root) / "feed.json").write_text(content)
    assert load_progress(run.root, ["online"]) == Progress()


def test_progress_of_an_earlier_version_is_that_of_an_online_run_unless_there_are_offline_ones(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    (own_folder(run.root) / "feed.json").write_text('{"logged": {"w": 3}, "videos": {"shot": 1}, "row": 7}')
    known = Progress(logged={"w": 3}, videos={"shot": 1}, row=7, target=["online"])
    assert load_progress(run.root, ["online"]) == known
    save_progress(run.root, known)
    assert load_progress(run.root, ["other"]) == known
    (own_folder(run.root) / "feed.json").write_text('{"logged": {"w": 3}, "videos": {"shot": 1}, "row": 7}')
    (run.root / "wandb" / "offline-run-1").mkdir()
    assert load_progress(run.root, ["online"]).target == ()
