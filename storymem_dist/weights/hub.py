"""Downloads published weights from a Hugging Face hub or a mirror: checks disk space, resumes inside files, hashes.

A file is fetched under a temporary name and renamed once its size and hash are right. After a broken connection or a
killed process, the same download continues inside the file. The folder records its commit, so that a resumed download
does not mix two versions. Knows nothing about the content of files.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]

from storymem_dist.errors import CheckpointError, ConfigError, StoryMemError, WeightsNotFound
from storymem_dist.files import fsync_file, locked_folder, write_bytes

STATE_NAME = "storymem_download.json"
_PARTIAL_FOLDER = ".storymem_partial"
_ATTEMPTS = 5
_SPARE_BYTES = 64 * 2**20
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """One file of a repository. ``sha256`` is known for large (LFS) files; ``git_sha1`` is the blob id of the rest."""

    path: str
    num_bytes: int
    sha256: str | None
    git_sha1: str

    @property
    def partial_name(self) -> str:
        """Name of its unfinished download, different for every version of the file."""
        return f"{self.sha256 or self.git_sha1}.incomplete"

    def matches(self, path: Path) -> bool:
        """Whether a local file has this content (reads it whole)."""
        if path.stat().st_size != self.num_bytes:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {self.num_bytes}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest() == (self.sha256 or self.git_sha1)


@dataclass(kw_only=True, slots=True)
class DownloadState:
    """The version that a folder copies. ``checked``: modification times (ns) of files whose hash was right, by path."""

    repo: str
    revision: str
    commit: str
    files: list[RemoteFile]
    checked: dict[str, int] = field(default_factory=dict)

    def save(self, root: Path) -> None:
        """Write the state into ``root``, atomically."""
        root.mkdir(parents=True, exist_ok=True)
        write_bytes(root / STATE_NAME, json.dumps(asdict(self), indent=1).encode())

    def is_checked(self, root: Path, file: RemoteFile) -> bool:
        """Whether the local file is complete and unchanged since its hash was right."""
        path = root / file.path
        if not path.is_file():
            return False
        status = path.stat()
        return status.st_size == file.num_bytes and self.checked.get(file.path) == status.st_mtime_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadPlan:
    """What a download would do: files still to fetch (or to check), and the bytes to come over the network."""

    root: Path
    state: DownloadState
    files: tuple[RemoteFile, ...]
    num_bytes_to_fetch: int


class Source(Protocol):
    """Where published files come from. ``endpoint``: its address, for messages."""

    @property
    def endpoint(self) -> str:
        """Address of the server."""
        ...

    def list_files(self, repo: str, revision: str) -> DownloadState:
        """The commit that ``revision`` names now, and its files. Raises ``WeightsNotFound``."""
        ...

    def fetch(self, state: DownloadState, file: RemoteFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
        """Fetch the bytes of ``file`` that ``partial`` lacks. Raises ``WeightsNotFound``."""
        ...


class Hub:
    """One hub: the public one, or a mirror given by its URL. Uses the login of ``hf auth login`` or ``HF_TOKEN``."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._api = HfApi(endpoint=self.endpoint)

    def list_files(self, repo: str, revision: str) -> DownloadState:
        """The commit that ``revision`` names now, and its files. Raises ``WeightsNotFound``."""
        with self._explained(repo, revision):
            commit = self._api.model_info(repo, revision=revision).sha
            assert commit is not None
            entries = list(self._api.list_repo_tree(repo, recursive=True, revision=commit))
        files = [
            RemoteFile(
                path=entry.path,
                num_bytes=entry.size,
                sha256=entry.lfs.sha256 if entry.lfs else None,
                git_sha1=entry.blob_id,
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        ]
        return DownloadState(repo=repo, revision=revision, commit=commit, files=files)

    def fetch(self, state: DownloadState, file: RemoteFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
        """Fetch the bytes of ``file`` that ``partial`` lacks; retry broken connections. Raises ``WeightsNotFound``.

        ``on_bytes`` is called with counts of new bytes.
        """
        url = hf_hub_url(state.repo, file.path, revision=state.commit, endpoint=self.endpoint)
        for attempt in range(1, _ATTEMPTS + 1):
            before = partial.stat().st_size if partial.exists() else 0
            try:
                with self._explained(state.repo, state.commit, file.path):
                    self._fetch_rest(url, file, partial, on_bytes)
                return
            except _Interrupted as interruption:
                went_on = partial.stat().st_size > before if partial.exists() else False
                if attempt == _ATTEMPTS or not went_on:
                    raise interruption.explained from None

    def _fetch_rest(self, url: str, file: RemoteFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
        metadata = get_hf_file_metadata(url, endpoint=self.endpoint)
        headers = build_hf_headers()
        if metadata.location.split("/")[2] != url.split("/")[2]:
            headers.pop("authorization", None)  # a signed URL of another host, which must not get the token
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        with partial.open("r+b") as target:
            start = target.seek(0, 2)
            http_get(
                metadata.location,
                _Counting(target, on_bytes),  # type: ignore[arg-type]
                resume_size=start,
                headers=headers,
                expected_size=file.num_bytes,
            )

    @contextmanager
    def _explained(self, repo: str, revision: str, path: str | None = None) -> Iterator[None]:
        """Turn the hub's errors into errors that a user can act on; transient ones become ``_Interrupted``."""
        where = f"{repo}@{revision[:12]}" + (f": {path}" if path else "")
        try:
            yield
        except StoryMemError:
            raise
        except GatedRepoError:
            raise WeightsNotFound(
                f"{where}: its licence must be accepted first: open {self.endpoint}/{repo} in a browser, accept it, "
                "then log in here with `hf auth login` (or set HF_TOKEN)"
            ) from None
        except RevisionNotFoundError:
            raise WeightsNotFound(f"{repo}: there is no revision {revision!r} at {self.endpoint}") from None
        except RepositoryNotFoundError:
            raise WeightsNotFound(
                f"{repo}: not found at {self.endpoint}, or private; check the name, the mirror, and `hf auth login`"
            ) from None
        except EntryNotFoundError:
            raise WeightsNotFound(f"{where}: listed, but not on the server ({self.endpoint})") from None
        except OfflineModeIsEnabled:
            raise WeightsNotFound(f"{where}: HF_HUB_OFFLINE is set; unset it to download") from None
        except Exception as error:  # requests, httpx and the hub raise dozens of types when the network fails
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise WeightsNotFound(f"{where}: no space left on the disk; what was fetched is kept") from None
            first_line = str(error).strip().partition("\n")[0]
            explained = WeightsNotFound(
                f"{where}: {self.endpoint} cannot be reached, or the connection broke ({type(error).__name__}: "
                f"{first_line}); check the network or give a mirror with --endpoint. What was fetched is kept: the "
                "same command continues"
            )
            if path is None:
                raise explained from None
            raise _Interrupted(explained) from None


class _Interrupted(Exception):
    """The connection broke during a transfer, which can be retried."""

    def __init__(self, explained: WeightsNotFound) -> None:
        super().__init__(str(explained))
        self.explained = explained


class _Counting:
    """A file that reports the number of bytes written to it."""

    def __init__(self, file: object, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes

    def write(self, data: bytes) -> int:
        self._on_bytes(len(data))
        return self._file.write(data)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def plan_download(
    hub: Source,
    repo: str,
    revision: str,
    root: Path,
    *,
    files: Sequence[str] = (),
    only: Sequence[str] = (),
    expected_bytes: int | None = None,
) -> DownloadPlan:
    """List what is missing in ``root``; fetches only the list of files.

    A folder begun with the same repository and revision keeps its commit.

    Args:
        files: patterns of paths; those of the repository that are of use. The rest counts as not there.
        only: patterns of paths (``high_noise_model/*``), for a part of them. Both: empty means everything.
        expected_bytes: about the total size of all ``files``, if known.

    Raises:
        WeightsNotFound: the hub cannot be reached, or does not have the repository or all of ``files``.
        ConfigError: ``only`` matches no file, or ``root`` is a copy of another repository.
    """
    begun = read_state(root)
    if begun is not None and begun.repo != repo:
        raise ConfigError(f"{root}: holds a download of {begun.repo}; give another folder for {repo}")
    state = begun if begun is not None and begun.revision == revision else hub.list_files(repo, revision)
    if absent := [pattern for pattern in files if not _matching(state.files, [pattern])]:
        raise WeightsNotFound(f"{repo}@{state.commit[:12]}: {hub.endpoint} lists no {', no '.join(absent)}")
    state.files = _matching(state.files, files)
    total = sum(file.num_bytes for file in state.files)
    if expected_bytes is not None and total < expected_bytes // 2:
        raise WeightsNotFound(
            f"{repo}@{state.commit[:12]}: {hub.endpoint} lists {total:,} bytes, expected about {expected_bytes:,}; "
            "the mirror is incomplete"
        )
    chosen = _matching(state.files, only)
    if not chosen:
        names = ", ".join(sorted(file.path for file in state.files)[:5])
        raise ConfigError(f"--only {' '.join(only)}: no file of {repo} matches; it holds: {names}, ...")
    wanted = tuple(file for file in chosen if not state.is_checked(root, file))
    to_fetch = sum(
        file.num_bytes - _size(root / _PARTIAL_FOLDER / file.partial_name)
        for file in wanted
        if _size(root / file.path) != file.num_bytes
    )
    return DownloadPlan(root=root, state=state, files=wanted, num_bytes_to_fetch=to_fetch)


def _matching(files: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    return [file for file in files if not patterns or any(fnmatch(file.path, pattern) for pattern in patterns)]


def check_space(plan: DownloadPlan) -> None:
    """Raise ``WeightsNotFound`` unless the disk has room for what the plan fetches."""
    existing = next(folder for folder in (plan.root, *plan.root.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.num_bytes_to_fetch + _SPARE_BYTES:
        raise WeightsNotFound(
            f"{plan.root}: {plan.num_bytes_to_fetch / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on this "
            "disk; make room, or choose another folder with --to"
        )


def download(
    hub: Source, plan: DownloadPlan, *, num_workers: int = 4, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Carry out a plan. ``on_bytes`` is called with counts of fetched bytes, from several threads.

    Raises:
        WeightsNotFound: the disk is too small, the network failed in all attempts, or a file is not on the server.
        CheckpointError: a fetched file has the wrong content; it is removed.
    """
    check_space(plan)
    disable_progress_bars()
    plan.root.mkdir(parents=True, exist_ok=True)
    with locked_folder(plan.root), ThreadPoolExecutor(num_workers, thread_name_prefix="download") as pool:
        plan.state.save(plan.root)
        report = on_bytes or (lambda count: None)
        pending = [pool.submit(_fetch_and_check, hub, plan, file, report) for file in plan.files]
        try:
            for file, done in zip(plan.files, pending, strict=True):
                plan.state.checked[file.path] = done.result()
                plan.state.save(plan.root)
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    shutil.rmtree(plan.root / _PARTIAL_FOLDER, ignore_errors=True)


def read_state(root: Path) -> DownloadState | None:
    """The state that ``download`` wrote into ``root``, or None. Raises ``CheckpointError`` if it is damaged."""
    path = root / STATE_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        return DownloadState(**values | {"files": [RemoteFile(**file) for file in values["files"]]})
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path}: damaged; remove it and download again (good files are kept)") from None


def verify_hashes(root: Path, state: DownloadState, on_file: Callable[[RemoteFile], None] | None = None) -> list[str]:
    """Hash every file that exists; return the paths of published files that do not (``--only`` skips some).

    Raises:
        CheckpointError: a file's content is not the published one.
    """
    absent = []
    for file in state.files:
        path = root / file.path
        if not path.is_file():
            absent.append(file.path)
            continue
        if on_file is not None:
            on_file(file)
        if not file.matches(path):
            raise CheckpointError(
                f"{path}: not the published file ({path.stat().st_size:,} bytes of {file.num_bytes:,}, or another "
                "content); delete it and download again"
            )
    return absent


def _fetch_and_check(hub: Source, plan: DownloadPlan, file: RemoteFile, on_bytes: Callable[[int], None]) -> int:
    """Fetch one file unless it has the right content already; returns its modification time (ns)."""
    target = plan.root / file.path
    if not (target.is_file() and file.matches(target)):
        partial = plan.root / _PARTIAL_FOLDER / file.partial_name
        hub.fetch(plan.state, file, partial, on_bytes)
        if not file.matches(partial):
            partial.unlink()
            raise CheckpointError(
                f"{plan.state.repo}@{plan.state.commit[:12]}: {file.path}: arrived with the wrong content (its hash "
                "is not the published one) and was removed; download again, or use another mirror"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        fsync_file(partial)
        partial.replace(target)
    return target.stat().st_mtime_ns


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
