"""The summary of a run: what is done, how fast it went, what failed, as tables for a terminal.

Built from the events of a run folder alone, so it works during a run, after it, and after a crash. Knows no records.
"""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from storymem_dist.events import STAGES
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.rates import rates
from storymem_dist.observe.run.state import RunState
from storymem_dist.terminal.text import printable

MAX_ROWS = 40
"""Replicas and failures that are listed; the others are only counted."""


def load_run_state(run_folder: Path) -> RunState:
    """Fold all events of ``RUN/events`` into one state."""
    state = RunState()
    for stamped in read_journal(run_folder / "events"):
        state.apply(stamped)
    return state


def summary(state: RunState) -> RenderableType:
    """Return the summary of a run, to be printed by a rich console."""
    parts: list[RenderableType] = [_headline(state), _stage_table(state), _replica_table(state)]
    if state.requests:
        parts.append(_request_table(state))
    if state.failures:
        parts.append(_failure_table(state))
    return Group(*parts)


def _headline(state: RunState) -> Text:
    speed = rates(state)
    stories_done = sum(story.outcome == "finished" for story in state.stories.values())
    num_stories = max(len(state.stories), state.announced_stories)
    rendered = speed.num_clips
    known = sum(s.committed_before for story in state.stories.values() for s in story.shots.values() if not s.attempts)
    resumed = sum(row.num_resumed for row in state.rows.values())
    failed = state.count("failed") + state.count("blocked")
    text = Text()
    text.append(f"{stories_done} of {fmt.count(num_stories, 'story', 'stories')} done", style="bold")
    text.append(f" · {fmt.count(rendered, 'shot')} rendered")
    if known:
        text.append(f" · {known} already committed")
    if resumed:
        text.append(f" · {resumed} resumed from a checkpoint")
    text.append(f" · {failed} failed", style="bold red" if failed else "")
    text.append(f" · {fmt.duration(state.up_seconds)}")
    if speed.clips_per_gpu_hour is not None:
        text.append(f" · {fmt.number(speed.clips_per_gpu_hour)} clips per device-hour")
    if speed.reuse_ratio:
        text.append(f" · {fmt.percent(speed.reuse_ratio)} of the steps reused")
    return text


def _stage_table(state: RunState) -> Table:
    totals: dict[str, tuple[int, float]] = {}
    for row in state.rows.values():
        for span in row.spans:
            if span.end is not None:
                num, seconds = totals.get(span.kind, (0, 0.0))
                totals[span.kind] = (num + 1, seconds + span.end - span.start)
    whole = sum(seconds for _, seconds in totals.values()) or 1.0
    table = Table(title="Time per stage", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, justify in (("stage", "left"), ("times", "right"), ("mean", "right"), ("total", "right"), ("", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stage in (*STAGES, "wait", *sorted(set(totals) - {*STAGES, "wait"})):
        if stage in totals:
            num, seconds = totals[stage]
            share = fmt.percent(seconds / whole)
            table.add_row(stage, f"{num:,}", fmt.duration(seconds / num), fmt.duration(seconds), share)
    return table


def _replica_table(state: RunState) -> Table:
    table = Table(title="Replicas", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("replica")
    for name in ("devices", "shots", "failed", "per step", "up", "waited"):
        table.add_column(name, justify="right")
    for number, (key, row) in enumerate(sorted(state.rows.items())):
        if number == MAX_ROWS:
            table.add_row(f"and {len(state.rows) - MAX_ROWS} more")
            break
        table.add_row(
            state.row_label(key),
            str(row.num_devices),
            str(row.num_finished),
            str(row.num_failed),
            fmt.step_time(rates(state, key).seconds_per_step),
            fmt.duration(row.alive_seconds),
            fmt.duration(row.waited_seconds),
        )
    return table


def _request_table(state: RunState) -> Table:
    table = Table(title="Requests", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", justify="right")
    for name in ("request", "by", "applied after", "effect"):
        table.add_column(name, overflow="fold")
    for number, one in sorted(state.requests.items())[-MAX_ROWS:]:
        asked = f"{one.request.action} {one.request.story_id}".strip()
        after = fmt.duration(one.seconds_to_effect)
        if len(one.applied) > 1:
            after = f"{after} (all: {fmt.duration(one.seconds_to_all)})"
        texts = (asked, one.request.who, after, "; ".join(one.messages))
        table.add_row(str(number), *(Text(printable(text)) for text in texts))
    return table


def _failure_table(state: RunState) -> Table:
    table = Table(title="Failures", title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("shot", "stage", "reason"):
        table.add_column(name, overflow="fold")
    for failure in state.failures[:MAX_ROWS]:
        shot = f"{failure.story_id}/{failure.shot_id}" if failure.shot_id else failure.story_id
        again = " (tried again)" if failure.will_retry else ""
        table.add_row(Text(printable(shot)), failure.stage, Text(printable(failure.reason + again)))
    if len(state.failures) > MAX_ROWS:
        table.add_row(f"and {len(state.failures) - MAX_ROWS} more")
    return table
