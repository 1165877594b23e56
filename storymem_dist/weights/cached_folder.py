"""Writes a folder of files once, whole, and replaces it when it is not what it should be. Knows nothing of weights."""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storymem_dist.files import file_digest, locked_folder, replace_folder

MANIFEST = "storymem_folder.json"
"""Says what a folder was made from, and the SHA-256 of each of its files."""


def ensure_folder(root: Path, made_from: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Make ``root`` the folder that ``write`` makes from ``made_from``, unless it is that already.

    ``made_from`` is JSON that changes whenever the written bytes change. ``write`` receives the path of a folder that
    does not exist. Several processes may call this at once: one writes a temporary folder and renames it, the others
    wait. A folder with another ``made_from``, or with a missing, changed or further file, is replaced; one that is
    right is only read, so it may lie on a read-only disk. Raises ``OSError`` and whatever ``write`` raises; neither
    leaves anything behind.
    """
    if _is_right(root, made_from):
        return
    with locked_folder(root):
        if _is_right(root, made_from):
            return
        fresh = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
        try:
            write(fresh)
            manifest = {"made_from": made_from, "files": _hashes(fresh)}
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1))
            replace_folder(root, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _is_right(root: Path, made_from: Mapping[str, Any]) -> bool:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        wanted = json.loads(json.dumps(made_from))
        return bool(manifest == {"made_from": wanted, "files": _hashes(root)})
    except (OSError, ValueError):
        return False


def _hashes(root: Path) -> dict[str, str]:
    """SHA-256 by relative path; a file with several names is read once."""
    by_file: dict[tuple[int, int], str] = {}
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir() or path == root / MANIFEST:
            continue
        facts = path.stat()
        key = facts.st_dev, facts.st_ino
        if key not in by_file:
            by_file[key] = file_digest(path)
        found[path.relative_to(root).as_posix()] = by_file[key]
    return found
