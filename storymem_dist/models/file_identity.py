"""A cheap identity for large files: enough to notice that weights were changed, without reading them whole.

The identity covers a file's size, its first bytes (a safetensors header lies there), its last bytes (a ``.pth`` archive
keeps the checksums of all its tensors there) and evenly spaced samples between. It is no protection against an
adversary.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

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
