"""Small files that lie at an address of their own, for ``hub.download``: where a publisher uses no hub.

Nothing but the file says what it is, so its hash is taken when it is first listed and kept in the folder from then on.
A file is read whole; larger ones than ``MAX_BYTES`` belong on a hub. Knows addresses; nothing of the content.
"""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urlsplit

from huggingface_hub import constants

from storymem_dist.errors import WeightsNotFound
from storymem_dist.weights.hub import DownloadState, RemoteFile

MAX_BYTES = 16 * 2**20
_TIMEOUT_SECONDS = 60.0


class WebFiles:
    """The files ``names`` at ``address``, in which ``{repo}``, ``{revision}`` and ``{path}`` are replaced."""

    def __init__(self, address: str, names: Sequence[str]) -> None:
        self._address = address
        self._names = names
        parts = urlsplit(address)
        self.endpoint = f"{parts.scheme}://{parts.netloc}"

    def list_files(self, repo: str, revision: str) -> DownloadState:
        """The files and their hashes as they are served now. Raises ``WeightsNotFound``."""
        files = []
        for name in self._names:
            data = self._read(repo, revision, name)
            digest = hashlib.sha256(data).hexdigest()
            files.append(RemoteFile(path=name, num_bytes=len(data), sha256=digest, git_sha1=""))
        return DownloadState(repo=repo, revision=revision, commit=revision, files=files)

    def fetch(self, state: DownloadState, file: RemoteFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
        """Fetch ``file`` into ``partial``, whole. Raises ``WeightsNotFound``; ``on_bytes`` gets its size."""
        data = self._read(state.repo, state.revision, file.path)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        on_bytes(len(data))

    def _read(self, repo: str, revision: str, path: str) -> bytes:
        address = self._address.format(repo=quote(repo), revision=quote(revision), path=quote(path))
        if constants.HF_HUB_OFFLINE:
            raise WeightsNotFound(f"{address}: HF_HUB_OFFLINE is set; unset it to download")
        try:
            with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as answer:
                data: bytes = answer.read(MAX_BYTES + 1)
        except (OSError, HTTPException, ValueError) as error:
            raise WeightsNotFound(
                f"{address} cannot be read ({error}); check the network, or put the file into the folder by hand"
            ) from None
        if len(data) > MAX_BYTES:
            raise WeightsNotFound(f"{address}: larger than {MAX_BYTES:,} bytes; this is not the file")
        return data
