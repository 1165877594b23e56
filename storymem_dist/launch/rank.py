"""One rank that ``launch=torchrun`` started: ``python -m storymem_dist.launch.rank FOLDER``.

Reads the job that the launcher composed, so that all ranks render the same, and writes its exit code into FOLDER. Exits
with 0 unless a restart could help or its peers must not wait for it. Knows nothing of what is rendered.
"""

import os
import sys
from pathlib import Path

from storymem_dist.errors import CollectiveFailed, StoryMemError
from storymem_dist.launch.group_folder import GroupFolder


def main() -> None:
    """Render the job of the group folder that the command line names."""
    folder = GroupFolder(Path(sys.argv[1]))
    if folder.error() is not None:  # this is a restart, and restarts do not help
        return
    rank = int(os.environ["RANK"])
    from storymem_dist.config.points import points_from_plain  # heavy imports only when there is something to do
    from storymem_dist.render.job import render_job

    try:
        points, sweep = points_from_plain(folder.read_job())
        exit_code = render_job(points, sweep=sweep)
    except CollectiveFailed as error:
        sys.stderr.write(f"storymem-render: error [rank {rank}]: {error}\n")
        sys.exit(error.exit_code)  # torchrun restarts it
    except StoryMemError as error:
        folder.report_error(error, rank)
        sys.exit(error.exit_code)  # not 0: the peers may be waiting for this rank in a collective
    folder.write_end(rank, exit_code)


if __name__ == "__main__":
    main()
