"""The next command of a job that ended early: one line that a shell reads back."""

import os
import subprocess
import sys

import pytest

from storymem_dist.errors import ConfigError, MachineError, RunFolderError, ShotError, StoryboardError
from storymem_dist.launch.again import command_again, next_line, quoted
from storymem_dist.launch.group_folder import RankError
from storymem_dist.launch.points import PointState

WORDS = [
    "a b",
    "it's",
    "",
    "$HOME",
    "`id`",
    "a\nb",
    "\x1b[31m",
    "\u202eabc",
    "\udcff",
    "naïve",
    "\\'\n",
    "x=[1]",
    "é\t",
]


def state(name: str, **more: int) -> PointState:
    return PointState(name="run", state=name, exit_code=0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_a_quoted_word_comes_back_from_bash_and_is_printable(word: str) -> None:
    line = quoted(word)
    assert line.isprintable()
    back = subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, check=True).stdout
    assert back == os.fsencode(word)


@pytest.mark.parametrize(
    ("point", "code", "error", "expected"),
    [
        (state("done"), 0, None, ""),
        (state("stopped"), 0, None, "next: go    (continues where this job stopped)\n"),
        (state("stopped", num_failed=2), 0, None, "next: go    (continues where this job stopped)\n"),
        (
            state("failed", num_failed=2),
            6,
            None,
            "next: go dispatch.retry_failed=true    (renders the failed shots and those after them again)\n",
        ),
        (state("done", num_refused=3), 3, None, "next, once the refused files are mended: go\n"),
        (state("not started"), 3, StoryboardError("bad"), "next, once the refused files are mended: go\n"),
        (state("running"), 5, MachineError("full"), "next, once that is mended: go\n"),
        (state("running"), 1, RankError("died", 1), "next: go    (continues; what is finished is kept)\n"),
        (state("running"), 130, None, "next: go    (continues; what is finished is kept)\n"),
        (state("stopped"), 2, ConfigError("sampler.stepz"), ""),
        (state("stopped"), 5, RunFolderError("in use by another job"), ""),
        (state("failed", num_failed=1), 6, ShotError("no"), ""),
    ],
)
def test_every_early_end_names_what_to_do(
    monkeypatch: pytest.MonkeyPatch, point: PointState, code: int, error: Exception | None, expected: str
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert next_line([point], code, error, "go") == expected  # type: ignore[arg-type]


def test_the_command_is_that_of_this_process_unless_a_script_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORYMEM_COMMAND", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "storymem_dist", "stories=my stories/"])
    assert command_again() == "python3 -m storymem_dist 'stories=my stories/'"
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python3", "/nowhere/storymem-render", "output=a"])
    assert command_again() == "/nowhere/storymem-render output=a"
    monkeypatch.setenv("STORYMEM_COMMAND", "sbatch slurm/render.sbatch output=a")
    assert command_again() == "sbatch slurm/render.sbatch output=a"
