"""Who is alive and who renders what: lease files in a shared folder, safe on network file systems.

    leases/<owner>.alive                     rewritten in place a few times per lease time: a counter that goes up
    leases/<owner>.dead                      what becomes of it when others find that its owner died, until they swept
    leases/<key>.<generation>.lease          made by an exclusive hard link; names its owner

The only operations relied on are ones that file servers do atomically: an exclusive ``link`` and ``unlink``. No locks,
no clocks of other machines: an owner is taken for dead when its counter has stood still for ``lease_seconds`` on the
*observer's* monotonic clock, or at once when its process is known to be gone (same boot of the same machine).

Taking over a dead owner's lease means making the next generation, which one process can; nobody removes or renames the
lease of another. The holder of a key is the owner of its highest generation; the lower ones stay until it is released.
An owner that was paused and wakes late finds the higher generation (``is_held``) and gives up. The generation says how
many holders of the key died.

Knows keys, owners and files; nothing of shots.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from storymem_dist.files import canonical_json, create_exclusively, names_in

WORKING = "working"
WAITING = "waiting"
HEARTBEATS_PER_LEASE = 6

_LEASE_NAME = re.compile(r"(?P<key>.+)\.(?P<generation>\d+)\.lease")
_ALIVE_SUFFIX = ".alive"
_DEAD_SUFFIX = ".dead"


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process that holds leases: one replica leader in one start.

    ``job_id`` is shared by all replicas and restarts of a job. ``boot_id``, ``pid_namespace``, ``pid`` and
    ``pid_start`` tell, on the same machine, whether the process still runs; they are empty where unknown.
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
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid_start=_pid_start(os.getpid()) or "",
        )

    def is_known_dead(self) -> bool:
        """Whether this owner's process is surely gone. False where that cannot be told from here."""
        return self._is_of_this_machine() and _pid_start(self.pid) != self.pid_start

    def is_known_alive(self) -> bool:
        """Whether this owner's process surely runs (perhaps paused). False where that cannot be told from here."""
        return self._is_of_this_machine() and _pid_start(self.pid) == self.pid_start

    def _is_of_this_machine(self) -> bool:
        known = bool(self.boot_id and self.pid_start)
        return known and (self.boot_id, self.pid_namespace) == (_boot_id(), _pid_namespace())


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A key that this process holds. ``generation``: how many holders before it died."""

    key: str
    generation: int


@dataclass
class _Seen:
    """What was last seen of an owner, and since when (on this process's monotonic clock)."""

    sign: str
    since: float


@dataclass(kw_only=True)
class LeaseFolder:
    """Leases in one folder, for one owner. Between ``start`` and ``close`` a daemon thread shows signs of life.

    Different keys may be claimed, looked at and released by different threads at once.
    """

    folder: Path
    owner: Owner
    lease_seconds: float
    clock: Callable[[], float] = time.monotonic
    num_alive: int = field(default=0, init=False)
    _held: dict[str, Lease] = field(default_factory=dict, init=False)
    _seen: dict[str, _Seen] = field(default_factory=dict, init=False)
    _moved: set[str] = field(default_factory=set, init=False)
    _state: str = field(default=WAITING, init=False)
    _counter: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _closing: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    # -- being alive ---------------------------------------------------------------------------------------------------

    def start(self, state: str = WORKING) -> None:
        """Show the first sign of life and keep showing them. Raises ``OSError`` when the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._state = state
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="lease-heartbeat", daemon=True)
        self._thread.start()

    def set_state(self, state: str) -> None:
        """Say ``working`` or ``waiting`` from now on, at once visible to others."""
        self._state = state
        self._beat()

    def close(self, *, release: bool = True) -> None:
        """Release everything that is held and take the sign of life away. Never raises.

        With ``release=False`` (after a crash) leases stay behind: whoever takes one over knows that its holder died.
        """
        self._closing.set()
        if self._thread is None:
            return
        self._thread.join()
        if release:
            for lease in list(self._held.values()):
                self.release(lease)
        with contextlib.suppress(OSError):
            self._alive_path(self.owner.owner_id).unlink(missing_ok=True)

    # -- holding keys --------------------------------------------------------------------------------------------------

    def try_claim(self, key: str, known_generation: int | None = None) -> Lease | None:
        """Take ``key`` if nobody holds it, or if its holder is dead; None when a living owner (or a faster one) has it.

        ``known_generation`` is what the last ``scan`` said about the key (None: free). Raises ``OSError`` when the
        folder cannot be written.
        """
        if known_generation is None:
            return self._make(key, 0)
        if not self.holder_is_dead(key, known_generation):
            return None
        return self._make(key, known_generation + 1)

    def is_held(self, lease: Lease) -> bool:
        """Whether this process still is the holder: its lease is there and no higher generation is.

        A folder that cannot be read for the moment changes nothing: publishing is exclusive, whoever holds the lease.
        """
        try:
            if self._lease_path(lease.key, lease.generation + 1).exists():
                return False
            owner = _parse_owner(self._lease_path(lease.key, lease.generation).read_bytes())
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return owner is not None and owner.owner_id == self.owner.owner_id

    def release(self, lease: Lease) -> None:
        """Give ``lease`` back. Never raises: a lease that cannot be removed expires."""
        self._held.pop(lease.key, None)
        with contextlib.suppress(OSError):
            if self.is_held(lease):
                for generation in range(lease.generation + 1):  # its own last: till then the key is taken
                    self._lease_path(lease.key, generation).unlink(missing_ok=True)

    # -- looking at others ---------------------------------------------------------------------------------------------

    def scan(self) -> dict[str, int]:
        """Return all keys that somebody (perhaps dead) holds, with their highest generation. Lists the folder once.

        Counts the owners that show signs of life (or have not been missed yet) in ``num_alive``.
        """
        keys: dict[str, int] = {}
        names = names_in(self.folder)
        self.num_alive = sum(name.endswith(_ALIVE_SUFFIX) for name in names)
        for name in names:
            match = _LEASE_NAME.fullmatch(name)
            if match:
                keys[match["key"]] = max(keys.get(match["key"], 0), int(match["generation"]))
        return keys

    def generation_of(self, key: str) -> int | None:
        """Return the highest generation of one key, None when it is free, without listing the folder."""
        generation = 0
        while self._lease_path(key, generation).exists():
            generation += 1
        return generation - 1 if generation else None

    def holder_is_dead(self, key: str, generation: int) -> bool:
        """Whether the owner of this lease has shown no sign of life for ``lease_seconds``, or is surely gone.

        The first look starts the clock, so a living owner is never taken for dead at first sight.
        """
        path = self._lease_path(key, generation)
        owner = _read_owner(path)
        if owner is None:  # released in this moment, or damaged: then nobody renews it, and it expires like any other
            return self._stands_still(str(path), "")
        if owner.owner_id == self.owner.owner_id:  # one of its own that could not be removed
            return key not in self._held
        return owner.is_known_dead() or self.is_silent(owner)

    def is_silent(self, owner: Owner) -> bool:
        """Whether ``owner``'s counter has stood still for ``lease_seconds`` since this process first saw that value."""
        return self._stands_still(owner.owner_id, self._sign_of(owner.owner_id))

    def others_working(self) -> list[Owner]:
        """Return the owners of other jobs that say ``working`` and are not known to be dead."""
        others = []
        for name in names_in(self.folder):
            if name.endswith(_ALIVE_SUFFIX):
                owner, state = _read_alive(self.folder / name)
                foreign = owner is not None and owner.job_id != self.owner.job_id
                if owner and foreign and state == WORKING and not owner.is_known_dead() and not self.is_silent(owner):
                    others.append(owner)
        return others

    def surely_working(self, owners: list[Owner]) -> Owner | None:
        """Return one of ``owners`` that certainly lives: its process runs here, or its counter was seen to go up."""
        for owner in owners:
            if owner.is_known_alive() or owner.owner_id in self._moved:
                return owner
        return None

    def bury_dead_owners(self) -> None:
        """Note which owners are surely gone, or silent and perhaps gone: their signs of life become ``<owner>.dead``.

        Their leases expire as ever. A sign that cannot be read is one that is being made, or damaged: it goes when it
        stays so. Should an owner be alive after all, it makes its sign again.
        """
        for name in names_in(self.folder):
            if name.endswith(_ALIVE_SUFFIX):
                owner, _ = _read_alive(self.folder / name)
                if owner is None:
                    is_dead = self._stands_still(name, "")
                else:
                    is_dead = owner.is_known_dead() or (self.is_silent(owner) and not owner.is_known_alive())
                if is_dead:
                    with contextlib.suppress(OSError):
                        (self.folder / name).rename(self.folder / (name.removesuffix(_ALIVE_SUFFIX) + _DEAD_SUFFIX))

    def dead_owners(self) -> list[Path]:
        """Return the files that say who died. For who has removed what these left behind: remove them, too."""
        return [self.folder / name for name in names_in(self.folder) if name.endswith(_DEAD_SUFFIX)]

    def is_alone(self) -> bool:
        """Whether nobody else shows a sign of life, or has not been missed yet."""
        own = self._alive_path(self.owner.owner_id).name
        return not any(name.endswith(_ALIVE_SUFFIX) and name != own for name in names_in(self.folder))

    def lease_files(self) -> dict[Path, str]:
        """Return the files of all leases with their keys, whoever holds them."""
        matches = [(name, _LEASE_NAME.fullmatch(name)) for name in names_in(self.folder)]
        return {self.folder / name: match["key"] for name, match in matches if match}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _make(self, key: str, generation: int) -> Lease | None:
        lease = Lease(key=key, generation=generation)
        owner = canonical_json(_owner_json(self.owner))
        if not create_exclusively(self._lease_path(key, generation), owner, durable=False):
            return None
        self._held[key] = lease
        if not self.is_held(lease):  # the scan was out of date: somebody has taken it over since
            self.release(lease)
            return None
        return lease

    def _lease_path(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}.lease"

    def _alive_path(self, owner_id: str) -> Path:
        return self.folder / f"{owner_id}{_ALIVE_SUFFIX}"

    def _stands_still(self, who: str, sign: str) -> bool:
        now = self.clock()
        seen = self._seen.get(who)
        if seen is None or seen.sign != sign:
            if seen is not None:
                self._moved.add(who)
            self._seen[who] = _Seen(sign, now)
            return False
        return now - seen.since >= self.lease_seconds

    def _sign_of(self, owner_id: str) -> str:
        try:
            return self._alive_path(owner_id).read_text()
        except OSError:
            return ""

    def _beat(self) -> None:
        """Rewrite the sign of life in place: opening a file again shows its contents even on caching file systems."""
        with self._lock:
            self._counter += 1
            sign = {"counter": f"{self._counter:012d}", "state": self._state, **_owner_json(self.owner)}
            descriptor = os.open(self._alive_path(self.owner.owner_id), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, canonical_json(sign), 0)  # always the same length: never torn, never truncated
            finally:
                os.close(descriptor)

    def _keep_beating(self) -> None:
        while not self._closing.wait(self.lease_seconds / HEARTBEATS_PER_LEASE):
            with contextlib.suppress(OSError):  # a full or absent disk: others take the shot over, which is right
                self._beat()


def _owner_json(owner: Owner) -> dict[str, object]:
    return {name: getattr(owner, name) for name in Owner.__dataclass_fields__}


def _read_owner(path: Path) -> Owner | None:
    try:
        return _parse_owner(path.read_bytes())
    except OSError:
        return None


def _parse_owner(data: bytes) -> Owner | None:
    try:
        value = json.loads(data)
        return Owner(**{name: value[name] for name in Owner.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return None


def _read_alive(path: Path) -> tuple[Owner | None, str]:
    try:
        value = json.loads(path.read_bytes())
        return Owner(**{name: value[name] for name in Owner.__dataclass_fields__}), str(value["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _pid_start(pid: int) -> str | None:
    """Start time of a running process in clock ticks since boot; None when it is gone or only a zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]
