"""What follows when a run was scored: its report and its Weights & Biases run show the scores.

Neither is a reason to fail: the scores are in the run folder. Knows what to call; nothing of scores.
"""

from collections.abc import Callable
from pathlib import Path

from storymem_dist.observe.report import write_report
from storymem_dist.observe.wandb.process import feed_again


def show_scores(root: Path, *, report: bool, wandb_mode: str, warn: Callable[[str], None]) -> str:
    """Write the report again, if there is one or ``report``, and the summary of the Weights & Biases run.

    Returns a line about that run, empty where none was fed.

    ``wandb_mode``: ``auto`` feeds a run that was fed before, as it was; ``online`` and ``offline`` feed any, ``off``
    none. ``warn`` is called with a sentence for what could not be done.
    """
    page = root / "report.html"
    if report or page.exists():
        try:
            write_report(root, page)
        except Exception as error:  # a page that cannot be written must not cost the scores
            warn(f"{page} could not be written again: {error}")
    try:
        return feed_again(root, wandb_mode)
    except Exception as error:  # wandb raises its own kinds
        warn(f"the Weights & Biases run of {root} does not have the scores: {error}")
        return ""
