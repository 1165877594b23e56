"""Durable file operations: write a temporary file, flush it, rename it; publish under a name that must be free.

Every file of a run folder is written by these functions. A process that is killed at any moment leaves either the old
file or the new one; a half-written file only has a temporary name. This is safe on NFS: it relies on ``link`` and
``rename`` being atomic on the server, not on locks. (Only folders of weights are locked.)

Also computes the identity of large files. Knows nothing of their contents.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the name of every half-written file. Such files are never read."""

_EDGE_BYTES = 256 * 1024
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64


def temporary_name(path: Path) -> Path:
    """Return an unused temporary name next to ``path``: on the same file system, so that a rename is atomic."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{path.name[-80:]}")


def fsync_file(path: Path) -> None:
    """Flush the contents of a finished file to the disk. Raises ``OSError`` when the disk reports a failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries. Best effort: some network file systems refuse this; their server flushes by itself."""
    with contextlib.suppress(OSError):
        fsync_file(path)


def rename_durably(source: Path, path: Path) -> None:
    """Flush a finished file, then rename it to ``path`` on the same file system. Raises ``OSError``."""
    fsync_file(source)
    source.replace(path)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is flushed and renamed to ``path``, on failure it is removed.

    Without ``durable`` it is not flushed. Does not fsync the folder; callers that write several files do that once,
    with ``fsync_folder``.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        if durable:
            fsync_file(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` to ``path`` atomically and, with ``durable``, flushed to the disk. Raises ``OSError``."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data)
    if durable:
        fsync_folder(path.parent)


def publish_exclusively(source: Path, path: Path) -> bool:
    """Hard-link the finished file ``source`` to ``path`` unless that name is taken; return whether it was linked.

    This makes a commit happen exactly once: of all processes on all machines, one gets True. If the answer of an NFS
    server is lost, its client repeats the request and gets "exists"; the link counts as made.
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
    """Create ``path`` with ``data`` unless it exists; return whether it was created. Never seen half-written."""
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        if durable:
            fsync_file(temporary)
        return publish_exclusively(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_or_replace(source: Path, path: Path) -> None:
    """Make ``path`` a hard link to ``source``, replacing any other file of that name atomically.

    Does nothing if it is one already: renaming a hard link over another one of the same file leaves both names.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(source.stat(), path.stat()):
            return
    temporary = temporary_name(path)
    os.link(source, temporary)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as canonical JSON: sorted keys, two spaces, UTF-8, a final newline. ``ValueError`` for NaN."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises ``OSError`` when it cannot be read and ``ValueError`` when it is not JSON."""
    return json.loads(path.read_bytes())


def temporaries_in(folder: Path, name: str = "*") -> list[Path]:
    """Return the temporary files for ``name`` in ``folder``, of processes that are writing or died while writing."""
    return list(folder.glob(f"{TEMPORARY_PREFIX}*-{name}"))


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in ``folder`` without hidden and temporary ones; a missing folder is empty."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def locked_folder(root: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``root``, which need not exist; the system releases it when the process ends."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root.with_name(f".{root.name}.lock")):
        yield


def hold_lock(path: Path) -> FileLock | None:
    """Try to lock the file ``path`` for as long as the returned lock lives; None when another process holds it.

    A file system without locks never refuses. Raises ``PermissionError`` when the file cannot be opened for writing.
    """
    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except PermissionError:
        raise
    except (OSError, NotImplementedError):  # no locks here
        pass
    return lock


def _lock(path: Path) -> FileLock:
    """A lock that ends with its process. filelock's own fallback is a file, which a killed process leaves behind."""
    return FileLock(path, fallback_to_soft=False)


def replace_folder(root: Path, fresh: Path) -> None:
    """Rename ``fresh`` to ``root``. An old folder is moved away first, so readers never see a mixture."""
    old = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    if root.exists():
        root.rename(old)
    fresh.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def file_identity(path: Path) -> str:
    """Return a hex digest of a file's size and samples of its content: a cheap test whether a large file changed.

    Covers the size, the first bytes (a safetensors header lies there), the last bytes (a ``.pth`` archive keeps the
    checksums of its tensors there) and evenly spaced samples between: at most 0.8 MB are read. The name does not
    matter. No protection against a deliberate change.
    """
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
    """Return a hex digest over the identities of ``files`` and their names relative to ``root``, in any order."""
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(f"{path.relative_to(root).as_posix()} {file_identity(path)}\n".encode())
    return digest.hexdigest()
