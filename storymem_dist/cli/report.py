"""``storymem-report``: writes the report of a run, compares two, serves it live, or feeds it to Weights & Biases again.

``observe.report`` makes the pages, ``observe.live`` serves them, ``observe.wandb`` feeds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from storymem_dist.cli.arguments import a_path
from storymem_dist.errors import StoryMemError
from storymem_dist.observe.report import write_comparison, write_report
from storymem_dist.observe.wandb.process import feed_by_hand
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.streams import print_error, print_line

DEFAULT_PORT = 8321


def main(arguments: list[str] | None = None) -> int:
    """Write a page about one or two run folders and print its path; return the exit code."""
    with program("storymem-report"):
        return _run(arguments)


def _run(arguments: list[str] | None) -> int:
    parser = _ReportParser(
        prog="storymem-report",
        description="Write report.html into a run folder (also while it is being rendered), or compare two runs.",
    )
    parser.add_argument(
        "runs",
        type=a_path,
        nargs="+",
        metavar="RUN",
        help="run folder (output= of a render); two: compare them side by side; with --serve any number, or a sweep's",
    )
    parser.add_argument(
        "-o", "--output", type=a_path, help="the page (default: RUN/report.html, or comparison.html here)"
    )
    parser.add_argument("--embed", action="store_true", help="embed the videos in the page (runs below 50 MiB)")
    parser.add_argument(
        "--wandb",
        choices=("online", "offline"),
        help="write no page: send the whole run to Weights & Biases, or keep it offline for `wandb sync`",
    )
    _add_live_options(parser)
    given = parser.parse_args(arguments)
    run, *others = given.runs
    try:
        if given.serve:
            return _serve(given)
        if given.wandb is not None:
            print_line(feed_by_hand(run, given.wandb))
            return 0
        if not others:
            page = write_report(run, given.output or run / "report.html", embed=given.embed)
        else:
            page = write_comparison(run, others[0], given.output or Path("comparison.html"), embed=given.embed)
    except StoryMemError as error:
        print_error(f"storymem-report: error: {error}")
        return error.exit_code
    except OSError as error:
        print_error(f"storymem-report: error: the page cannot be written: {error}")
        return 1
    print_line(page)
    return 0


def _add_live_options(parser: Parser) -> None:
    live = parser.add_argument_group("live page")
    live.add_argument(
        "--serve",
        action="store_true",
        help="write no page: serve it, always up to date, until Ctrl-C (docs/live-page.md)",
    )
    live.add_argument("--port", type=int, help=f"port of the live page (default: {DEFAULT_PORT}; 0: any free one)")
    live.add_argument("--host", help="address that it listens on (default: 127.0.0.1, this machine alone)")
    live.add_argument(
        "--control", action="store_true", help="with buttons that change the queue, for those with the token"
    )
    live.add_argument(
        "--token-file",
        type=a_path,
        metavar="FILE",
        help="keep the token in FILE, so that the address stays the same; reading needs it, too",
    )


class _ReportParser(Parser):
    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """Refuse options that exclude each other, too."""
        values, rest = super().parse_known_args(*given, **named)
        _refuse_contradictions(self, values)
        return values, rest


def _refuse_contradictions(parser: Parser, given: argparse.Namespace) -> None:
    """End with an error of the parser where options exclude each other."""
    if given.serve:
        if given.wandb is not None or given.output or given.embed:
            parser.error("--serve writes no page: it takes neither -o, --embed nor --wandb")
        return
    if given.control or given.token_file or given.port is not None or given.host is not None:
        parser.error("--control, --port, --host and --token-file belong to the live page: add --serve")
    if given.wandb is not None and (len(given.runs) > 1 or given.output or given.embed):
        parser.error("--wandb writes no page: it takes one run folder and neither -o nor --embed")
    if len(given.runs) > 2:
        parser.error(f"{len(given.runs)} runs are given: one has a report, two are compared; --serve shows any number")


def _serve(given: argparse.Namespace) -> int:
    from storymem_dist.observe.live.server import serve  # starlette and uvicorn: only where they are needed

    serve(
        given.runs,
        host="127.0.0.1" if given.host is None else given.host,
        port=DEFAULT_PORT if given.port is None else given.port,
        control=given.control,
        token_file=given.token_file,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
