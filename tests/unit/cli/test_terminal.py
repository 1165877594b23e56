"""Printing never changes an exit code, and a name never reaches a terminal as anything but a name."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.cli import commands
from storymem_dist.selftest.__main__ import main as selftest

HOSTILE = "n\x1b[31m\r\n\u202e\u2066\u2028\x9b\u200b\xe9.x"
SHOWN = ("\\x1b[31m", "\\r\\n", "\\u202e\\u2066\\u2028\\x9b\\u200b", "\\xe9.x")
FEEDER = ["storymem_dist.observe.wandb.process", HOSTILE]

COMMANDS: dict[str, tuple[Callable[[], Any], list[str], int]] = {
    "render": (commands.render, ["stories=" + HOSTILE, "model=tiny"], 3),
    "render, a setting": (commands.render, ["no" + HOSTILE + "=1"], 2),
    "render, an option": (commands.render, ["--" + HOSTILE], 2),
    "weights": (commands.weights, ["inspect", HOSTILE], 4),
    "weights, an argument": (commands.weights, ["inspect", "a", HOSTILE], 2),
    "report": (commands.report, [HOSTILE], 5),
    "queue": (commands.queue, [HOSTILE, "pause"], 5),
    "queue, an argument": (commands.queue, ["a", HOSTILE], 2),
    "doctor": (commands.doctor, ["no" + HOSTILE + "=1"], 2),
    "selftest": (selftest, [HOSTILE], 2),
}
"""A command with arguments that it refuses, and the exit code."""


def run(arguments: list[str], redirection: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", sys.executable, *arguments],
        capture_output=True,
        check=False,
        timeout=200,
        env={**os.environ, "WANDB_MODE": "offline", **environment},
    )


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Run a command in this process, with standard error in a log; return the exit code and the log."""

    def run_here(command: Callable[[], Any], arguments: list[str], encoding: str) -> tuple[int, str]:
        log = tmp_path / "log"
        with log.open("w", encoding=encoding) as stream, monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stream)
            patched.setattr(sys, "argv", ["command", *arguments])
            patched.setattr(logging.getLogger(), "handlers", [])  # Hydra puts its own there
            try:
                code = command()
            except SystemExit as end:
                code = end.code
        return code, log.read_bytes().decode(encoding)

    return run_here


def check_names(said: str) -> None:
    assert all(part in said for part in SHOWN), said
    assert said.isascii() and "\x1b" not in said and "\r" not in said
    assert "Traceback" not in said and said.splitlines()[-1].count(SHOWN[0]) >= 1


@pytest.mark.parametrize("name", COMMANDS)
def test_names_are_shown_as_escapes_in_one_line(name: str, run_here: Callable[..., tuple[int, str]]) -> None:
    command, arguments, expected = COMMANDS[name]
    code, said = run_here(command, arguments, "ascii")
    assert code == expected, said
    check_names(said)


def test_a_process_on_an_ascii_terminal_shows_names_as_escapes_too() -> None:
    done = run(["-m", *FEEDER], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 5
    check_names(done.stderr.decode("ascii"))


@pytest.mark.parametrize(
    ("arguments", "redirection", "code"),
    [
        (["storymem_dist", "no" + HOSTILE + "=1"], ">/dev/full 2>/dev/full", 2),
        (["storymem_dist.cli.weights", "inspect", HOSTILE], ">&- 2>&- <&-", 4),
        (["storymem_dist.cli.report", HOSTILE], "2>&1 | true", 5),
        (FEEDER, ">/dev/full 2>&-", 5),
        (["storymem_dist", "--cfg", "job"], ">/dev/full", 0),
        (["storymem_dist.cli.weights", "--help"], "| true", 0),
    ],
    ids=["render", "weights", "report", "feeder", "render, success", "weights, success"],
)
def test_exit_codes_do_not_depend_on_the_streams(arguments: list[str], redirection: str, code: int) -> None:
    done = run(["-m", *arguments], redirection)
    assert done.returncode == code
    assert done.stderr == b"", "the interpreter complains about its own streams"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (commands.render, ["model=tiny", "stories=examples", "output={}"]),
        (commands.render, ["model=tiny", "stories={}"]),
        (commands.report, ["{}"]),
        (commands.queue, ["{}"]),
    ],
)
def test_a_name_that_is_not_utf_8_is_one_sentence(
    command: Callable[[], Any], arguments: list[str], tmp_path: Path, run_here: Callable[..., tuple[int, str]]
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    code, said = run_here(command, [one.format(name) for one in arguments], "utf-8")
    assert code == 2 and "caf\\udce9" in said and "not UTF-8" in said
    assert "Traceback" not in said


PROGRAM = """
import sys
import threading
import time
from storymem_dist.terminal.program import program
with program("a-program"):
    {body}
"""

BODIES = {
    "in the body": ("try:\n        ready(); time.sleep(60)\n    finally:\n        time.sleep(60)", 2),
    "once": ("ready(); time.sleep(60)", 1),
    "while threads are joined": ("threading.Thread(target=time.sleep, args=(60,)).start(); ready(); time.sleep(60)", 2),
    "after the body": (
        "import atexit; atexit.register(time.sleep, 60); atexit.register(lambda: ready())",
        1,
    ),
}


@pytest.mark.parametrize("where", BODIES)
def test_interrupts_end_with_130_and_never_with_a_trace(where: str) -> None:
    body, presses = BODIES[where]
    code = "def ready(): sys.stdout.write('ready\\n')\n" + PROGRAM.format(body=body)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(presses):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said and "Exception ignored" not in said
    assert said.count("\n") <= 1


def test_an_interrupt_while_modules_load_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra" / "__init__.py").write_text("raise KeyboardInterrupt\n")
    done = run(["-m", "storymem_dist"], PYTHONPATH=f"{tmp_path}{os.pathsep}{Path.cwd()}")
    assert (done.returncode, done.stderr) == (130, b"storymem-render: interrupted\n")
