"""Messages between a launcher and the ranks it started: small files in a private folder.

    job.json             what to render: written by the launcher, read by every rank
    error.json           the first error of a rank that no restart can cure: a user's mistake or a broken machine
    rank-<R>.json        the exit code of rank R
    STOP                 made by the launcher when it is asked to stop

Files survive a restart, when torchrun's store is empty, and keep exit codes, which torchrun turns into 1. Knows nothing
of what is rendered.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.errors import StoryMemError
from storymem_dist.files import canonical_json, create_exclusively, names_in, read_json, write_bytes


class RankError(StoryMemError):
    """An error that a rank reported; ``exit_code`` is that of the error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class GroupFolder:
    """The folder of one group of ranks on one node."""

    root: Path

    @property
    def stop_file(self) -> Path:
        """The file that asks this group to stop."""
        return self.root / "STOP"

    def write_job(self, job: Mapping[str, Any]) -> None:
        """Write the job, as plain values."""
        (self.root / "job.json").write_text(json.dumps(job))

    def read_job(self) -> dict[str, Any]:
        """Return the job."""
        job: dict[str, Any] = read_json(self.root / "job.json")
        return job

    def report_error(self, error: StoryMemError, rank: int) -> None:
        """Write why this group cannot continue. Only the error of the first rank is kept."""
        report = {"exit_code": error.exit_code, "message": str(error), "rank": rank}
        create_exclusively(self.root / "error.json", canonical_json(report))

    def error(self) -> RankError | None:
        """Return the error that a rank reported, or None."""
        try:
            report = read_json(self.root / "error.json")
        except FileNotFoundError:
            return None
        return RankError(str(report["message"]), int(report["exit_code"]))

    def write_end(self, rank: int, exit_code: int) -> None:
        """Write the exit code of this rank."""
        write_bytes(self.root / f"rank-{rank}.json", canonical_json({"exit_code": exit_code}))

    def exit_code(self) -> int:
        """Return the highest exit code of all ranks that ended."""
        ended = [name for name in names_in(self.root) if name.startswith("rank-") and name.endswith(".json")]
        return max((int(read_json(self.root / name)["exit_code"]) for name in ended), default=0)
