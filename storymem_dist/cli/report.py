"""``storymem-report``: writes the report of a run, or compares two. ``observe.report`` makes the pages."""

import argparse
import sys
from pathlib import Path

from storymem_dist.errors import StoryMemError
from storymem_dist.observe.report import write_comparison, write_report


def main(arguments: list[str] | None = None) -> int:
    """Write a page about one or two run folders and print its path; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="storymem-report",
        description="Write report.html into a run folder (also while it is being rendered), or compare two runs.",
    )
    parser.add_argument("run", type=Path, help="run folder (output= of a render)")
    parser.add_argument("other", type=Path, nargs="?", help="second run folder: compare the two side by side")
    parser.add_argument(
        "-o", "--output", type=Path, help="the page (default: RUN/report.html, or comparison.html here)"
    )
    parser.add_argument("--embed", action="store_true", help="embed the videos in the page (runs below 50 MiB)")
    given = parser.parse_args(arguments)
    try:
        if given.other is None:
            page = write_report(given.run, given.output or given.run / "report.html", embed=given.embed)
        else:
            page = write_comparison(given.run, given.other, given.output or Path("comparison.html"), embed=given.embed)
    except StoryMemError as error:
        sys.stderr.write(f"storymem-report: error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"storymem-report: error: the page cannot be written: {error}\n")
        return 1
    sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
