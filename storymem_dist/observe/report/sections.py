"""The parts of a report that are about the whole run: its queue, speed, failures and settings.

Knows the report's values and HTML; nothing of event files or records.
"""

import time
from collections.abc import Sequence

from storymem_dist.observe.report.chosen import chosen
from storymem_dist.observe.report.html import details, esc, table
from storymem_dist.observe.report.timeline import MAX_ROWS
from storymem_dist.observe.report.views import RunView
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.rates import rates_of_all
from storymem_dist.observe.run.values import RowKey

MAX_LISTED = 200
"""Most failures, warnings, requests and so on that a page lists."""


def requests(run: RunView) -> str:
    """Return what people asked of the queue, newest first."""
    if not run.requests:
        return '<p class="quiet">Nobody has changed the queue. storymem-queue does.</p>'
    held = ""
    if run.paused is not None:
        by = f"by {esc(run.paused.who)} at {clock(run.paused.when)}"
        held = f'<p class="trouble">Paused {by}: no shot begins until somebody resumes.</p>'
    rows = [
        (str(one.number), clock(one.when), esc(one.who), esc(one.what), esc(one.effect), esc(one.via))
        for one in run.requests[: -MAX_LISTED - 1 : -1]
    ]
    heads = ("number", "when", "who", "what", "effect", "from")
    return held + table("Requests", heads, rows) + more(len(run.requests) - MAX_LISTED, "request")


def more(number: int, one: str) -> str:
    """Return a sentence that says how many are not listed; empty for none."""
    return f'<p class="quiet">and {fmt.count(number, f"more {one}")}</p>' if number > 0 else ""


def clock(wall_time: float) -> str:
    """Return a wall time in seconds since the epoch for people, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_time))


def throughput(run: RunView) -> str:
    """Return the speed of the replicas and of the run, and what was loaded."""
    state = run.state
    if not state.rows:
        return '<p class="quiet">No replica has started yet.</p>'
    paces = rates_of_all(state)
    keys: list[RowKey | None] = [*sorted(state.rows)[:MAX_ROWS], None]
    rows = []
    for key in keys:
        pace = paces[key]
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
    speed += more(len(state.rows) - MAX_ROWS, "replica")
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
    weights = table("Weights", ("replica", "what", "size", "time", "rate"), loads[:MAX_ROWS], numeric=(2, 3, 4))
    return speed + details(f"Weights ({len(loads)} loads)", weights + more(len(loads) - MAX_ROWS, "load"))


def failures(run: RunView) -> str:
    """Return what failed, newest first, and what else people should know. Long lists end with a count."""
    state = run.state
    parts = []
    if state.failures:
        rows = [
            (
                esc(f"{failure.story_id}/{failure.shot_id}" if failure.shot_id else failure.story_id),
                clock(failure.wall_time),
                esc(failure.stage),
                esc(failure.reason),
                "yes" if failure.will_retry else "no",
            )
            for failure in state.failures[: -MAX_LISTED - 1 : -1]
        ]
        parts.append(table("What failed", ("shot", "when", "stage", "reason", "tried again"), rows))
        parts.append(more(len(state.failures) - MAX_LISTED, "failure"))
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
        parts.append(_messages("Stop requests", "reason", state.stops))
    if state.warnings:
        parts.append(_messages("Warnings", "message", state.warnings))
    if run.left_out:
        files = [(esc(message),) for message in run.left_out[:MAX_LISTED]]
        listed = table("Files left out", ("file",), files) + more(len(run.left_out) - MAX_LISTED, "file")
        parts.append(details(f"Files that were left out ({len(run.left_out)})", listed))
    return "".join(parts)


def _messages(title: str, head: str, messages: Sequence[tuple[float, str]]) -> str:
    rows = [(clock(when), esc(message)) for when, message in messages[: -MAX_LISTED - 1 : -1]]
    listed = table(title, ("when", head), rows) + more(len(messages) - MAX_LISTED, "line")
    return details(f"{title} ({len(messages)})", listed)


def settings(run: RunView) -> str:
    """Return the layouts that were chosen, versions and the configuration."""
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
