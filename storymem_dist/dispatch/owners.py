"""Who holds leases: one process, described so that others on its machine can check whether it still runs.

Knows files of leases and heartbeats as JSON; nothing of keys.
"""

import os
import re
import secrets
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from storymem_dist.files import read_json
from storymem_dist.hardware import boot_id, pid_namespace, process_start


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process that holds leases: one replica leader in one start.

    ``job_id`` is shared by all replicas and restarts of a job. With ``boot_id``, ``pid_namespace``, ``pid`` and
    ``pid_start`` (empty where unknown), another process on the same machine can check whether this one still runs.
    """

    owner_id: str
    job_id: str
    replica: int
    host: str
    pid: int
    boot_id: str
    pid_namespace: str
    pid_start: str

    @classmethod
    def this_process(cls, job_id: str = "", replica: int = 0) -> "Owner":
        """Describe the running process under a fresh owner id, which also names its job when ``job_id`` is empty."""
        host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:24] or "host"
        owner_id = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        return cls(
            owner_id=owner_id,
            job_id=job_id or owner_id,
            replica=replica,
            host=host,
            pid=os.getpid(),
            boot_id=boot_id(),
            pid_namespace=pid_namespace(),
            pid_start=process_start(os.getpid()) or "",
        )

    def is_known_dead(self) -> bool:
        """Whether this owner's process is certainly gone. False where this process cannot know (another machine)."""
        return self._is_of_this_machine() and process_start(self.pid) != self.pid_start

    def is_known_alive(self) -> bool:
        """Whether this owner's process certainly exists (perhaps paused). False where this process cannot know."""
        return self._is_of_this_machine() and process_start(self.pid) == self.pid_start

    def _is_of_this_machine(self) -> bool:
        known = bool(self.boot_id and self.pid_start)
        return known and (self.boot_id, self.pid_namespace) == (boot_id(), pid_namespace())


def owner_json(owner: Owner) -> dict[str, object]:
    """Return an owner as JSON."""
    return {name: getattr(owner, name) for name in Owner.__dataclass_fields__}


def read_owner(path: Path) -> Owner | None:
    """Return the owner that a lease names; None where there is none or it is damaged."""
    try:
        return owner_of(read_json(path))
    except (OSError, ValueError):
        return None


def owner_of(value: Any) -> Owner | None:
    """Return the owner in parsed JSON of any origin, if there is one."""
    try:
        owner = Owner(**{name: value[name] for name in Owner.__dataclass_fields__})
    except (KeyError, TypeError):
        return None
    is_typed = all(type(getattr(owner, one.name)) is one.type for one in fields(Owner))
    return owner if is_typed and "/" not in owner.owner_id else None


def read_alive(path: Path) -> tuple[Owner | None, str, str]:
    """Return owner, state and text of a heartbeat; None and "" where there is none, or it is being written."""
    try:
        value = read_json(path)
        return owner_of(value), str(value["state"]), str(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None, "", ""
