"""Durable file operations: write beside, flush to the disk, rename; publish under a name that must be free.

Every file of a run folder is made by one of these functions, so that a process killed between any two of them leaves
either the old file or the new one, and a half-written file only under a temporary name. Safe on NFS: nothing here
relies on locks, only on ``link`` and ``rename`` being atomic on the server.

Knows nothing of what the files hold.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
"""How the name of every half-made file begins. Such files are never read."""


def temporary_beside(path: Path) -> Path:
    """Return a fresh temporary name in the folder of ``path`` (same file system, so that a rename is atomic)."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{path.name[-80:]}")


def fsync_file(path: Path) -> None:
    """Flush the contents of a finished file to the disk. Raises ``OSError`` when the disk reports a failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries. Best effort: some network file systems refuse it, and their server does it itself."""
    with contextlib.suppress(OSError):
        fsync_file(path)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is flushed and becomes ``path``, on failure it is removed.

    The folder's entry is not flushed: who writes several files does that once, with ``fsync_folder``.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically and durably."""
    with written_beside(path) as temporary:
        temporary.write_bytes(data)
    fsync_folder(path.parent)


def publish_exclusively(source: Path, path: Path) -> bool:
    """Give the finished file ``source`` the second name ``path`` unless that name is taken; say whether it worked.

    The heart of "committed exactly once": of any number of processes, on any number of machines, one gets True. A hard
    link that an NFS server made but whose answer was lost (it then reports "exists") still counts as made.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        try:
            return os.path.samestat(source.stat(), path.stat())
        except FileNotFoundError:
            return False
    fsync_folder(path.parent)
    return True


def create_exclusively(path: Path, data: bytes, *, durable: bool = True) -> bool:
    """Create ``path`` holding ``data`` unless it is there; say whether it worked. Readers never see it half-written."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(data)
        if durable:
            fsync_file(temporary)
        return publish_exclusively(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_or_replace(source: Path, path: Path) -> None:
    """Make ``path`` a hard link to ``source``, replacing another file of that name atomically. Does nothing when it is.

    (Renaming one hard link over another of the same file does nothing and leaves both: that case is taken out first.)
    """
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(source.stat(), path.stat()):
            return
    temporary = temporary_beside(path)
    os.link(source, temporary)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of ``value``: keys sorted, two spaces, UTF-8, no NaN, a final newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises ``OSError`` when it cannot be read and ``ValueError`` when it is not JSON."""
    return json.loads(path.read_bytes())


def temporaries_in(folder: Path, name: str = "*") -> list[Path]:
    """Return the half-made files for ``name`` in ``folder``: of processes that are writing, or that died doing so."""
    return list(folder.glob(f"{TEMPORARY_PREFIX}*-{name}"))


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in ``folder`` without hidden and temporary ones; a missing folder is empty."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def json_ready(value: Any) -> Any:
    """Return ``value`` as JSON types: mappings, tuples and lists converted, numbers that are not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [json_ready(item) for item in value]
    return str(value)


@contextmanager
def locked_folder(root: Path) -> Iterator[None]:
    """Hold an exclusive lock beside ``root`` (which need not exist); it goes away with the process, come what may."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_name(f".{root.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_folder(root: Path, fresh: Path) -> None:
    """Put ``fresh`` in the place of ``root``; an old one is moved away first, so no mixture is ever seen."""
    old = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    if root.exists():
        root.rename(old)
    fresh.rename(root)
    shutil.rmtree(old, ignore_errors=True)


_EDGE_BYTES = 256 * 1024


_SAMPLE_BYTES = 4096


_NUM_SAMPLES = 64


def file_identity(path: Path) -> str:
    """Hex digest of one file's size and samples of its content; at most 0.8 MB are read. Its name does not matter."""
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode())
    with path.open("rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        between = max(0, num_bytes - 2 * _EDGE_BYTES)
        for index in range(_NUM_SAMPLES if between else 0):
            file.seek(_EDGE_BYTES + between * index // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, num_bytes - _EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def folder_identity(root: Path, files: Iterable[Path]) -> str:
    """Hex digest over the identities of ``files`` and their names relative to ``root``, in any order."""
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(f"{path.relative_to(root).as_posix()} {file_identity(path)}\n".encode())
    return digest.hexdigest()
