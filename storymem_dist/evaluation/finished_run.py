"""The process that scores a run once it is rendered: ``python -m storymem_dist.evaluation.finished_run JOB``.

``on_finish`` starts it, with a JSON object that names run folder and settings.
"""

import json
import os
import sys
from pathlib import Path

from storymem_dist.errors import StoryMemError
from storymem_dist.evaluation.afterwards import show_scores
from storymem_dist.evaluation.models import Models
from storymem_dist.evaluation.ranks import choose_device
from storymem_dist.evaluation.scoring import score_run
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.parallel.launcher_watch import follow_launcher
from storymem_dist.terminal.program import program
from storymem_dist.terminal.streams import print_error, print_line


def main() -> None:
    """Score the run folder; print a line about each result, or the error and exit with its code."""
    with program("storymem-score"):
        job = json.loads(sys.argv[1])
        follow_launcher(int(job["launcher"]))
        root, settings = Path(job["root"]), EvaluationSettings(**job["settings"])
        try:
            models = Models(settings, choose_device(settings, int(os.environ.get("LOCAL_RANK", "0"))))
            scores = score_run(root, models)
        except StoryMemError as error:
            print_error(error)
            sys.exit(error.exit_code)
        fed = show_scores(root, report=bool(job["report"]), wandb_mode=job["wandb"], warn=print_error)
        for note in scores.notes:
            print_line(f"scores: {note}")
        if fed:
            print_line(f"scores: Weights & Biases: {fed}")
        print_line(f"scores: {root / 'scores.json'}")


if __name__ == "__main__":
    main()
