"""Messages between a launcher and the ranks it started: small files in a private folder.

    owner.json           the launcher: its process, and on which start of which machine
    job.json             what to render: written by the launcher, read by every rank
    error.json           the first error of a rank that no restart can cure: a user's mistake or a broken machine
    rank-<R>.json        the exit code of rank R
    STOP                 made by the launcher when it is asked to stop, and by a rank whose machine fails
    logs/                torch's own files

Files survive a restart, when torchrun's store is empty, and keep exit codes, which torchrun turns into 1. Knows nothing
of what is rendered.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.errors import MachineError, StoryMemError
from storymem_dist.files import canonical_json, create_exclusively, names_in, read_json, write_bytes
from storymem_dist.hardware import boot_id, pid_namespace, process_start

_PREFIX = "storymem-ranks-"


class RankError(StoryMemError):
    """An error that a rank reported; ``exit_code`` is that of the error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class GroupFolder:
    """The folder of one group of ranks on one node."""

    root: Path

    @classmethod
    @contextlib.contextmanager
    def of_this_process(cls) -> Iterator["GroupFolder"]:
        """Make a folder in the temporary folder for as long as the body runs; remove those of dead launchers.

        Raises ``OSError`` when it cannot be made.
        """
        remove_dead_folders(Path(tempfile.gettempdir()))
        with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
            folder = cls(Path(name))
            write_bytes(folder.root / "owner.json", canonical_json(_this_process()))
            yield folder

    def launcher(self) -> int | None:
        """Return the launcher's process id, None where it is not known."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(read_json(self.root / "owner.json")["pid"])
        return None

    @property
    def stop_file(self) -> Path:
        """The file that asks this group to stop."""
        return self.root / "STOP"

    def ask_to_stop(self, reason: str) -> None:
        """Make the stop file with ``reason`` in it, the name of a signal; empty on a full disk."""
        try:
            create_exclusively(self.stop_file, reason.encode(), durable=False)
        except OSError:
            self.stop_file.touch()

    def write_job(self, job: Mapping[str, Any]) -> None:
        """Write the job, as plain values."""
        write_bytes(self.root / "job.json", json.dumps(job).encode(), durable=False)

    def read_job(self) -> dict[str, Any]:
        """Return the job."""
        job: dict[str, Any] = read_json(self.root / "job.json")
        return job

    def report_error(self, error: StoryMemError, rank: int) -> None:
        """Write why this group cannot continue. Only the error of the first rank is kept."""
        report = {"exit_code": error.exit_code, "message": str(error), "rank": rank, "type": type(error).__name__}
        create_exclusively(self.root / "error.json", canonical_json(report))

    def error(self) -> StoryMemError | None:
        """Return the error that a rank reported, or None: ``MachineError`` for a fault of the machine."""
        try:
            report = read_json(self.root / "error.json")
        except FileNotFoundError:
            return None
        if report["type"] == MachineError.__name__:
            return MachineError(report["message"])
        return RankError(str(report["message"]), int(report["exit_code"]))

    def write_end(self, rank: int, exit_code: int) -> None:
        """Write the exit code of this rank."""
        write_bytes(self.root / f"rank-{rank}.json", canonical_json({"exit_code": exit_code}))

    def exit_code(self) -> int:
        """Return the highest exit code of all ranks that ended."""
        ended = [name for name in names_in(self.root) if name.startswith("rank-") and name.endswith(".json")]
        return max((int(read_json(self.root / name)["exit_code"]) for name in ended), default=0)


def remove_dead_folders(parent: Path) -> None:
    """Remove the group folders in ``parent`` whose launcher has surely ended. Never raises.

    Sure means: on this start of this machine, in this process namespace, by this user. All others stay.
    """
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
                    continue
                owner, here = read_json(folder / "owner.json"), _this_process()
                same = all(here[name] and owner[name] == here[name] for name in ("boot_id", "pid_namespace"))
                if same and owner["pid_start"] and process_start(int(owner["pid"])) != owner["pid_start"]:
                    shutil.rmtree(folder, ignore_errors=True)


def _this_process() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "pid_start": process_start(os.getpid()) or "",
        "boot_id": boot_id(),
        "pid_namespace": pid_namespace(),
    }
