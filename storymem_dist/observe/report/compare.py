"""Two runs side by side: their figures, the settings that differ, and their shots, to be played together.

Knows the report's values and HTML; nothing of event files or records.
"""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from storymem_dist.observe.report.assets import Assets
from storymem_dist.observe.report.cards import STATUS_KINDS, shot_card
from storymem_dist.observe.report.html import anchor, chip, document, esc, table
from storymem_dist.observe.report.page import footer, read_asset, theme_button
from storymem_dist.observe.report.scores import compared_figures, compared_stories
from storymem_dist.observe.report.views import RunView, ShotView, StoryView
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.files import parse_config
from storymem_dist.observe.run.rates import rates


def comparison_page(left: RunView, right: RunView, left_assets: Assets, right_assets: Assets) -> str:
    """Return the page that compares two runs."""
    sections = [
        ("figures", "Figures", _figures(left, right)),
        ("scores", "Scores", compared_stories(left, right)),
        ("differences", "Settings that differ", _differences(left, right)),
        ("stories", "Shots", _stories(left, right, left_assets, right_assets)),
    ]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in sections
    )
    runs = " ".join(
        f'<span class="side">{mark} {esc(run.name)} {chip(run.status, STATUS_KINDS[run.status])}</span>'
        for mark, run in (("A", left), ("B", right))
    )
    return document(
        title=f"{left.name} and {right.name} · storymem report",
        style=read_asset("style.css"),
        scripts=[read_asset("script.js")],
        body=(
            f'<a class="skip" href="#stories">Skip to the shots</a><header><p class="brand">storymem report</p>'
            f'<h1>Two runs</h1><p class="sides">{runs}</p></header>'
            f'<nav aria-label="Parts of the report"><ul>{links}</ul>{theme_button()}</nav>'
            f'<main>{body}</main><footer>{footer(left.written_at)}</footer><div id="tip" role="tooltip" hidden></div>'
        ),
    )


def _figures(left: RunView, right: RunView) -> str:
    def figures(run: RunView) -> list[tuple[str, float | None]]:
        speed, state = rates(run.state), run.state
        kept = sum(decision.verdict.startswith("kept") for shot in run.shots for decision in shot.decisions)
        return [
            ("shots finished", float(sum(shot.status == "finished" for shot in run.shots))),
            ("shots failed", float(sum(shot.status in ("failed", "blocked") for shot in run.shots))),
            ("seconds in all", state.up_seconds),
            ("seconds per shot", speed.seconds_per_clip),
            ("seconds per step", speed.seconds_per_step),
            ("clips per device-hour", speed.clips_per_gpu_hour),
            ("share of steps reused (%)", 100 * speed.reuse_ratio if speed.reuse_ratio is not None else None),
            ("share of time waited (%)", 100 * speed.wait_ratio if speed.wait_ratio is not None else None),
            ("keyframes kept", float(kept)),
        ]

    measured = []
    for (name, a), (_, b) in zip(figures(left), figures(right), strict=True):
        measured.append((name, a, b, 0 if (a or 0.0).is_integer() and (b or 0.0).is_integer() else 2))
    rows = []
    for name, a, b, digits in [*measured, *compared_figures(left, right)]:
        change = f"{100 * (b / a - 1):+.1f} %" if a and b is not None else ""
        rows.append((esc(name), fmt.number(a, digits), fmt.number(b, digits), change))
    return table("Figures of both runs", ("", "A", "B", "B against A"), rows, numeric=(1, 2, 3), compact=True)


def _differences(left: RunView, right: RunView) -> str:
    a, b = (dict(_flat("", parse_config(run.config))) for run in (left, right))
    rows = [
        (esc(key), esc(a.get(key, fmt.DASH)), esc(b.get(key, fmt.DASH)))
        for key in sorted({**a, **b})
        if a.get(key) != b.get(key) and key != "output"
    ]
    if not rows:
        return '<p class="quiet">None.</p>'
    return table("Settings that differ", ("setting", "A", "B"), rows, compact=True)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    elif prefix:
        yield prefix, str(value)


def _stories(left: RunView, right: RunView, left_assets: Assets, right_assets: Assets) -> str:
    a, b = ({story.story_id: story for story in run.stories} for run in (left, right))
    parts = []
    for story_id in sorted({**a, **b}):
        story = a.get(story_id) or b[story_id]
        pairs = zip_longest(a[story_id].shots if story_id in a else (), b[story_id].shots if story_id in b else ())
        rendered = [pair for pair in pairs if any(shot is not None and shot.clip for shot in pair)]
        rows = "".join(_pair(story, one, other, left_assets, right_assets) for one, other in rendered)
        rows = rows or '<p class="quiet">No shot is finished in either run.</p>'
        parts.append(
            f'<article class="story" id="{anchor("story", story_id)}"><h3>{esc(story.name)} '
            f'<span class="quiet">{esc(story_id)}</span></h3>{rows}</article>'
        )
    return "".join(parts) or '<p class="quiet">No story has begun in either run.</p>'


def _pair(
    story: StoryView, one: ShotView | None, other: ShotView | None, left_assets: Assets, right_assets: Assets
) -> str:
    cards = []
    for side, shot, assets in (("A", one, left_assets), ("B", other, right_assets)):
        if shot is None:
            cards.append(f'<li class="card"><div class="screen">not in {side}</div></li>')
        else:
            cards.append(shot_card(story, shot, assets, run=side))
    shot_id = (one or other).shot_id if one or other else ""  # type: ignore[union-attr]
    facts = f"{shot_id.replace('_', ' ')}: {_memory_difference(one, other)}"
    button = ""
    if one is not None and other is not None and one.clip and other.clip:
        button = f'<button type="button" class="together" aria-label="Play both of {esc(shot_id)}">Play both</button>'
    return (
        f'<div class="pair"><p class="facts">{esc(facts)} {button}</p><ol class="sheet two">{"".join(cards)}</ol></div>'
    )


def _memory_difference(one: ShotView | None, other: ShotView | None) -> str:
    if one is None or other is None:
        return "only in one run"
    a, b = ({(d.source_shot_index, d.slot) for d in shot.recalled} for shot in (one, other))
    if a == b:
        return f"shown the same {fmt.count(len(a), 'keyframe')}"
    return f"shown {len(a & b)} keyframes in both, {len(a - b)} only in A, {len(b - a)} only in B"
