"""The list of stories of a large run: a line for each, with a link to its page. Knows views and HTML."""

from collections.abc import Iterator

from storymem_dist.observe.report.cards import STATUS_KINDS, place_words, queue_marks
from storymem_dist.observe.report.html import anchor, chip, esc, hole
from storymem_dist.observe.report.views import RunView, StoryView
from storymem_dist.observe.run import format as fmt

STATES = ("running", "waiting", "finished", "failed", "skipped")

LONGEST_MESSAGE = 200
"""Characters of a failure that a line shows; the story's page has all of it."""


def search(run: RunView) -> str:
    """Return the field that finds stories and the choice of states. A script shows and serves them."""
    states = "".join(
        f'<label><input type="radio" name="state" value="{state}"{" checked" * (not state)}> '
        f'{state or "all"} <span class="quiet" data-count="{state}"></span></label>'
        for state in ("", *STATES)
    )
    return (
        '<div class="search" hidden><label for="filter">Find stories</label>'
        '<input type="search" id="filter" autocomplete="off"> <output id="filter-count" for="filter"></output>'
        f'<fieldset><legend class="hidden">State of the stories</legend>{states}</fieldset></div>'
    )


def story_list(run: RunView) -> str:
    """Return the frame of the list; ``story_rows`` are its parts."""
    rows = "".join(
        f'<li class="row" id="{anchor("story", story.story_id)}">{hole("div", anchor("row", story.story_id))}'
        f'<span data-actions="{esc(story.story_id)}" hidden></span></li>'
        for story in run.stories
    )
    return f'<ul class="index">{rows}</ul>'


def story_rows(run: RunView, addresses: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the parts of ``story_list``. ``addresses``: of the stories' pages, by story id."""
    for story in run.stories:
        yield anchor("row", story.story_id), _row(story, addresses[story.story_id])


def _row(story: StoryView, address: str) -> str:
    finished, total = story.num_finished, len(story.shots)
    done = 100 * finished / total if total else 0
    words = [story.story_id, *place_words(story)]
    trouble = next((text for text in (story.message, *(shot.reason for shot in story.shots)) if text), "")
    if len(trouble) > LONGEST_MESSAGE:
        trouble = trouble[:LONGEST_MESSAGE] + " …"
    status = chip(story.status, STATUS_KINDS[story.status])
    return (
        f'<div class="line" data-state="{story.status}"{queue_marks(story)}>'
        f'<span class="name"><a href="{esc(address)}">{esc(story.name)}</a> '
        f'<span class="quiet">{esc(" · ".join(words))}</span></span>{status}'
        f'<span class="part"><span class="meter" style="--done:{done:.0f}%"></span>'
        f"{finished} of {fmt.count(total, 'shot')}</span>"
        f'<span class="quiet time">{fmt.duration(story.seconds) if story.seconds is not None else ""}</span>'
        + (f'<span class="trouble">{esc(trouble)}</span>' if trouble else "")
        + "</div>"
    )
