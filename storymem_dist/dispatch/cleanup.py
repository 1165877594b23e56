"""Removes what dead processes left in a run folder: half-made files, and leases on committed shots.

Run by the first process to open the folder and the last to leave, never while another may be alive. The last to leave
does so only if a process has died since the last clean-up. Looks in all folders of this job's stories; ``shot_folder``
removes attempts. Knows leases and names of files; nothing of ranks.
"""

from collections.abc import Sequence
from pathlib import Path

from storymem_dist.artifacts.run_folder import SMALL_FOLDERS, RunFolder
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.dispatch.scanning import lease_key, parse_lease_key
from storymem_dist.dispatch.story_graph import ShotStatus, StoryGraph
from storymem_dist.files import temporaries_in

_MANY = 64


def clean_up(
    run: RunFolder,
    leases: LeaseFolder,
    stories: Sequence[StoryGraph],
    queue: ShotQueue,
    *,
    only_after_deaths: bool = False,
) -> None:
    """Remove what dead processes left of ``stories`` in ``run``, if no other may be alive. Raises ``OSError``.

    Lists all files first, and removes them only if this process is still alone after that. So the list has no file of
    a living process: each writes a heartbeat before it makes any file here. Leases on shots that are still to be
    rendered stay, because they count deaths; so do leases on stories of other jobs. Among many, the first replica of a
    job alone looks whether the others are dead.
    """
    if leases.owner.replica and leases.count_alive() > _MANY:
        return
    leases.mark_dead_owners()
    dead = leases.dead_owners()
    if not leases.is_alone() or (only_after_deaths and not dead):
        return
    half_made = _half_made_files(run, stories)
    shots = {lease_key(shot): shot for story in stories for shot in story.shots}
    wanted = {key for key, shot in shots.items() if queue.graph.state(shot) is not ShotStatus.COMMITTED}
    names = {story.story_id for story in stories}
    left_leases = {
        path: key for path, key in leases.lease_files().items() if key not in wanted and _story_of(key) in names
    }
    if not leases.is_alone():
        return
    for key in shots.keys() & left_leases.values():
        queue.finish_commit(shots[key])  # its holder may have died in the middle of it
    for path in [*half_made, *left_leases, *dead]:
        path.unlink(missing_ok=True)


def _half_made_files(run: RunFolder, stories: Sequence[StoryGraph]) -> list[Path]:
    folders = [run.leases_folder, *run.failure_folders(), *(run.root / name for name in SMALL_FOLDERS)]
    for story in stories:
        folders += [run.story_folder(story.story_id), run.story_folder(story.story_id) / "keyframes"]
    found = temporaries_in(run.root, "stop.json")  # not the marker's: it is made before the first heartbeat
    return found + [path for folder in folders for path in temporaries_in(folder)]


def _story_of(key: str) -> str | None:
    parsed = parse_lease_key(key)
    return parsed[0] if parsed else None
