"""The folder ``wandb`` of a run folder: what a feed has logged so far, and the offline runs of earlier feeds.

    wandb/offline-run-*            the run, to be uploaded with ``wandb sync``; at most one holds all of it
    wandb/superseded/              offline runs of earlier feeds, which the newest one repeats; may be deleted
    wandb/feed.json, feed.lock     progress of the feed, and the lock of the process that feeds
    wandb/feed-<writer>.log        what a feeder had to say, if anything

Never follows a link out of the run folder. Knows files; nothing of W&B.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storymem_dist.files import UnsafePath, names_in, read_json, resolve_inside, write_bytes


@dataclass(kw_only=True)
class Progress:
    """What was logged: the last sequence number of each writer, the number of videos of each kind, the next row.

    ``target`` is where it was logged to: mode, server, entity, project; empty where nothing was.
    """

    logged: dict[str, int] = field(default_factory=dict)
    videos: dict[str, int] = field(default_factory=dict)
    row: int = 0
    target: Sequence[str] = ()


def own_folder(run_folder: Path) -> Path:
    """Return ``RUN/wandb``, made if it is missing.

    Raises ``UnsafePath`` when it, or a folder in it that W&B writes to, leads out of the run folder.
    """
    with contextlib.suppress(FileExistsError):
        (run_folder / "wandb").mkdir()
    folder = resolve_inside(run_folder, "wandb")
    if not folder.is_dir():
        raise UnsafePath(f"{run_folder / 'wandb'} is not a folder")
    for part in ("data", "thumbnails", "superseded"):
        if os.path.lexists(folder / part):
            resolve_inside(run_folder, f"wandb/{part}")
    return folder


def offline_runs(run_folder: Path) -> list[str]:
    """Return the names of the offline runs in ``RUN/wandb`` that are not superseded, oldest first."""
    return [name for name in names_in(run_folder / "wandb") if name.startswith("offline-run-")]


def supersede_offline_runs(run_folder: Path, *, but: str) -> None:
    """Move the offline runs of earlier feeds to ``wandb/superseded``: the feed that has begun repeats what they hold.

    ``but`` is the name of its own folder. Nothing is deleted. Raises ``OSError`` when a folder cannot be moved.
    """
    folder = own_folder(run_folder)
    for name in offline_runs(run_folder):
        if name == but:
            continue
        (folder / "superseded").mkdir(exist_ok=True)
        superseded = resolve_inside(run_folder, "wandb/superseded")
        is_free = not os.path.lexists(superseded / name)
        (folder / name).rename(superseded / (name if is_free else f"{name}.{secrets.token_hex(3)}"))


def load_progress(run_folder: Path, target: Sequence[str]) -> Progress:
    """Return what earlier feeds have logged, from a file that may be missing, damaged or of an earlier version.

    ``target`` is what a file of an earlier version means, which does not say it and was written online.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        values = read_json(resolve_inside(run_folder, "wandb/feed.json"))
        logged, videos, row = values["logged"], values["videos"], values["row"]
        default = () if offline_runs(run_folder) else target
        if all(type(number) is int and number >= 0 for number in (*logged.values(), *videos.values(), row)):
            return Progress(logged=logged, videos=videos, row=row, target=values.get("target", default))
    return Progress()


def save_progress(run_folder: Path, progress: Progress) -> None:
    """Write the progress. Raises ``OSError``."""
    values = {**vars(progress), "target": list(progress.target)}
    write_bytes(own_folder(run_folder) / "feed.json", json.dumps(values).encode(), durable=False)  # cheap to lose
