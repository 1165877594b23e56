"""One of several processes that score a run: ``python -m storymem_dist.evaluation.rank JOB`` (see ``ranks``).

Computes its tasks one after the other and adds a byte to a file for each. Says nothing: what it leaves undone is
computed, and reported, by the process that started it.
"""

import contextlib
import sys
from pathlib import Path

from storymem_dist.evaluation.cache import CACHE_FOLDER, FeatureCache
from storymem_dist.evaluation.models import Models
from storymem_dist.evaluation.ranks import choose_device
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.evaluation.tasks import Task, compute
from storymem_dist.files import read_json
from storymem_dist.parallel.launcher_watch import follow_launcher
from storymem_dist.terminal.program import program


def main() -> None:
    """Compute the tasks of the job file that the command line names."""
    with program("storymem-score"):
        path = Path(sys.argv[1])
        job = read_json(path)
        follow_launcher(int(job["launcher"]))
        settings = EvaluationSettings(**job["settings"])
        models = Models(settings, choose_device(settings, int(job["rank"])))
        root = Path(job["root"])
        cache = FeatureCache(root / CACHE_FOLDER)
        done = path.with_name(path.stem.replace("job", "done"))
        with contextlib.suppress(OSError):  # a full disk: the process that started this one meets it, too, and says so
            for task in job["tasks"]:
                compute(Task.from_plain(task), root, models, cache)
                with done.open("ab") as file:
                    file.write(b".")


if __name__ == "__main__":
    main()
