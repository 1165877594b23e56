"""What was computed of a clip, image or text, kept in the run folder by content: ``RUN/cache/scores/``.

A file's name is a hash of the kind of value, of the content and of what computed it, so a value never goes stale and
several processes may write it. Deleting the folder costs only time. Knows tensors; nothing of clips.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from storymem_dist.files import read_limited, write_bytes

CACHE_FOLDER = Path("cache") / "scores"
"""In a run folder."""

CACHE_FORMAT = 1
"""Part of every name. Increase it when a measure is computed in another way."""

_MAX_BYTES = 256 * 2**20
_MAX_KNOWN_BYTES = 128 * 2**10  # features are below it; descriptions and frames of thousands of clips would add up
_DIGEST_BYTES = 32  # SHA-256 of the rest, a safetensors file: what was half written or has changed is not used

Key = tuple[str, ...]
"""What a value is of: its kind, then its content and what computed it."""


class FeatureCache:
    """Values by key. Those that were read stay in memory, except for large ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Key, dict[str, Tensor]] = {}

    def get(self, key: Key) -> dict[str, Tensor] | None:
        """The tensors of ``key``, or None where they are not kept or the file is damaged."""
        if key not in self._known:
            try:
                data = read_limited(self._path(key), _MAX_BYTES)
                if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
                    return None
                values = load(data[_DIGEST_BYTES:])
            except (OSError, SafetensorError, ValueError, KeyError):
                return None
            if len(data) > _MAX_KNOWN_BYTES:
                return values
            self._known[key] = values
        return self._known[key]

    def put(self, key: Key, values: Mapping[str, Tensor]) -> None:
        """Keep ``values``. Raises ``OSError``."""
        self._folder.mkdir(parents=True, exist_ok=True)
        data = save({name: value.contiguous() for name, value in values.items()})
        write_bytes(self._path(key), hashlib.sha256(data).digest() + data, durable=False)

    def _path(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps([CACHE_FORMAT, *key]).encode()).hexdigest()
        return self._folder / f"{key[0]}-{digest[:32]}.bin"


def joint(contents: Sequence[str]) -> str:
    """One hash over several, in order."""
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()
