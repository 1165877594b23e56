"""The benchmarks start, and their page lists them. No benchmark runs here: a run takes minutes."""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
GUARD = 'if __name__ == "__main__":'
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if GUARD in path.read_text())
COMMAND = re.compile(r"python -m benchmarks\.(\w+)")


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert not ended.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m benchmarks.{name} ")
    assert benchmark.__doc__ in text
    assert "--json FILE" in text


def test_a_benchmark_starts_as_a_module_from_the_root_of_the_repository() -> None:
    command = [sys.executable, "-m", "benchmarks.dispatch", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m benchmarks.dispatch ")


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_opens_with_its_question_and_its_command(name: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())) or ""
    question, _, rest = text.partition("\n\n")
    assert "?" in question and "\n" not in question
    assert rest.startswith(f"    python -m benchmarks.{name}")
    assert set(COMMAND.findall(text)) == {name}


def test_the_page_lists_every_benchmark_and_no_other() -> None:
    assert list(_rows_of_the_page()) == NAMES
    assert set(COMMAND.findall(PAGE.read_text())) == {*NAMES, "NAME"}


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_settings_of_the_page_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class AcceptedError(Exception):
        """The command line is right; nothing may be measured."""

    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise AcceptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(_rows_of_the_page()[name])])
    with pytest.raises(AcceptedError):
        importlib.import_module(f"benchmarks.{name}").main()


def _rows_of_the_page() -> dict[str, str]:
    """The quick settings of each benchmark in the page's table, by its name."""
    cells = [line.split("|") for line in PAGE.read_text().splitlines() if COMMAND.search(line) and line[:1] == "|"]
    return {row[1].strip(): row[4].strip().strip("`") for row in cells}
