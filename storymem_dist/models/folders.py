"""Folders that appear whole or not at all, also when several processes want to make the same one."""

import fcntl
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
