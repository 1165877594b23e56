"""The report of one run as a page: contact sheets, memory lineage, timeline, throughput, failures, settings.

Knows the report's values and HTML; nothing of event files or records.
"""

import time
from importlib import resources
from typing import Any

from storymem_dist.observe.report.assets import Assets
from storymem_dist.observe.report.chosen import chosen
from storymem_dist.observe.report.html import anchor, chip, details, document, esc, table, tile
from storymem_dist.observe.report.lineage import lineage
from storymem_dist.observe.report.model import RunView, ShotView, StoryView
from storymem_dist.observe.report.needs import needs_picture
from storymem_dist.observe.report.scores import scores_section, shot_scores
from storymem_dist.observe.report.timeline import timeline
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.rates import rates, seconds_left
from storymem_dist.observe.run.values import RowKey

STATUS_KINDS = {
    "finished": "good",
    "running": "busy",
    "failed": "bad",
    "incomplete": "bad",
    "blocked": "bad",
    "stopped": "calm",
    "waiting": "calm",
    "empty": "calm",
}

FILTER_FROM = 6
"""Smallest number of stories for which the page has a search field."""


def run_page(run: RunView, assets: Assets) -> str:
    """Return the whole page."""
    sections = [
        ("stories", "Stories", _stories(run, assets)),
        ("scores", "Scores", scores_section(run)),
        ("memory", "Memory", _memory(run, assets)),
        ("timeline", "Timeline", timeline(run.state)),
        ("throughput", "Throughput", _throughput(run)),
        ("failures", "Failures", _failures(run)),
        ("settings", "Settings", _settings(run)),
    ]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in sections
    )
    return document(
        title=f"{run.name} · storymem report",
        style=read_asset("style.css"),
        script=read_asset("script.js"),
        body=(
            f'<a class="skip" href="#stories">Skip to the stories</a>{_header(run)}'
            f'<nav aria-label="Parts of the report"><ul>{links}</ul>{theme_button()}</nav>'
            f'<main>{body}</main>{footer(run.written_at)}<div id="tip" role="tooltip" hidden></div>'
        ),
    )


def read_asset(name: str) -> str:
    """Return the text of a file next to this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def theme_button() -> str:
    """The switch between light and dark; it follows the system until it is used."""
    return '<button type="button" id="theme" aria-pressed="false">Dark</button>'


def footer(written_at: float) -> str:
    """Return the end of a page."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written_at))
    return f"<footer>Written {when} by storymem-report from event files and records.</footer>"


def _header(run: RunView) -> str:
    state, speed = run.state, rates(run.state)
    finished = sum(shot.status == "finished" for shot in run.shots)
    failed = sum(shot.status in ("failed", "blocked") for shot in run.shots)
    num_shots = max(len(run.shots), state.num_shots)
    done = sum(story.num_finished == len(story.shots) > 0 for story in run.stories)
    left = seconds_left(state) if run.status == "running" else None
    wasted = fmt.percent(speed.wait_ratio) + " of the time" if speed.wait_ratio is not None else ""
    tiles = [
        tile("Stories", f"{done} of {max(len(run.stories), state.announced_stories)}"),
        tile("Shots", f"{finished} of {num_shots}", f"{failed} failed" if failed else ""),
        tile("Time", fmt.duration(state.up_seconds), f"about {fmt.duration(left)} left" if left else ""),
        tile("Clips per device-hour", fmt.number(speed.clips_per_gpu_hour)),
        tile("Per step", fmt.step_time(speed.seconds_per_step)),
        tile("Waited", fmt.duration(sum(row.waited_seconds for row in state.rows.values())), wasted),
    ]
    if speed.flop_utilisation is not None:
        tiles.append(tile("FLOP utilisation", fmt.percent(speed.flop_utilisation)))
    return (
        f'<header><p class="brand">storymem report</p><h1>{esc(run.name)} '
        f"{chip(run.status, STATUS_KINDS[run.status])}</h1>"
        f'<p class="quiet">run {esc(run.run_id)}{" · created " + _readable(run.created) if run.created else ""}</p>'
        f'<dl class="tiles">{"".join(tiles)}</dl></header>'
    )


# -- stories -----------------------------------------------------------------------------------------------------------


def _stories(run: RunView, assets: Assets) -> str:
    if not run.stories:
        return '<p class="quiet">No story has begun yet.</p>'
    search = ""
    if len(run.stories) >= FILTER_FROM:
        search = (
            '<p class="search"><label for="filter">Find stories</label>'
            '<input type="search" id="filter" autocomplete="off"> <output id="filter-count" for="filter"></output></p>'
        )
    return search + "".join(_story(story, assets) for story in run.stories)


def _story(story: StoryView, assets: Assets) -> str:
    words = " ".join((story.story_id, story.name, *(shot.prompt for shot in story.shots))).lower()
    whole = ""
    if story.video and (address := assets.media(story.video)):
        whole = details(
            "Watch the whole story",
            f'<video class="whole" controls muted playsinline preload="none" src="{address}" '
            f'aria-label="{esc(story.name)}, the whole story"></video>',
        )
    overview = f'<p class="overview">{esc(story.overview)}</p>' if story.overview else ""
    message = f'<p class="trouble">{esc(story.message)}</p>' if story.message else ""
    cards = "".join(shot_card(story, shot, assets) for shot in story.shots)
    return (
        f'<article class="story" id="{anchor("story", story.story_id)}" data-words="{esc(words)}">'
        f'<h3>{esc(story.name)} <span class="quiet">{esc(story.story_id)} · '
        f"{story.num_finished} of {fmt.count(len(story.shots), 'shot')}"
        f'</span></h3>{overview}{message}{whole}<ol class="sheet">{cards}</ol></article>'
    )


def shot_card(story: StoryView, shot: ShotView, assets: Assets, *, run: str = "") -> str:
    """Return one shot of a contact sheet: clip, prompt and facts. ``run`` distinguishes the cards of two runs."""
    facts = [shot.mode.upper()] if shot.mode else []
    facts += [f"seed {shot.seed}"] if shot.seed is not None else []
    facts += [fmt.duration(shot.seconds)] if shot.seconds is not None else []
    facts += [fmt.step_time(shot.seconds_per_step)] if shot.seconds_per_step is not None else []
    facts += [f"{shot.num_reused_steps} of {shot.num_steps} steps reused"] if shot.num_reused_steps else []
    facts += [f"{shot.num_attempts} attempts"] if shot.num_attempts > 1 else []
    marks = "" if shot.status == "finished" else chip(shot.status, STATUS_KINDS[shot.status])
    if not shot.cut and shot.shot_index > 0:
        marks += '<span class="chip calm" title="continues the shot before it">continues</span>'
    identity = anchor("shot", *filter(None, (run,)), story.story_id, shot.shot_id)
    name = f"{run} · " * bool(run) + shot.shot_id.replace("_", " ")
    reason = f'<p class="trouble">{esc(shot.reason)}</p>' if shot.reason else ""
    why = f'<p class="quiet">rendered again: {esc(shot.why)}</p>' if shot.why else ""
    own = f'<p class="quiet">{esc(_own_words(shot.own))}</p>' if shot.own else ""
    own += f'<p class="quiet">{esc(shot_scores(shot))}</p>' if shot.scores else ""
    return (
        f'<li class="card" id="{identity}">{_screen(story, shot, assets, name)}'
        f'<h4>{esc(name)} {marks}</h4><p class="facts">{esc(" · ".join(facts))}</p>'
        f'{reason}{why}{own}<p class="prompt">{esc(shot.prompt)}</p></li>'
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


# -- the other parts ---------------------------------------------------------------------------------------------------


def _memory(run: RunView, assets: Assets) -> str:
    intro = (
        "<p>Which keyframe of which shot was shown to which later shot. Point at a dot for its scores, at a shot for "
        "all that it was shown.</p>"
    )
    parts = [
        f"<details{' open' * (len(run.stories) <= FILTER_FROM)}><summary>{esc(story.name)}</summary>"
        f"{needs_picture(story)}{lineage(story, assets)}</details>"
        for story in run.stories
    ]
    return intro + "".join(parts) if parts else '<p class="quiet">Nothing is remembered yet.</p>'


def _throughput(run: RunView) -> str:
    state = run.state
    if not state.rows:
        return '<p class="quiet">No replica has started yet.</p>'
    keys: list[RowKey | None] = [*sorted(state.rows), None]
    rows = []
    for key in keys:
        pace = rates(state, key)
        of = [state.rows[key]] if key is not None else list(state.rows.values())
        collective = [row.collective_seconds for row in of if row.collective_seconds is not None]
        num_bytes = [row.bytes_read for row in of if row.bytes_read is not None]
        memory = [row.gpu_memory_gib for row in of if row.gpu_memory_gib is not None]
        depths = [depth for row in of for depth in row.queue_depths]
        rows.append(
            (
                esc(state.row_label(key)) if key is not None else "all",
                str(pace.num_clips),
                fmt.duration(pace.seconds_per_clip),
                fmt.step_time(pace.seconds_per_step),
                fmt.number(pace.clips_per_gpu_hour),
                fmt.number(pace.tokens_per_second, 0),
                fmt.percent(pace.flop_utilisation),
                fmt.percent(pace.reuse_ratio),
                fmt.duration(sum(collective) if collective else None),
                fmt.byte_count(sum(num_bytes) if num_bytes else None),
                fmt.gib(max(memory, default=None)),
                fmt.number(sum(depths) / len(depths) if depths else None),
                fmt.percent(pace.wait_ratio),
            )
        )
    heads = (
        "replica",
        "shots",
        "per shot",
        "per step",
        "clips per device-hour",
        "tokens/s",
        "FLOP utilisation",
        "steps reused",
    )
    speed = table(
        "Throughput by replica",
        (*heads, "in collectives", "bytes read", "device memory", "shots ready", "waited"),
        rows,
        numeric=range(1, 13),
    )
    speed += (
        '<p class="quiet">In collectives: time that its leader spent in collectives, where that can be measured. '
        "Shots ready: mean number of shots that could be started when the replica took one.</p>"
    )
    loads = [
        (
            esc(state.row_label(key)),
            esc(f"{done.action} {done.what}"),
            fmt.byte_count(done.bytes_total),
            fmt.duration(done.elapsed_seconds),
            fmt.byte_rate(done.bytes_total, done.elapsed_seconds),
        )
        for key, row in sorted(state.rows.items())
        for done in row.weights_done
    ]
    if not loads:
        return speed
    weights = table("Weights", ("replica", "what", "size", "time", "rate"), loads, numeric=(2, 3, 4))
    return speed + details(f"Weights ({len(loads)} loads)", weights)


def _failures(run: RunView) -> str:
    state = run.state
    parts = []
    if state.failures:
        rows = [
            (
                esc(f"{failure.story_id}/{failure.shot_id}" if failure.shot_id else failure.story_id),
                _clock(failure.wall_time),
                esc(failure.stage),
                esc(failure.reason),
                "yes" if failure.will_retry else "no",
            )
            for failure in state.failures
        ]
        parts.append(table("What failed", ("shot", "when", "stage", "reason", "tried again"), rows))
    else:
        parts.append('<p class="quiet">Nothing failed.</p>')
    resumed = sum(row.num_resumed for row in state.rows.values())
    starts = sum(len(row.starts) for row in state.rows.values())
    lost = sum(attempt.outcome == "interrupted" for attempt in state.attempts())
    facts = [fmt.count(starts, "replica start")]
    facts += [f"{fmt.count(resumed, 'shot')} resumed from a checkpoint"] if resumed else []
    facts += [f"{fmt.count(lost, 'attempt')} interrupted"] if lost else []
    parts.append(f"<p>{esc(', '.join(facts))}.</p>")
    if state.stops:
        stops = [(_clock(when), esc(reason)) for when, reason in state.stops]
        parts.append(details(f"Stop requests ({len(stops)})", table("Stop requests", ("when", "reason"), stops)))
    if state.warnings:
        warnings = [(_clock(when), esc(message)) for when, message in state.warnings]
        parts.append(details(f"Warnings ({len(warnings)})", table("Warnings", ("when", "message"), warnings)))
    if run.left_out:
        files = [(esc(message),) for message in run.left_out]
        parts.append(details(f"Files that were left out ({len(files)})", table("Files left out", ("file",), files)))
    return "".join(parts)


def _settings(run: RunView) -> str:
    rows = [(esc(name), esc(version)) for name, version in sorted(run.state.versions.items())]
    parts = [chosen(run.state.choices)] if run.state.choices else []
    if rows:
        parts.append(table("Versions", ("package", "version"), rows, compact=True))
    if run.config:
        scroll = 'role="region" aria-label="Configuration" tabindex="0"'
        parts.append(
            f"<details><summary>Configuration {esc(run.config_hash)}</summary>"
            f'<pre class="scroll" {scroll}>{esc(run.config)}</pre></details>'
        )
    return "".join(parts) or '<p class="quiet">Not known yet.</p>'


def _readable(created: str) -> str:
    return esc(created.replace("T", " ").replace("Z", " UTC"))


def _clock(wall_time: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_time))
