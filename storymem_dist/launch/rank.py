"""One rank that ``launch=torchrun`` started: ``python -m storymem_dist.launch.rank FOLDER``.

Reads the job that the launcher composed, so that all ranks render the same, and writes its exit code into FOLDER. Exits
with 0 unless a restart could help or its peers must not wait for it. Knows nothing of what is rendered.
"""

import contextlib
import os
import sys
from pathlib import Path

from storymem_dist.errors import CollectiveFailed, MachineError, StoryMemError
from storymem_dist.hardware import machine_fault
from storymem_dist.launch.group_folder import GroupFolder
from storymem_dist.parallel.launcher_watch import follow_launcher
from storymem_dist.parallel.layout import Layout
from storymem_dist.terminal.program import program
from storymem_dist.terminal.streams import print_error


def main() -> None:
    """Render the job of the group folder that the command line names."""
    with program("storymem-render"):
        _render()


def _render() -> None:
    folder = GroupFolder(Path(sys.argv[1]))
    follow_launcher(folder.launcher())
    if folder.error() is not None:  # this is a restart, and restarts do not help
        return
    rank = int(os.environ["RANK"])
    from storymem_dist.config.points import points_from_plain  # heavy imports only when there is something to do
    from storymem_dist.render.job import render_job

    layouts: list[Layout] = []
    try:
        points, sweep = points_from_plain(folder.read_job())
        exit_code = render_job(points, sweep=sweep, on_start=layouts.append)
        if folder.root.exists():  # else the launcher is gone, and another one has cleaned up
            folder.write_end(rank, exit_code)
    except CollectiveFailed as error:
        print_error(f"storymem-render: error [rank {rank}]: {error}")
        sys.exit(error.exit_code)  # torchrun restarts it
    except Exception as error:
        known = machine_fault(error) or (error if isinstance(error, StoryMemError) else None)
        if known is None:
            raise
        _report(folder, known, rank)
        is_alone = bool(layouts) and layouts[0].ranks_per_replica == 1
        if not (isinstance(known, MachineError) and is_alone):
            sys.exit(known.exit_code)  # not 0: the peers may be waiting for this rank in a collective


def _report(folder: GroupFolder, error: StoryMemError, rank: int) -> None:
    """Report to the launcher why the group cannot continue. After a fault of the machine, other replicas stop first."""
    try:
        folder.report_error(error, rank)
    except OSError:  # the temporary folder is full, too
        print_error(f"storymem-render: error [rank {rank}]: {error}")
        sys.exit(error.exit_code)
    if isinstance(error, MachineError):
        with contextlib.suppress(OSError):
            folder.stop_file.touch()


if __name__ == "__main__":
    main()
