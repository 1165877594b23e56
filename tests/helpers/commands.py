"""Runs a command of the package as a process of its own that spends no seconds on imports: a fork of the ranks' server.

For tests that look at exit code, output and files. A test of imports, streams or signals starts a real interpreter.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.ranks import PRELOADED


def run_in_fork(
    arguments: Sequence[str],
    *,
    module: str = "storymem_dist.cli",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE ARGUMENTS`` and return its exit code and output; ``env`` is its whole environment.

    Raises ``subprocess.TimeoutExpired``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = (module, tuple(arguments), str(cwd or Path.cwd()), dict(os.environ if env is None else env), out, err)
        process = context.Process(target=_run, args=job)
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), seconds, out.read_bytes(), err.read_bytes())
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _run(module: str, arguments: tuple[str, ...], cwd: str, env: dict[str, str], out: Path, err: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
