"""Which replicas work in a run folder, by the heartbeats that they leave there. Writes nothing.

A heartbeat file names the process that writes it (``dispatch/leases.py``). On the machine of that process its life is
known for certain; on others a file that was written lately is the sign of it, by the clock of this machine.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storymem_dist.files import UnsafePath, parse_json, read_limited
from storymem_dist.hardware import boot_id, pid_namespace, process_start
from storymem_dist.observe.run.files import RunFiles, parse_config

ALIVE_SECONDS = 120.0
"""A heartbeat that is younger is a sign of life, unless ``dispatch.lease_seconds`` of the job is longer."""

_MAX_BYTES = 2**14
_SUFFIX = ".alive"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningReplica:
    """A replica that works in a run folder, or waits for its turn (``is_working``: it has begun)."""

    job: str
    replica: int
    host: str
    is_working: bool


def running_replicas(root: Path, *, now: float | None = None) -> list[RunningReplica]:
    """Return the replicas that show a sign of life in the run folder ``root``, by job and number."""
    moment = time.time() if now is None else now
    folder, longest = root / "leases", _sign_seconds(root)
    found = []
    for path in _heartbeats(folder):
        with contextlib.suppress(OSError, UnsafePath, ValueError, KeyError, TypeError):
            written, value = path.stat().st_mtime, parse_json(read_limited(path, _MAX_BYTES).rstrip(b"\0"))
            known = _is_running(value)
            if known is None:
                known = moment - written < longest
            if known:
                replica = RunningReplica(
                    job=str(value["job_id"])[:200],
                    replica=int(value["replica"]),
                    host=str(value["host"])[:200],
                    is_working=value["state"] == "working",
                )
                found.append(replica)
    return sorted(found, key=lambda one: (one.job, one.replica))


def _heartbeats(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(path for path in folder.rglob(f"*{_SUFFIX}") if not path.name.startswith("."))


def _is_running(value: dict[str, object]) -> bool | None:
    """Whether the process exists; None where this machine cannot know: another one, or another container."""
    if not value["boot_id"] or (value["boot_id"], value["pid_namespace"]) != (boot_id(), pid_namespace()):
        return None
    return process_start(int(str(value["pid"]))) == value["pid_start"]


def _sign_seconds(root: Path) -> float:
    dispatch = parse_config(RunFiles(root).newest_config()[1]).get("dispatch")
    lease = dispatch.get("lease_seconds") if isinstance(dispatch, dict) else None
    is_number = isinstance(lease, int | float) and not isinstance(lease, bool) and lease == lease
    return max(ALIVE_SECONDS, float(lease)) if is_number else ALIVE_SECONDS  # type: ignore[arg-type]
