"""Leases and heartbeats as files in a shared folder, safe on network file systems.

    leases/<owner>.alive                     heartbeat: a counter, rewritten in place a few times per lease time
    leases/<owner>.dead                      the ``.alive`` file, renamed once a peer finds its owner dead
    leases/<key>.<generation>.lease          made by an exclusive hard link; names its owner, counts deaths before it
    leases/<key>.<generation>.stopping       made when its holder is asked to stop: its death then does not count
    leases/<key>.<generation>.*.helping      see ``helping``

Correctness rests on two operations that file servers do atomically: exclusive ``link``, and ``unlink``. It needs no
locks and no clocks of other machines: an owner counts as dead when its counter has stood still for ``lease_seconds`` on
the *observer's* monotonic clock, or at once when its process is known to be gone (same boot of the same machine).

To take over a dead owner's lease, a process makes the next generation; only one process succeeds. No process removes or
renames the lease of a living peer. The holder of a key is the owner of its highest generation; lower generations stay
until the key is released. An owner that resumes after a long pause finds the higher one, and gives up.

Knows keys, owners and files; nothing of shots.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from storymem_dist.dispatch.helping import marks_of_helpers
from storymem_dist.dispatch.owners import Owner, owner_json, owner_of, read_alive, read_owner
from storymem_dist.files import canonical_json, create_exclusively, names_in, read_json

WORKING = "working"
WAITING = "waiting"
HEARTBEATS_PER_LEASE = 6

_LEASE_NAME = re.compile(r"(?P<key>.+)\.(?P<generation>\d+)\.lease")
_FILE_OF_A_LEASE = re.compile(r"(?P<key>.+)\.\d+\.(lease|stopping|\d+\.helping)")
_ALIVE_SUFFIX = ".alive"
_DEAD_SUFFIX = ".dead"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A key that this process holds. ``generation``: number of earlier holders that lost it.

    ``num_deaths``: for how many of them a process that rendered the shot died without having been asked to stop.
    """

    key: str
    generation: int
    num_deaths: int = 0


@dataclass
class _Seen:
    """The value last read from an owner's file, and since when it is the same (seconds on the folder's clock)."""

    value: str
    since: float


@dataclass(kw_only=True)
class LeaseFolder:
    """Leases in one folder, for one owner. Between ``start`` and ``close`` a daemon thread writes heartbeats.

    Threads may claim, check and release different keys at once. ``clock`` is monotonic, in seconds. ``alive_names``:
    heartbeat files at the last ``scan``, ``num_alive`` of them.
    """

    folder: Path
    owner: Owner
    lease_seconds: float
    clock: Callable[[], float] = time.monotonic
    num_alive: int = field(default=0, init=False)
    alive_names: list[str] = field(default_factory=list, init=False)
    _held: dict[str, Lease] = field(default_factory=dict, init=False)
    _seen: dict[str, _Seen] = field(default_factory=dict, init=False)
    _moved: set[str] = field(default_factory=set, init=False)
    _state: str = field(default=WAITING, init=False)
    _counter: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _closing: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    # -- heartbeat -----------------------------------------------------------------------------------------------------

    def start(self, state: str = WORKING) -> None:
        """Write the first heartbeat and start the thread. Raises ``OSError`` when the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._state = state
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="lease-heartbeat", daemon=True)
        self._thread.start()

    def set_state(self, state: str) -> None:
        """Publish ``working`` or ``waiting`` with a heartbeat now. Raises ``OSError``."""
        self._state = state
        self._beat()

    def close(self, *, release: bool = True) -> None:
        """Release all held keys and remove the heartbeat file. Never raises.

        With ``release=False`` (after a crash) the leases stay, so that the next holders count this death.
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
        """Claim ``key`` if it is free or its holder is dead; None when a living owner holds it or claimed it faster.

        ``known_generation`` is the generation of the key in the last ``scan`` (None: free). Raises ``OSError`` when the
        folder cannot be written.
        """
        if known_generation is None:
            return self._make(key, 0)
        if not self.holder_is_dead(key, known_generation):
            return None
        return self._make(key, known_generation + 1)

    def is_held(self, lease: Lease) -> bool:
        """Whether this process still holds ``lease``: its file is there and no higher generation is.

        True while the folder cannot be read: a second holder does no harm, because publishing is exclusive.
        """
        try:
            if self._lease_path(lease.key, lease.generation + 1).exists():
                return False
            owner = owner_of(read_json(self._lease_path(lease.key, lease.generation)))
        except (FileNotFoundError, ValueError):
            return False
        except OSError:
            return True
        return owner is not None and owner.owner_id == self.owner.owner_id

    def release(self, lease: Lease) -> None:
        """Release ``lease``. Never raises: a lease file that cannot be removed expires."""
        if self._held.pop(lease.key, None) is None:
            return  # released before
        with contextlib.suppress(OSError):
            if self.is_held(lease):
                for mark in marks_of_helpers(self.folder, lease.key) if lease.generation else ():
                    mark.unlink(missing_ok=True)
                for generation in range(lease.generation + 1):  # its own last: until then the key is taken
                    self._stopping_path(lease.key, generation).unlink(missing_ok=True)
                    self._lease_path(lease.key, generation).unlink(missing_ok=True)

    def note_stopping(self) -> None:
        """Note at all held leases that this process was asked to stop: if it is killed, no death is counted.

        Never raises; any thread may call it.
        """
        for lease in list(self._held.values()):
            with contextlib.suppress(OSError):
                self._stopping_path(lease.key, lease.generation).touch()
                if lease.key not in self._held:  # released meanwhile
                    self._stopping_path(lease.key, lease.generation).unlink(missing_ok=True)

    # -- other owners --------------------------------------------------------------------------------------------------

    def scan(self) -> dict[str, int]:
        """Return all leased keys (their holders may be dead) with their highest generation. Lists the folder once."""
        keys: dict[str, int] = {}
        names = names_in(self.folder)
        self.alive_names = [name for name in names if name.endswith(_ALIVE_SUFFIX)]
        self.num_alive = len(self.alive_names)
        for name in names:
            match = _LEASE_NAME.fullmatch(name)
            if match:
                keys[match["key"]] = max(keys.get(match["key"], 0), int(match["generation"]))
        return keys

    def generation_of(self, key: str) -> int | None:
        """Return the highest generation of one key, or None when it is free. Does not list the folder."""
        generation = 0
        while self._lease_path(key, generation).exists():
            generation += 1
        return generation - 1 if generation else None

    def holder_is_dead(self, key: str, generation: int) -> bool:
        """Whether the owner's heartbeat has stood still for ``lease_seconds``, or its process is certainly gone.

        The first call starts the time, so it never declares an owner dead for its silence.
        """
        path = self._lease_path(key, generation)
        owner = read_owner(path)
        if owner is None:  # just released, or damaged: a damaged lease expires like any other
            return self._stands_still(str(path), "")
        if owner.owner_id == self.owner.owner_id:  # its own, held or left because it could not be removed
            return key not in self._held
        return owner.is_known_dead() or self.is_silent(owner)

    def is_silent(self, owner: Owner) -> bool:
        """Whether ``owner``'s counter has stood still for ``lease_seconds`` since this process first read its value.

        Also if another process has found that, and marked it.
        """
        heartbeat = self._heartbeat_of(owner.owner_id)
        return self._stands_still(owner.owner_id, heartbeat) or (
            not heartbeat and (self.folder / f"{owner.owner_id}{_DEAD_SUFFIX}").exists()
        )

    def others_working(self) -> list[Owner]:
        """Return the owners of other jobs whose state is ``working`` and that are neither dead nor silent."""
        others = []
        for name in names_in(self.folder):
            if name.endswith(_ALIVE_SUFFIX):
                owner, state, _ = read_alive(self.folder / name)
                foreign = owner is not None and owner.job_id != self.owner.job_id
                if owner and foreign and state == WORKING and not owner.is_known_dead() and not self.is_silent(owner):
                    others.append(owner)
        return others

    def has_peers(self) -> bool:
        """Whether another process of this owner's job has a heartbeat file and is not known to be dead."""
        for name in names_in(self.folder):
            owner = read_alive(self.folder / name)[0] if name.endswith(_ALIVE_SUFFIX) else None
            is_peer = owner is not None and owner.job_id == self.owner.job_id and owner.owner_id != self.owner.owner_id
            if owner is not None and is_peer and not owner.is_known_dead():
                return True
        return False

    def surely_working(self, owners: list[Owner]) -> Owner | None:
        """Return one of ``owners`` that is certainly alive (it runs on this machine, or its counter moved), or None."""
        return next((owner for owner in owners if owner.is_known_alive() or owner.owner_id in self._moved), None)

    def mark_dead_owners(self, names: Iterable[str] | None = None) -> None:
        """Rename the ``.alive`` file of each dead owner to ``.dead``: certainly gone, or silent and not known to run.

        ``names``: of the files to look at; all, if None. Leases of dead owners expire as before. An unreadable file is
        being written or is damaged; it is renamed if it stays unreadable for ``lease_seconds``. An owner that is alive
        after all writes its file again.
        """
        own = self._alive_path(self.owner.owner_id).name
        for name in names_in(self.folder) if names is None else names:
            if name.endswith(_ALIVE_SUFFIX) and name != own and self._is_of_dead_owner(name):
                with contextlib.suppress(OSError):
                    (self.folder / name).rename(self.folder / (name.removesuffix(_ALIVE_SUFFIX) + _DEAD_SUFFIX))

    def dead_owners(self) -> list[Path]:
        """Return the ``.dead`` files; delete them once their owners' leftovers are cleaned up."""
        return [self.folder / name for name in names_in(self.folder) if name.endswith(_DEAD_SUFFIX)]

    def count_alive(self) -> int:
        """Return how many owners have a heartbeat file."""
        return sum(name.endswith(_ALIVE_SUFFIX) for name in names_in(self.folder))

    def is_alone(self) -> bool:
        """Whether no other owner has a heartbeat file."""
        own = self._alive_path(self.owner.owner_id).name
        return not any(name.endswith(_ALIVE_SUFFIX) and name != own for name in names_in(self.folder))

    def lease_files(self) -> dict[Path, str]:
        """Return the files of all leases, of any owner, with their keys."""
        matches = [(name, _FILE_OF_A_LEASE.fullmatch(name)) for name in names_in(self.folder)]
        return {self.folder / name: match["key"] for name, match in matches if match}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_of_dead_owner(self, name: str) -> bool:
        owner, _, heartbeat = read_alive(self.folder / name)
        if owner is None:
            return self._stands_still(name, "")
        return owner.is_known_dead() or (self._stands_still(owner.owner_id, heartbeat) and not owner.is_known_alive())

    def _make(self, key: str, generation: int) -> Lease | None:
        lease = Lease(key=key, generation=generation, num_deaths=self._deaths_before(key, generation))
        content = canonical_json({**owner_json(self.owner), "num_deaths": lease.num_deaths})
        if not create_exclusively(self._lease_path(key, generation), content, durable=False):
            return None
        self._held[key] = lease
        if not self.is_held(lease):  # the scan was outdated: another process has taken the key over since
            self.release(lease)
            return None
        return lease

    def _deaths_before(self, key: str, generation: int) -> int:
        """For how many of the generations below the holder, or one that helped it, died without being asked to stop."""
        if generation == 0:
            return 0
        try:
            before = int(read_json(self._lease_path(key, generation - 1))["num_deaths"])
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or of a version that did not count
            before = generation - 1
        was_asked = self._stopping_path(key, generation - 1).exists()
        return before + (not was_asked or bool(marks_of_helpers(self.folder, key, generation - 1)))

    def _lease_path(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}.lease"

    def _stopping_path(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}.stopping"

    def _alive_path(self, owner_id: str) -> Path:
        return self.folder / f"{owner_id}{_ALIVE_SUFFIX}"

    def _stands_still(self, name: str, value: str) -> bool:
        """Whether the value read under ``name`` has been the same for ``lease_seconds``."""
        now = self.clock()
        seen = self._seen.get(name)
        if seen is None or seen.value != value:
            if seen is not None:
                self._moved.add(name)
            self._seen[name] = _Seen(value, now)
            return False
        return now - seen.since >= self.lease_seconds

    def _heartbeat_of(self, owner_id: str) -> str:
        try:
            return str(read_json(self._alive_path(owner_id)))
        except (OSError, ValueError):
            return ""

    def _beat(self) -> None:
        """Rewrite the heartbeat in place: a reader that opens the file again sees it even on caching file systems."""
        with self._lock:
            self._counter += 1
            heartbeat = {"counter": f"{self._counter:012d}", "state": self._state, **owner_json(self.owner)}
            descriptor = os.open(self._alive_path(self.owner.owner_id), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                os.pwrite(descriptor, canonical_json(heartbeat), 0)  # always the same length: never torn or truncated
            finally:
                os.close(descriptor)

    def _keep_beating(self) -> None:
        while not self._closing.wait(self.lease_seconds / HEARTBEATS_PER_LEASE):
            with contextlib.suppress(OSError):  # a full or absent disk: peers rightly take the shot over
                self._beat()
