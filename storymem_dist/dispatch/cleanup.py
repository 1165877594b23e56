"""Removes what processes that died left behind in a run folder: half-made files, and leases on committed shots.

Done by who comes first and by who leaves last: by nobody while another process may be alive. A sweep looks where
half-made files of this job's stories can lie, and that is all their folders; who leaves does so only when somebody has
died since the last sweep. (Attempts have rules of their own.) Knows leases and names of files; nothing of ranks.
"""

from collections.abc import Sequence
from pathlib import Path

from storymem_dist.artifacts.run_folder import SMALL_FOLDERS, RunFolder
from storymem_dist.dispatch.graph import Chain, ShotState
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.queue import ShotQueue, lease_key, parse_lease_key
from storymem_dist.files import temporaries_in


def sweep(
    run: RunFolder,
    leases: LeaseFolder,
    chains: Sequence[Chain],
    queue: ShotQueue,
    *,
    only_after_deaths: bool = False,
) -> None:
    """Remove what the dead left of ``chains`` in ``run``, if nobody else may be alive. Raises ``OSError``.

    Everything is listed first and removed if this process turns out to be alone after that. So nothing of a living
    process can be on the list: each shows a sign of life before it makes any file here. Leases on shots that are still
    to be rendered stay, because they count the deaths, and so do those on stories of other jobs.
    """
    leases.bury_dead_owners()
    dead = leases.dead_owners()
    if not leases.is_alone() or (only_after_deaths and not dead):
        return
    half_made = _half_made_files(run, chains)
    shots = {lease_key(shot): shot for chain in chains for shot in chain.shots}
    wanted = {key for key, shot in shots.items() if queue.graph.state(shot) is not ShotState.COMMITTED}
    stories = {chain.story_id for chain in chains}
    left_leases = {
        path: key for path, key in leases.lease_files().items() if key not in wanted and _story_of(key) in stories
    }
    if not leases.is_alone():
        return
    for key in shots.keys() & left_leases.values():
        queue.finish_commit(shots[key])  # its holder may have died before the end of it
    for path in [*half_made, *left_leases, *dead]:
        path.unlink(missing_ok=True)


def _half_made_files(run: RunFolder, chains: Sequence[Chain]) -> list[Path]:
    folders = [run.leases_folder, run.failures_folder, *(run.root / name for name in SMALL_FOLDERS)]
    for chain in chains:
        folders += [run.story_folder(chain.story_id), run.story_folder(chain.story_id) / "keyframes"]
    found = temporaries_in(run.root, "stop.json")  # not the marker's: it is made before the first sign of life
    return found + [path for folder in folders for path in temporaries_in(folder)]


def _story_of(key: str) -> str | None:
    parsed = parse_lease_key(key)
    return parsed[0] if parsed else None
