"""The contact sheet of a story: a card for each shot with its clip, prompt and facts. Knows views and HTML."""

from collections.abc import Iterator
from typing import Any

from storymem_dist.observe.report.assets import Assets
from storymem_dist.observe.report.html import anchor, chip, details, esc, hole
from storymem_dist.observe.report.scores import shot_scores
from storymem_dist.observe.report.views import ShotView, StoryView
from storymem_dist.observe.run import format as fmt

STATUS_KINDS = {
    "finished": "good",
    "running": "busy",
    "failed": "bad",
    "incomplete": "bad",
    "blocked": "bad",
    "stopped": "calm",
    "skipped": "calm",
    "waiting": "calm",
    "empty": "calm",
}

LONG_TEXT = 220
"""Characters of the longest prompt or overview that is not folded."""


def article(story: StoryView) -> str:
    """Return the frame of a story: its parts are those of ``story_parts``."""
    cards = "".join(
        f'<li class="card" id="{anchor("shot", story.story_id, shot.shot_id)}">'
        f"{hole('div', anchor('shot', story.story_id, shot.shot_id))}"
        f'<span data-actions="{esc(story.story_id)}" data-shot="{esc(shot.shot_id)}" hidden></span></li>'
        for shot in story.shots
    )
    about = hole("div", anchor("about", story.story_id))
    return (
        f'<article class="story" id="{anchor("story", story.story_id)}">{about}'
        f'<span data-actions="{esc(story.story_id)}" hidden></span><ol class="sheet">{cards}</ol></article>'
    )


def story_parts(story: StoryView, assets: Assets, *, is_page: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the parts of ``article``: about the story, and each shot's card. ``is_page``: its page has its name."""
    yield anchor("about", story.story_id), _about(story, assets, is_page=is_page)
    for shot in story.shots:
        name = anchor("shot", story.story_id, shot.shot_id)
        yield name, _card(story, shot, assets, shot.shot_id, "h3" if is_page else "h4")


def _about(story: StoryView, assets: Assets, *, is_page: bool) -> str:
    whole = ""
    if story.video and (address := assets.media(story.video)):
        whole = details(
            "Watch the whole story",
            f'<video class="whole" controls muted playsinline preload="none" src="{address}" '
            f'aria-label="{esc(story.name)}, the whole story"></video>',
        )
    overview = folded(story.overview, "overview") if story.overview else ""
    message = f'<p class="trouble">{esc(story.message)}</p>' if story.message else ""
    words = [story.story_id, f"{story.num_finished} of {fmt.count(len(story.shots), 'shot')}", *place_words(story)]
    quiet = f'<span class="quiet">{esc(" · ".join(words))}</span>'
    heading = "" if is_page else f"<h3>{esc(story.name)} {quiet}</h3>"
    return f'<div data-state="{story.status}"{queue_marks(story)}>{heading}{overview}{message}{whole}</div>'


def place_words(story: StoryView) -> list[str]:
    """Return what is to be said about a story's place in the queue."""
    queue = story.queue
    if queue.skipped:
        return [queue.skipped]
    if not queue.is_first:
        return []
    return ["moved to the front"]


def queue_marks(story: StoryView) -> str:
    """Return attributes that say where a story stands in the queue, for scripts."""
    place = f' data-place="{story.queue.place}"' if story.queue.place is not None else ""
    return place + " data-first" * story.queue.is_first + " data-skipped" * bool(story.queue.skipped)


def folded(text: str, css_class: str) -> str:
    """Return a paragraph; a long one shows its beginning until it is opened."""
    if len(text) <= LONG_TEXT:
        return f'<p class="{css_class}">{esc(text)}</p>'
    beginning = text[: LONG_TEXT - 60].rsplit(maxsplit=1)[0]
    return (
        f'<details class="{css_class} folded"><summary><span class="more">{esc(beginning)} …</span>'
        f'<span class="less">Less</span></summary><p>{esc(text)}</p></details>'
    )


def shot_card(story: StoryView, shot: ShotView, assets: Assets, *, run: str) -> str:
    """Return one shot of a comparison. ``run`` distinguishes the cards of two runs."""
    identity = anchor("shot", run, story.story_id, shot.shot_id)
    name = f"{run} · {shot.shot_id}"
    return f'<li class="card" id="{identity}">{_card(story, shot, assets, name, "h4")}</li>'


def _card(story: StoryView, shot: ShotView, assets: Assets, name: str, heading: str) -> str:
    name = name.replace("_", " ")
    facts = [shot.mode.upper()] if shot.mode else []
    facts += [f"seed {shot.seed}"] if shot.seed is not None else []
    facts += [fmt.duration(shot.seconds)] if shot.seconds is not None else []
    facts += [fmt.step_time(shot.seconds_per_step)] if shot.seconds_per_step is not None else []
    facts += [f"{shot.num_reused_steps} of {shot.num_steps} steps reused"] if shot.num_reused_steps else []
    facts += [f"{shot.num_attempts} attempts"] if shot.num_attempts > 1 else []
    marks = "" if shot.status == "finished" else chip(shot.status, STATUS_KINDS[shot.status])
    if not shot.cut and shot.shot_index > 0:
        marks += '<span class="chip calm" title="continues the shot before it">continues</span>'
    reason = f'<p class="trouble">{esc(shot.reason)}</p>' if shot.reason else ""
    why = f'<p class="quiet">rendered again: {esc(shot.why)}</p>' if shot.why else ""
    own = f'<p class="quiet">{esc(_own_words(shot.own))}</p>' if shot.own else ""
    own += f'<p class="quiet">{esc(shot_scores(shot))}</p>' if shot.scores else ""
    return (
        f'{_screen(story, shot, assets, name)}<{heading} data-state="{shot.status}">{esc(name)} {marks}</{heading}>'
        f'<p class="facts">{esc(" · ".join(facts))}</p>{reason}{why}{own}{folded(shot.prompt, "prompt")}'
    )


def _own_words(own: dict[str, Any]) -> str:
    """What the storyboard sets for a shot, in a line: ``own settings: num_frames 33, remember no``."""
    given = own.get("given")
    words = [f"{key} {_value_words(value)}" for key, value in sorted(own.items()) if key != "given"]
    if isinstance(given, dict):
        facts = [f"{given.get('width')}x{given.get('height')}", f"{given.get('rate')} frames per second"]
        notes = given.get("notes")
        words += [*facts, *map(str, notes if isinstance(notes, list) else [])]
    return f"{'given clip' if 'video' in own else 'own settings'}: {', '.join(words)}"


def _value_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_value_words, value))
    if isinstance(value, dict):
        return " ".join(f"{key} {_value_words(one)}".removeprefix("path ") for key, one in sorted(value.items()))
    return str(value)


def _screen(story: StoryView, shot: ShotView, assets: Assets, name: str) -> str:
    width, height = next(((s.width, s.height) for s in (shot, *story.shots) if s.width and s.height), (26, 15))
    ratio = f"aspect-ratio:{width}/{height}"
    address = assets.media(shot.clip) if shot.clip is not None else None
    if shot.clip is not None and address is None:
        return f'<div class="screen" style="{ratio}">its clip is missing or cannot be used</div>'
    if shot.clip is not None:
        poster = assets.poster(shot.clip)
        picture = f' poster="{poster}"' if poster else ""
        return (
            f'<div class="film"><video controls muted loop playsinline preload="none" style="{ratio}" '
            f'src="{address}"{picture} aria-label="{esc(story.name)}, {esc(name)}"></video></div>'
        )
    bar = ""
    if shot.status == "running" and shot.num_steps:
        bar = (
            f'<progress max="{shot.num_steps}" value="{shot.step}" aria-label="{esc(shot.shot_id)}: steps done">'
            f"</progress><span>step {shot.step} of {shot.num_steps}</span>"
        )
    return f'<div class="screen" style="{ratio}">{bar or esc(shot.status)}</div>'
