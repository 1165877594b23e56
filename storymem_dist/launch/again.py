"""The next command after a job that ended early, as one line that a shell reads back.

Knows how this program was started, and how a job can end; starts nothing.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from storymem_dist.errors import MachineError, ShotError, StoryboardError, StoryMemError
from storymem_dist.launch.points import PointState
from storymem_dist.terminal.program import INTERRUPTED

COMMAND_VARIABLE = "STORYMEM_COMMAND"
"""Environment variable: the command that a person gave, where it was not this program's (``sbatch``, a script)."""

_RETRY = "dispatch.retry_failed=true"


def next_line(
    points: Sequence[PointState], exit_code: int, error: StoryMemError | None = None, command: str | None = None
) -> str:
    """Return the line that names the next command, with its line break; empty where there is nothing left to do.

    ``points`` are the run folders of the job as it left them, ``exit_code`` and ``error`` its end. ``command`` is this
    process's own where it is not given. Empty, too, after mistakes that were found before anything was rendered: their
    messages say what to change.
    """
    command = command_again() if command is None else command
    states = {point.state for point in points}
    refused = exit_code == StoryboardError.exit_code or any(point.num_refused for point in points)
    failed = exit_code == ShotError.exit_code or any(point.num_failed for point in points)
    if isinstance(error, MachineError):
        return f"next, once that is mended: {command}\n"
    if error is not None and exit_code not in (StoryMemError.exit_code, StoryboardError.exit_code):
        return ""
    if error is None and "stopped" in states:
        queued = "; a SLURM job whose time was up queues itself" if "SLURM_JOB_ID" in os.environ else ""
        return f"next: {command}    (continues where this job stopped{queued})\n"
    if error is None and failed:
        first = ", once the refused files are mended" if refused else ""
        again = command if _RETRY in command.split() else f"{command} {_RETRY}"
        return f"next{first}: {again}    (renders the failed shots and those after them again)\n"
    if refused:
        return f"next, once the refused files are mended: {command}\n"
    if exit_code in (StoryMemError.exit_code, INTERRUPTED):
        return f"next: {command}    (continues; what is finished is kept)\n"
    return ""


def command_again() -> str:
    """Return the command that started this job, quoted for a shell and in one line.

    That is ``STORYMEM_COMMAND`` where a script sets it, torchrun's command in a rank that torchrun started, else the
    command of this process.
    """
    if given := os.environ.get(COMMAND_VARIABLE):
        return given
    words = list(sys.orig_argv)
    if "RANK" in os.environ:
        words = _command_of(os.getppid()) or words
    return " ".join(map(quoted, _shortened(words)))


def quoted(word: str) -> str:
    """Return ``word`` quoted for bash; characters that a terminal would obey, or that are no text, are escaped."""
    if word.isprintable():
        return shlex.quote(word)
    special = {"\\": "\\\\", "'": "\\'"}
    characters = (
        special.get(one) or (one if one.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(one)))
        for one in word
    )
    return f"$'{''.join(characters)}'"


def _shortened(words: Sequence[str]) -> list[str]:
    """``python /path/to/storymem-render ...`` without the interpreter, and without the path where ``PATH`` finds it."""
    if len(words) > 1 and Path(words[0]).name.startswith("python"):
        program = Path(words[1]).name
        if program in ("storymem-render", "torchrun", "accelerate"):
            found, used = shutil.which(program), Path(words[1])
            is_usual = found is not None and used.exists() and used.samefile(found)
            return [program if is_usual else words[1], *words[2:]]
    return list(words)


def _command_of(process_id: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{process_id}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []
