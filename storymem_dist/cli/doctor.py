"""``storymem-doctor``: runs the checks of ``doctor``, prints them as a page or as JSON; exit code 1 for a problem."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial

from rich.table import Column, Table
from rich.text import Text

from storymem_dist.config.composing import compose_settings
from storymem_dist.doctor import job, machine, nodes, scorer
from storymem_dist.doctor.finding import OK, PROBLEM, WARNING, Finding, warning
from storymem_dist.errors import StoryMemError
from storymem_dist.launch.environment import set_cache_folders
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.rich_console import SafeConsole
from storymem_dist.terminal.streams import print_error, print_line, print_lines
from storymem_dist.terminal.text import printable

_STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}

Check = Callable[[], Iterable[Finding]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``storymem-doctor``."""
    with program("storymem-doctor"):
        sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="storymem-doctor",
        description="Check this machine and a configuration: what is right, what is not, and how to fix it.",
        epilog="Overrides are those of storymem-render, for example: storymem-doctor model=tiny output=/data/runs/x",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the configuration to check")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_intermixed_args(arguments)
    try:
        settings = compose_settings(args.overrides)
    except StoryMemError as error:
        print_error(f"storymem-doctor: error: {error}")
        return error.exit_code
    set_cache_folders(settings.output)
    findings = examine(
        [
            machine.check_versions,
            machine.check_gpus,
            machine.check_links,
            machine.check_attention,
            machine.check_host,
            machine.check_network,
            partial(nodes.check_nodes, settings),
            machine.check_restarts,
            machine.check_slurm,
            machine.check_video,
            partial(job.check_stories, settings),
            partial(job.check_layers, settings),
            partial(job.check_weights, settings),
            partial(scorer.check_scorer, settings),
            partial(job.check_output, settings),
            partial(job.check_tracking, settings),
        ]
    )
    if args.json:
        print_lines(json.dumps([asdict(finding) for finding in findings], indent=1).splitlines())
    else:
        print_page(findings)
    return 1 if any(finding.state == PROBLEM for finding in findings) else 0


def examine(checks: Sequence[Check]) -> list[Finding]:
    """Return the findings of all checks. A check that raises becomes a warning, so that the page is always printed."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # an unusual machine must not end the other checks
            name = getattr(check, "__name__", None) or getattr(check, "func", check).__name__
            value = f"the check failed: {type(error).__name__}: {error}"
            findings.append(warning("doctor", name, value, "please report this line"))
    return findings


def print_page(findings: Sequence[Finding]) -> None:
    """Print a table with each fix below its finding, and the number of problems and warnings."""
    table = Table(Column(no_wrap=True), Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold"), box=None)
    table.show_header = False
    for finding in findings:
        style = _STYLES[finding.state]
        state = Text(finding.state, style=style)
        table.add_row(finding.area, printable(finding.name), state, Text(printable(finding.value)))
        if finding.fix:
            table.add_row("", "", "", Text(f"-> {printable(finding.fix)}", style=style))
    SafeConsole(highlight=False).print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in (PROBLEM, WARNING)}
    print_line(f"{counts[PROBLEM]} problems, {counts[WARNING]} warnings")


if __name__ == "__main__":
    main()
