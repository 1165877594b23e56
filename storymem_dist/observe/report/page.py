"""The report of one run as pages: what stands on which page, and the frame around it.

A run of few shots is one page with everything. A large one is an index, which has a line for each story, and a page for
each story. A page is made of parts (name -> HTML), so that a server can send those that changed. Knows the report's
values and HTML; nothing of event files or records.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

from storymem_dist.observe.report.assets import Assets, story_address
from storymem_dist.observe.report.cards import STATUS_KINDS, article, story_parts
from storymem_dist.observe.report.html import anchor, chip, document, esc, filled, hole, tile
from storymem_dist.observe.report.index import search, story_list, story_rows
from storymem_dist.observe.report.lineage import lineage
from storymem_dist.observe.report.needs import needs_picture
from storymem_dist.observe.report.scores import scores_section, story_scores
from storymem_dist.observe.report.sections import clock, failures, requests, settings, throughput
from storymem_dist.observe.report.timeline import timeline
from storymem_dist.observe.report.views import RunView, StoryView
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.rates import rates, seconds_left

INDEX = ""
"""The name of the page that a run is opened at; other pages have the ids of their stories."""

MAX_SHOTS = 100
"""Most shots of a run that are all on one page."""

FILTER_FROM = 6
"""Smallest number of stories for which the page has a search field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the pages of a run lie: the name of the index, and of the folder next to it with the stories' pages."""

    index: str = "report.html"
    folder: str = "report"


def is_large(run: RunView) -> bool:
    """Whether each story of the run has a page of its own."""
    return sum(len(story.shots) for story in run.stories) > MAX_SHOTS


def run_page(
    run: RunView,
    assets: Assets,
    page: str = INDEX,
    *,
    places: Places | None = None,
    whole: bool | None = None,
    parts: Mapping[str, str] | None = None,
    script: str = "",
    connect: bool = False,
) -> str:
    """Return the page ``page``, the index or that of a story. Raises ``KeyError`` for a story that is not there.

    ``whole`` puts all stories on the index: as ``is_large`` says, if None. ``parts``: those of ``page_parts``, or other
    ones. ``script`` runs after the page's own; ``connect`` allows it to ask the server that the page came from.
    """
    places = places or Places()
    title = run.name if page == INDEX else f"{_story(run, page).name} · {run.name}"
    if parts is None:
        parts = page_parts(run, assets, page, places=places, whole=whole)
    return document(
        title=f"{title} · storymem report",
        style=read_asset("style.css"),
        scripts=[text for text in (read_asset("script.js"), script) if text],
        body=filled(parts, _frame(run, page, places, whole)),
        connect=connect,
    )


def page_parts(
    run: RunView, assets: Assets, page: str = INDEX, *, places: Places | None = None, whole: bool | None = None
) -> Mapping[str, str]:
    """Return the parts of a page, name -> HTML. A part inside another one is an empty element in it (``html.hole``).

    Raises ``KeyError`` for a story that is not there.
    """
    places = places or Places()
    if page != INDEX:
        return _story_page_parts(_story(run, page), run, assets)
    whole = not is_large(run) if whole is None else whole
    parts = {
        "head": _head(run),
        "stories": _stories(run, whole=whole),
        "queue": requests(run),
        "scores": scores_section(run, shots=whole),
        "timeline": timeline(run.state),
        "throughput": throughput(run),
        "failures": failures(run),
        "settings": settings(run),
        "foot": footer(run.written_at),
    }
    if not whole:
        addresses = {story.story_id: story_address(story.story_id, places.folder) for story in run.stories}
        return parts | dict(story_rows(run, addresses))
    parts["memory"] = _memory(run)
    for story in run.stories:
        parts |= story_parts(story, assets)
        parts[anchor("memory", story.story_id)] = _story_memory(story, assets)
    return parts


def read_asset(name: str) -> str:
    """Return the text of a file next to this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def theme_button() -> str:
    """The switch between light and dark; it follows the system until it is used."""
    return '<button type="button" id="theme" aria-pressed="false">Dark</button>'


def footer(written_at: float) -> str:
    """Return the end of a page."""
    return f"Written {clock(written_at)} by storymem-report from event files and records."


def _story(run: RunView, story_id: str) -> StoryView:
    for story in run.stories:
        if story.story_id == story_id:
            return story
    raise KeyError(story_id)


# -- frames ------------------------------------------------------------------------------------------------------------


def _frame(run: RunView, page: str, places: Places, whole: bool | None) -> str:
    if page != INDEX:
        sections = [("stories", "Shots"), ("scores", "Scores"), ("memory", "Memory")]
        back = f'<li><a href="../{esc(places.index)}">All stories</a></li>'
        return _body(sections, back, _neighbours(run, page), "Skip to the shots")
    whole = not is_large(run) if whole is None else whole
    sections = [
        ("stories", "Stories"),
        ("queue", "Queue"),
        ("scores", "Scores"),
        *([("memory", "Memory")] if whole else []),
        ("timeline", "Timeline"),
        ("throughput", "Throughput"),
        ("failures", "Failures"),
        ("settings", "Settings"),
    ]
    find = search(run) if len(run.stories) >= FILTER_FROM else ""
    return _body(sections, "", '<div data-actions="" hidden></div>', "Skip to the stories", find)


def _body(sections: Iterable[tuple[str, str]], back: str, below_head: str, skip: str, find: str = "") -> str:
    links = back + "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f"{find if name == 'stories' else ''}{hole('div', name)}</section>"
        for name, title in sections
    )
    return (
        f'<a class="skip" href="#stories">{skip}</a><header>{hole("div", "head")}{below_head}</header>'
        f'<nav aria-label="Parts of the report"><ul>{links}</ul>{theme_button()}</nav>'
        f'<main>{body}</main>{hole("footer", "foot")}<div id="tip" role="tooltip" hidden></div>'
    )


def _neighbours(run: RunView, story_id: str) -> str:
    """Links to the stories before and after this one."""
    ids = [story.story_id for story in run.stories]
    here = ids.index(story_id)
    links = []
    for words, number in (("Story before", here - 1), ("Next story", here + 1)):
        if 0 <= number < len(ids):
            file = story_address(ids[number]).rpartition("/")[2]
            links.append(f'<a href="{esc(file)}">{words}: {esc(run.stories[number].name)}</a>')
    return f'<p class="neighbours">{" ".join(links)}</p>' if links else ""


# -- parts -------------------------------------------------------------------------------------------------------------


def _head(run: RunView) -> str:
    state, speed = run.state, rates(run.state)
    shots = [shot.status for story in run.stories for shot in story.shots]
    failed = shots.count("failed") + shots.count("blocked")
    done = sum(story.num_finished == len(story.shots) > 0 for story in run.stories)
    left = seconds_left(state) if run.status == "running" else None
    wasted = fmt.percent(speed.wait_ratio) + " of the time" if speed.wait_ratio is not None else ""
    tiles = [
        tile("Stories", f"{done} of {max(len(run.stories), state.announced_stories)}"),
        tile(
            "Shots",
            f"{shots.count('finished')} of {max(len(shots), state.num_shots)}",
            f"{failed} failed" if failed else "",
        ),
        tile("Time", fmt.duration(state.up_seconds), f"about {fmt.duration(left)} left" if left else ""),
        tile("Clips per device-hour", fmt.number(speed.clips_per_gpu_hour)),
        tile("Per step", fmt.step_time(speed.seconds_per_step)),
        tile("Waited", fmt.duration(sum(row.waited_seconds for row in state.rows.values())), wasted),
    ]
    if speed.flop_utilisation is not None:
        tiles.append(tile("FLOP utilisation", fmt.percent(speed.flop_utilisation)))
    created = " · created " + esc(run.created.replace("T", " ").replace("Z", " UTC")) if run.created else ""
    held = " " + chip("paused", "calm") if run.paused is not None else ""
    return (
        f'<p class="brand">storymem report</p><h1 data-state="{run.status}"{" data-paused" * bool(held)}>'
        f"{esc(run.name)} {chip(run.status, STATUS_KINDS[run.status])}{held}</h1>"
        f'<p class="quiet">run {esc(run.run_id)}{created}</p><dl class="tiles">{"".join(tiles)}</dl>'
    )


def _stories(run: RunView, *, whole: bool) -> str:
    if not run.stories:
        return '<p class="quiet">No story has begun yet.</p>'
    return "".join(map(article, run.stories)) if whole else story_list(run)


def _memory(run: RunView) -> str:
    parts = [
        f"<details{' open' * (len(run.stories) <= FILTER_FROM)}><summary>{esc(story.name)}</summary>"
        f"{hole('div', anchor('memory', story.story_id))}</details>"
        for story in run.stories
    ]
    return _MEMORY_INTRO + "".join(parts) if parts else '<p class="quiet">Nothing is remembered yet.</p>'


_MEMORY_INTRO = (
    "<p>Which keyframe of which shot was shown to which later shot. Point at a dot for its scores, at a shot for all "
    "that it was shown.</p>"
)


def _story_memory(story: StoryView, assets: Assets) -> str:
    return needs_picture(story) + lineage(story, assets)


def _story_page_parts(story: StoryView, run: RunView, assets: Assets) -> dict[str, str]:
    shots = [shot.status for shot in story.shots]
    failed = shots.count("failed") + shots.count("blocked")
    tiles = [
        tile("Shots", f"{story.num_finished} of {len(shots)}", f"{failed} failed" if failed else ""),
        tile("Time of its shots", fmt.duration(story.seconds)),
        tile("Keyframes", str(len(story.keyframes))),
    ]
    if story.queue.place is not None:
        tiles.append(tile("Place in the queue", str(story.queue.place)))
    return {
        "head": (
            f'<p class="brand">storymem report · {esc(run.name)}</p><h1 data-state="{story.status}">'
            f"{esc(story.name)} {chip(story.status, STATUS_KINDS[story.status])}</h1>"
            f'<p class="quiet">{esc(story.story_id)}</p><dl class="tiles">{"".join(tiles)}</dl>'
        ),
        "stories": article(story),
        **dict(story_parts(story, assets, is_page=True)),
        "scores": story_scores(run, story),
        "memory": _MEMORY_INTRO + hole("div", anchor("memory", story.story_id)),
        anchor("memory", story.story_id): _story_memory(story, assets),
        "foot": footer(run.written_at),
    }
