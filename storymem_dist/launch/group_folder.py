"""What a launcher and the ranks it started tell each other: small files in a folder of their own.

    job.json             what to render: written by the launcher, read by every rank
    error.json           a user's mistake or a broken machine, found by some rank: no restart will help
    rank-<R>.json        how rank R ended
    STOP                 made by the launcher when it is told to stop

Files, because after a restart nothing else is left (torchrun's store is empty then), and because torchrun turns every
exit code of a rank into 1. Knows nothing of what is rendered.
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
        """Say what is to be rendered: plain values."""
        (self.root / "job.json").write_text(json.dumps(job))

    def read_job(self) -> dict[str, Any]:
        """What is to be rendered."""
        job: dict[str, Any] = read_json(self.root / "job.json")
        return job

    def report_error(self, error: StoryMemError, rank: int) -> None:
        """Say why this group cannot go on. The first rank that does so is heard."""
        told = {"exit_code": error.exit_code, "message": str(error), "rank": rank}
        create_exclusively(self.root / "error.json", canonical_json(told))

    def error(self) -> RankError | None:
        """The error that some rank reported, if one did."""
        try:
            told = read_json(self.root / "error.json")
        except FileNotFoundError:
            return None
        return RankError(str(told["message"]), int(told["exit_code"]))

    def write_end(self, rank: int, exit_code: int) -> None:
        """Say how this rank ended."""
        write_bytes(self.root / f"rank-{rank}.json", canonical_json({"exit_code": exit_code}))

    def exit_code(self) -> int:
        """The highest exit code of all ranks that ended."""
        ended = [name for name in names_in(self.root) if name.startswith("rank-") and name.endswith(".json")]
        return max((int(read_json(self.root / name)["exit_code"]) for name in ended), default=0)
