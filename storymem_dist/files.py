"""File operations: durable writes, and reads that trust neither names nor contents.

Every file of a run folder is written by these functions. A process that is killed at any moment leaves either the old
file or the new one; a half-written file only has a temporary name. This is safe on NFS: it relies on ``link`` and
``rename`` being atomic on the server, not on locks. (Only folders of weights are locked.)

Temporary files have random names and are created, never opened: a link that somebody left in a folder is not followed.

A run folder may come from somebody else. ``resolve_inside`` is the one place where a name found in a run folder becomes
a path; ``open_regular`` never waits for a pipe or a device; ``parse_json`` is bounded in size, depth and numbers.

Also computes the identity of large files. Knows nothing of their contents.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from storymem_dist.errors import ConfigError

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the name of every half-written file. Such files are never read."""

MAX_JSON_BYTES = 16 * 2**20
"""Largest JSON file of a run folder that is read. A record of a shot has about 10 kB."""

MAX_JSON_DEPTH = 64
"""Deepest nesting of JSON that is read."""

_EDGE_BYTES = 256 * 1024
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096
_QUICK_EDGE_BYTES = 64 * 1024
_QUICK_NUM_SAMPLES = 16


class UnsafePath(OSError):
    """A name found in a folder leads out of it, or what it names is no regular file or too large."""


def temporary_name(path: Path) -> Path:
    """Return an unused temporary name next to ``path``: on the same file system, so that a rename is atomic."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{path.name[-80:]}")


def create_file(path: Path) -> int:
    """Create ``path`` and return its descriptor, for writing. Raises ``FileExistsError`` for a file or link there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


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


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write; on success it is flushed and renamed to ``path``, on failure it is removed.

    Without ``durable`` it is not flushed. Does not fsync the folder; callers that write several files do that once,
    with ``fsync_folder``.
    """
    temporary = temporary_name(path)
    os.close(create_file(temporary))
    try:
        yield temporary
        if durable:
            fsync_file(temporary)
        temporary.replace(path)
    except BaseException as error:
        _name_file(error, path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` to ``path`` atomically and, with ``durable``, flushed to the disk. Raises ``OSError``."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data)
    if durable:
        fsync_folder(path.parent)


def _name_file(error: BaseException, path: Path) -> None:
    """Put ``path`` into the error of a write: the system names no file there."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def publish_exclusively(source: Path, path: Path, *, durable: bool = True) -> bool:
    """Hard-link the finished file ``source`` to ``path`` unless that name is taken; return whether it was linked.

    This makes a commit happen exactly once: of all processes on all machines, one gets True. If the answer of an NFS
    server is lost, its client repeats the request and gets "exists"; the link counts as made. ``durable``: flushed.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        try:
            return os.path.samestat(source.stat(), path.stat())
        except FileNotFoundError:
            return False
    if durable:
        fsync_folder(path.parent)
    return True


def create_exclusively(path: Path, data: bytes, *, durable: bool = True, mode: int | None = None) -> bool:
    """Create ``path`` unless it exists; return whether it was created. Never half-written. ``mode``: permissions."""
    temporary = temporary_name(path)
    try:
        with os.fdopen(create_file(temporary), "wb") as file:
            file.write(data)
            if mode is not None:
                with contextlib.suppress(OSError):  # a file system without permissions
                    os.fchmod(file.fileno(), mode)
        if durable:
            fsync_file(temporary)
        return publish_exclusively(temporary, path, durable=durable)
    except OSError as error:
        _name_file(error, path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_or_replace(source: Path, path: Path) -> None:
    """Make ``path`` a hard link to ``source``, replacing any other file of that name atomically.

    Does nothing if it is one already: renaming a hard link over another one of the same file leaves both names.
    """
    with contextlib.suppress(FileExistsError):
        return os.link(source, path)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(source.stat(), path.lstat()):
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


def resolve_inside(root: Path, path: str | Path) -> Path:
    """Return where ``path``, a name relative to ``root`` that was found inside ``root``, really is.

    ``root`` may be a link itself or lie under links, and a link inside may lead to another place inside. Raises
    ``UnsafePath`` for an absolute path, for ``..``, for a name that no file can have and for a link that leads out;
    ``FileNotFoundError`` when nothing is there. Check and use are two steps: no protection against a process that
    exchanges links at the same time.
    """
    text = str(path)
    if text.startswith("/") or ".." in PurePosixPath(text).parts:
        raise UnsafePath(f"{text!r} leads out of {root}")
    try:
        base = Path(os.path.realpath(root, strict=True))
        place = Path(os.path.realpath(base / text, strict=True))
    except ValueError as error:  # a null character, a lone surrogate
        raise UnsafePath(f"{text!r} is not a file name: {error}") from None
    if not place.is_relative_to(base):
        raise UnsafePath(f"{text!r} is a link that leads out of {root}")
    return place


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Never waits. Raises ``UnsafePath`` for a folder, pipe, socket or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise UnsafePath(f"{path} is not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafePath(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Return the contents of a regular file of at most ``max_bytes``. Raises ``OSError``, ``UnsafePath`` among them."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnsafePath(f"{path} is larger than {max_bytes:,} bytes")
    return data


def parse_json(data: bytes | str) -> Any:
    """Parse JSON of any origin. Raises ``ValueError`` alone: not JSON or UTF-8, or nested too deeply.

    Also refused: keys that appear twice, NaN, Infinity, 1e999, integers of more than 4,300 digits, and text that no
    file or terminal can hold (half of a surrogate pair).
    """
    text = data if isinstance(data, str) else data.decode()
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file. Raises ``OSError`` when it cannot be read (``UnsafePath`` when it is no regular file, or it is
    larger than ``max_bytes``), and ``ValueError`` as ``parse_json`` does.
    """
    return parse_json(read_limited(path, max_bytes))


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a valid safetensors file: part of the JSON header, whose length comes first."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return values


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    if any(isinstance(value, dict | list) for value in level):
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys)


def expand_home(path: str, what: str) -> str:
    """Return a path that a person gave with ``~`` and ``~user`` replaced. ``what`` names the setting in the message.

    Raises ``ConfigError`` when there is no such home folder.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111 - pathlib would normalize the rest, which may be a glob
    if expanded.startswith("~"):
        raise ConfigError(
            f"{what}={path!r}: there is no home folder {path.partition('/')[0]}; write ./{path} for a name"
        )
    return expanded


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

    A file system without locks never refuses. Raises ``PermissionError`` when the file cannot be opened for writing and
    ``UnsafePath`` when a link, a second name of another file, or no regular file has its name.
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
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise UnsafePath(f"{path} is not a lock file: it is a link or not a regular file; remove it")
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
    return _sampled(path, _EDGE_BYTES, _NUM_SAMPLES)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits. Raises ``OSError``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quick_digest(path: Path) -> str:
    """Return a hex digest of a file's size and 192 KiB of its content (a smaller file: all). Raises ``OSError``."""
    return _sampled(path, _QUICK_EDGE_BYTES, _QUICK_NUM_SAMPLES)


def _sampled(path: Path, edge_bytes: int, num_samples: int) -> str:
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(num_bytes).encode())
        digest.update(file.read(edge_bytes))
        between = max(0, num_bytes - 2 * edge_bytes)
        for index in range(num_samples if between else 0):
            file.seek(edge_bytes + between * index // num_samples)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, num_bytes - edge_bytes))
        digest.update(file.read())
    return digest.hexdigest()


def folder_identity(root: Path, files: Iterable[Path]) -> str:
    """Return a hex digest over the identities of ``files`` and their names relative to ``root``, in any order."""
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(f"{path.relative_to(root).as_posix()} {file_identity(path)}\n".encode())
    return digest.hexdigest()
