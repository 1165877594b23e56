"""The command: what it prints, how signals end it, what it refuses, and that other programs pay nothing for it."""

import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from storymem_dist.cli.report import main
from storymem_dist.errors import ConfigError
from storymem_dist.observe.live.access import Access
from storymem_dist.observe.live.server import _read_token, announcement, open_listener
from tests.helpers.fake_run import FakeRun


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FakeRun(tmp_path_factory.mktemp("server") / "run", num_stories=1, num_shots=1).root


@contextmanager
def command(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and the address that it printed."""
    words = [sys.executable, "-m", "storymem_dist.cli.report", *map(str, arguments), "--serve", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().removeprefix("live page: ").strip()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_cleanly_while_clients_follow(root: Path, number: signal.Signals) -> None:
    with command(root) as (process, address), httpx.stream("GET", f"{address}events?page=", timeout=20) as stream:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        lines = stream.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        begun = time.monotonic()
        process.send_signal(number)
        assert not any(line.startswith("data: {") for line in lines), "the stream ends; it is not cut off"
        assert process.wait(20) == 0
        assert process.stdout is not None and process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
    assert err == ""
    assert time.monotonic() - begun < 5
    assert "it only shows the run; --control adds buttons" in out


def test_it_says_how_to_reach_it_from_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    with open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        lines = list(announcement(listener, "127.0.0.1", Access(token="t" * 32, control=True)))
        assert lines[0] == f"live page: http://127.0.0.1:{port}/#token={'t' * 32}"
        assert lines[1].startswith(f"from another machine: ssh -L {port}:127.0.0.1:{port} ")
        assert lines[1].endswith(f"@{socket.gethostname()}")
        public = Access(token="t" * 32, read_with_token=True)
        assert f"/?token={'t' * 32}" in next(announcement(listener, "127.0.0.1", public))
        monkeypatch.setattr("storymem_dist.observe.live.server._own_address", lambda family: "10.0.0.7")
        with open_listener("0.0.0.0", 0) as everywhere:
            _, second, *_ = announcement(everywhere, "0.0.0.0", public)
            assert second == f"or: http://10.0.0.7:{everywhere.getsockname()[1]}/?token={'t' * 32}"
        monkeypatch.delenv("SSH_CONNECTION")
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        assert not any("ssh" in line for line in announcement(listener, "127.0.0.1", Access()))


@pytest.mark.parametrize(("arguments", "words"), [
    (["--control"], "add --serve"),
    (["--port", "1"], "add --serve"),
    (["--serve", "--embed"], "--serve writes no page"),
    (["--serve", "-o", "x.html"], "--serve writes no page"),
    (["--serve", "--wandb", "online"], "--serve writes no page"),
    (["RUN", "RUN"], "3 runs are given"),
])  # fmt: skip
def test_options_that_exclude_each_other_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(root), *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_port_or_host_that_cannot_be_used_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for arguments, words in (
            (["--port", str(port)], "--port 0 takes any free port"),
            (["--port", "70000"], "--port 70000 is not allowed"),
            (["--host", "no.such.host.invalid"], "is no name or address of this machine"),
            (["--host", "203.0.113.7"], "cannot be used"),
        ):
            assert main([str(root), "--serve", *arguments]) == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1


def test_a_folder_that_is_no_run_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no"), "--serve", "--port", "0"]) == 5
    assert "is not a run folder" in capsys.readouterr().err


def test_a_token_file_is_made_for_its_owner_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = _read_token(path)
    assert len(token) >= 40 and _read_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        _read_token(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="holds no token"):
        _read_token(path)
    with pytest.raises(ConfigError, match="cannot be used"):
        _read_token(tmp_path / "no" / "token")
    for no_file in (tmp_path, Path("/dev/null")):
        with pytest.raises(ConfigError, match="is no file"):
            _read_token(no_file)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        _read_token(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_for_other_machines_reading_needs_the_token(root: Path) -> None:
    with command(root, "--host", "0.0.0.0", "--control") as (_, address):
        place, _, token = address.partition("?token=")
        assert place.startswith(f"http://{socket.gethostname()}:") and token
        port = place.rstrip("/").rpartition(":")[2]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True, timeout=20) as client:
            assert client.get("/").status_code == 403
            assert client.get("/", params={"token": token}).status_code == 200
            assert client.get("/parts").status_code == 200, "the cookie is kept"


def test_the_web_server_is_loaded_to_serve_alone_and_torch_only_for_buttons() -> None:
    code = (
        "import sys, storymem_dist.cli.report; print([one for one in ('starlette', 'uvicorn') if one in sys.modules]); "
        "import storymem_dist.observe.live.server; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == ["[]", "False", ""], done.stderr
