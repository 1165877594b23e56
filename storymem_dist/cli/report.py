"""``storymem-report``: writes the report of a run, compares two, or feeds one to Weights & Biases again.

``observe.report`` makes the pages, ``observe.wandb`` feeds.
"""

import sys
from pathlib import Path

from storymem_dist.cli.arguments import a_path
from storymem_dist.errors import StoryMemError
from storymem_dist.observe.report import write_comparison, write_report
from storymem_dist.observe.wandb.process import feed_by_hand
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.streams import print_error, print_line


def main(arguments: list[str] | None = None) -> int:
    """Write a page about one or two run folders and print its path; return the exit code."""
    with program("storymem-report"):
        return _run(arguments)


def _run(arguments: list[str] | None) -> int:
    parser = Parser(
        prog="storymem-report",
        description="Write report.html into a run folder (also while it is being rendered), or compare two runs.",
    )
    parser.add_argument("run", type=a_path, help="run folder (output= of a render)")
    parser.add_argument("other", type=a_path, nargs="?", help="second run folder: compare the two side by side")
    parser.add_argument(
        "-o", "--output", type=a_path, help="the page (default: RUN/report.html, or comparison.html here)"
    )
    parser.add_argument("--embed", action="store_true", help="embed the videos in the page (runs below 50 MiB)")
    parser.add_argument(
        "--wandb",
        choices=("online", "offline"),
        help="write no page: send the whole run to Weights & Biases, or keep it offline for `wandb sync`",
    )
    given = parser.parse_args(arguments)
    if given.wandb is not None and (given.other or given.output or given.embed):
        parser.error("--wandb writes no page: it takes one run folder and neither -o nor --embed")
    try:
        if given.wandb is not None:
            print_line(feed_by_hand(given.run, given.wandb))
            return 0
        if given.other is None:
            page = write_report(given.run, given.output or given.run / "report.html", embed=given.embed)
        else:
            page = write_comparison(given.run, given.other, given.output or Path("comparison.html"), embed=given.embed)
    except StoryMemError as error:
        print_error(f"storymem-report: error: {error}")
        return error.exit_code
    except OSError as error:
        print_error(f"storymem-report: error: the page cannot be written: {error}")
        return 1
    print_line(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
