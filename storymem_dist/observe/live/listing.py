"""The list of runs, where a server shows several: the runs of a sweep on one page."""

from collections.abc import Mapping
from urllib.parse import quote

from storymem_dist.observe.live.sources import LiveRun, Sources
from storymem_dist.observe.report.cards import STATUS_KINDS
from storymem_dist.observe.report.html import chip, document, esc, filled, hole, table
from storymem_dist.observe.report.page import read_asset, theme_button
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.rates import seconds_left

RUNS = ""
"""Name of the list among runs."""

HEADS = ("run", "state", "stories", "shots", "failed", "time", "left")


def listing_parts(sources: Sources) -> Mapping[str, str]:
    """Return the parts of the list: how far each run is."""
    rows = [_row(name, run) for name, run in sorted(sources.runs.items())]
    problems = "".join(f'<p class="trouble">{esc(text)}</p>' for text in sources.problems.values())
    done = sum(run.view.status == "finished" for run in sources.runs.values())
    return {
        "head": f'<p class="brand">storymem report</p><h1>{fmt.count(len(rows), "run")} '
        f'<span class="quiet">{done} finished</span></h1>',
        "runs": table("Runs", HEADS, rows, numeric=range(2, 7)) + problems,
    }


def listing_page(parts: Mapping[str, str], script: str) -> str:
    """Return the list as a page; ``script`` runs after the page's own."""
    text = document(
        title="storymem report",
        style=read_asset("style.css"),
        scripts=[read_asset("script.js"), script],
        body=(
            f'<a class="skip" href="#runs">Skip to the runs</a><header>{hole("div", "head")}</header>'
            f'<nav aria-label="Parts of the report"><ul></ul>{theme_button()}</nav>'
            f'<main><section id="runs">{hole("div", "runs")}</section></main>'
            '<div id="tip" role="tooltip" hidden></div>'
        ),
        connect=True,
    )
    return filled(parts, text)


def _row(name: str, run: LiveRun) -> tuple[str, ...]:
    view = run.view
    shots = view.shots
    left = seconds_left(view.state) if view.status == "running" else None
    failed = sum(shot.status in ("failed", "blocked") for shot in shots)
    return (
        f'<a href="runs/{quote(name)}/">{esc(name)}</a>',
        chip(view.status, STATUS_KINDS[view.status]) + (f" {esc(run.trouble)}" if run.trouble else ""),
        f"{sum(story.num_finished == len(story.shots) > 0 for story in view.stories)} of "
        f"{max(len(view.stories), view.state.announced_stories)}",
        f"{sum(shot.status == 'finished' for shot in shots)} of {max(len(shots), view.state.num_shots)}",
        str(failed),
        fmt.duration(view.state.up_seconds),
        fmt.duration(left) if left is not None else "",
    )
