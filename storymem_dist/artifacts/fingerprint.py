"""Fingerprints: one hash over everything that changes the pixels of a shot, and a description of what changed.

As in a build system, a shot's fingerprint covers its own inputs and the fingerprints of the shots that it needs: an
edited prompt changes that shot and those that need it, and nothing else. Knows JSON values only, nothing of what they
mean.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storymem_dist.errors import StoryboardError
from storymem_dist.files import canonical_json, file_digest

FINGERPRINT_FORMAT = 1
"""Part of every fingerprint. Increase it when the same inputs must get another fingerprint."""

_LONGEST_VALUE = 60


def fingerprint(inputs: Mapping[str, Any], predecessor: str | None) -> str:
    """Return 64 hex digits over ``inputs`` (JSON values) and ``predecessor``.

    That is the fingerprint of the shot before, or the joint one of all that it needs; None where it needs nothing.
    """
    value = {"format": FINGERPRINT_FORMAT, "inputs": inputs, "predecessor": predecessor}
    return hashlib.sha256(canonical_json(value)).hexdigest()


def joint_fingerprint(fingerprints: Sequence[str]) -> str | None:
    """Return one fingerprint over those of all shots that a shot needs, in order; None where there are none."""
    if not fingerprints:
        return None
    return hashlib.sha256(canonical_json({"needs": list(fingerprints)})).hexdigest()


def hash_of(value: Any) -> str:
    """Return 16 hex digits over one JSON value, for instance a resolved configuration."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


def reference_image_digest(path: Path) -> str:
    """Return the SHA-256 of a reference image. Raises ``StoryboardError`` when it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise StoryboardError(f"reference image {path} cannot be read: {error.strerror or error}") from error


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what changed between two sets of inputs, a phrase for each difference: ``seed changed from 3 to 4``."""
    return list(_differences("", before, after))


def _differences(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    phrases = []
    for key in sorted({*before, *after}):
        name = f"{where}{key}"
        if key not in before:
            phrases.append(f"{name}={_short(after[key])} is new")
        elif key not in after:
            phrases.append(f"{name} was {_short(before[key])} and is gone")
        elif before[key] != after[key]:
            if isinstance(before[key], Mapping) and isinstance(after[key], Mapping):
                phrases.extend(_differences(f"{name}.", before[key], after[key]))
            else:
                old, new = _short(before[key]), _short(after[key])
                phrases.append(f"{name} changed" if old == new else f"{name} changed from {old} to {new}")
    return phrases


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
