"""The event files of a run folder: one writer appends, any number of readers follow.

``JournalWriter`` appends one line per event, with one ``write`` call, to a file that has no other writer: a killed
process loses no event that was notified, and shared file systems mix no lines. ``read_journal`` reads all files at
once; ``JournalTail`` returns what is new since its last call. A job of very many replicas divides its files among
folders.

Knows files and the JSON lines of ``events``; nothing of threads, terminals or services.
"""

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from storymem_dist.artifacts.sharding import shard_of
from storymem_dist.events import Event, StampedEvent, stamped_from_json, stamped_to_json
from storymem_dist.files import names_in, open_regular, resolve_inside

MAX_PENDING_BYTES = 64 * 2**20
"""Bytes kept in memory while the disk refuses writes (about 300,000 events)."""

MOST_REPLICAS = 512
"""Replicas of a job, with a file for each of their ranks, whose event files lie in one folder."""

FOLLOWED_FILES, FILES_PER_SECOND = 128, 50
"""Files that a follower looks at in one call at least, and in a second where there are more."""

MAX_READ_BYTES = 2 * 2**30
"""Bytes that a reader takes from all event files of a folder together (about ten million events)."""

_READ_AT_ONCE = 16 * 2**20  # bytes of one file
_SHARD = re.compile(r"[0-9a-f]{2}")


def new_writer_id(replica: int, *, rank: int | None = None, suffix: str = "") -> str:
    """Return a name for an event file that no other process uses, now or after a restart; safe as a file name.

    It sorts by start time: ``20260101T120000-node7-r3-4711-9f2c`` (UTC, host, replica, process, four random digits).
    ``rank`` (of a rank that is not a leader) and ``suffix`` describe the writer to people.
    """
    host = "".join(c if c.isalnum() else "_" for c in socket.gethostname().split(".")[0])[:32]
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    what = (f"-rank{rank}" if rank is not None else "") + (f"-{suffix}" if suffix else "")
    return f"{started}-{host}-r{replica}{what}-{os.getpid()}-{secrets.token_hex(2)}"


def journal_folder(folder: Path, writer: str, num_replicas: int) -> Path:
    """Return where a writer of a job of ``num_replicas`` puts its file: in ``folder``, or in one of 256 inside."""
    return folder / shard_of(writer) if num_replicas > MOST_REPLICAS else folder


class JournalWriter:
    """Appends events to ``folder/<writer>.jsonl``.

    A full or missing disk does not raise: lines wait in memory and are written with the next event, in order. Not
    thread-safe: the fan-out holds its lock around ``write``.
    """

    def __init__(self, folder: Path, writer: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{writer}.jsonl"
        self.num_lost = 0
        self.last_error: OSError | None = None
        self._pending = bytearray()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o666)

    def write(self, stamped: StampedEvent) -> None:
        """Append one line. Never raises because of the file system; ``last_error`` is None after success."""
        line = stamped_to_json(stamped).encode() + b"\n"
        if len(self._pending) + len(line) > MAX_PENDING_BYTES:
            self.num_lost += 1
            return
        self._pending += line
        self.flush()

    def flush(self) -> None:
        """Pass all waiting lines to the operating system, as far as it accepts them."""
        try:
            while self._pending:
                written = os.write(self._descriptor, self._pending)
                del self._pending[:written]
            self.last_error = None
        except OSError as error:
            self.last_error = error

    def close(self) -> None:
        """Write waiting lines, fsync and close the file. Calling it again does nothing."""
        if self._descriptor < 0:
            return
        self.flush()
        with contextlib.suppress(OSError):
            os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1


class JournalTail:
    """Follows all event files of a run's folder ``events``. Only regular files inside the run folder are read.

    ``offsets`` maps file names to the bytes already returned: save them and pass them in again to continue after a
    restart. ``skip`` names writers whose files are not read. A last line without its newline is left for later (its
    writer is still writing it, or was killed); a complete line that is no event is counted in ``num_unreadable``. After
    ``MAX_READ_BYTES`` nothing more is read. ``only``: events of other kinds are left out, most of them unparsed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        offsets: Mapping[str, int] | None = None,
        skip: tuple[str, ...] = (),
        only: Collection[type[Event]] = (),
    ) -> None:
        self.folder = folder
        self.offsets: dict[str, int] = dict(offsets or {})
        self.num_unreadable = 0
        self._skip = {f"{writer}.jsonl" for writer in skip}
        self._left: list[Path] = []  # files that a follower has not looked at in this round
        self._last_look: float | None = None
        self._only = tuple(only)
        names = "|".join(kind.__name__ for kind in only)
        self._wanted = re.compile(rf'"event":\s*"(?:{names})"'.encode()) if names else None

    def poll(self, max_bytes: int = _READ_AT_ONCE) -> list[StampedEvent]:
        """Return events that are new since the last call, ordered by wall time within the call.

        At most about ``max_bytes`` are read at once per file, so that catching up with a long run stays responsive;
        call again until the list is empty. Files that cannot be read are retried by the next call.
        """
        events: list[StampedEvent] = []
        num_read = -1
        while not events and num_read != sum(self.offsets.values()):  # a part without a single event is passed over
            num_read = sum(self.offsets.values())
            events = self._new_in(self._files(), max_bytes)
        return events

    def follow(self) -> list[StampedEvent]:
        """Return what ``poll`` does; where there are many files, of a part of them, in turn. The first call reads all.

        So the rate of looks is bounded for any number of writers.
        """
        last_look, self._last_look = self._last_look, time.monotonic()
        if last_look is None:
            return self.poll()
        if not self._left:
            self._left = self._files()[::-1]
        count = max(FOLLOWED_FILES, int(FILES_PER_SECOND * (self._last_look - last_look)))
        looked = [self._left.pop() for _ in range(min(count, len(self._left)))]
        return self._new_in(looked, _READ_AT_ONCE)

    def _new_in(self, files: Iterable[Path], max_bytes: int) -> list[StampedEvent]:
        events = [event for path in files for event in self._read_new(path, max_bytes)]
        events.sort(key=lambda stamped: (stamped.wall_time, stamped.writer, stamped.sequence))
        return events

    def _files(self) -> list[Path]:
        """All files, those of jobs of very many replicas in folders."""
        found: list[Path] = []
        folders = [self.folder]
        while folders:
            folder, names = folders.pop(), list[str]()
            with contextlib.suppress(OSError):  # a link that leads nowhere, or a folder of somebody else
                names = names_in(folder)
            for name in names:
                if name.endswith(".jsonl") and name not in self._skip:
                    found.append(folder / name)
                elif folder == self.folder and _SHARD.fullmatch(name):
                    folders.append(folder / name)
        return sorted(found, key=lambda path: path.name)

    def _read_new(self, path: Path, max_bytes: int) -> Iterator[StampedEvent]:
        offset = self.offsets.get(path.name, 0)
        if sum(self.offsets.values()) > MAX_READ_BYTES:
            return
        try:
            with open_regular(resolve_inside(self.folder.parent, path.relative_to(self.folder.parent))) as file:
                file.seek(offset)
                data = file.read(max_bytes)
        except OSError:
            return
        complete = data[: data.rfind(b"\n") + 1]
        if not complete and len(data) == max_bytes:  # no event is that long: whatever this is, read on behind it
            complete = data + b"\n"
            offset -= 1
        self.offsets[path.name] = offset + len(complete)
        for line in complete.split(b"\n")[:-1]:
            if self._wanted is not None and self._wanted.search(line) is None:
                continue
            try:
                stamped = stamped_from_json(line)
            except ValueError:
                self.num_unreadable += 1
                continue
            if not self._only or isinstance(stamped.event, self._only):
                yield stamped


def read_journal(source: Path | JournalTail) -> list[StampedEvent]:
    """Return all events of all writers in a folder, ordered by wall time (within a writer: as written).

    A ``JournalTail`` at its beginning also counts what was unreadable.
    """
    tail = source if isinstance(source, JournalTail) else JournalTail(source)
    events: list[StampedEvent] = []
    while new := tail.poll():
        events.extend(new)
    events.sort(key=lambda stamped: stamped.wall_time)
    return events
