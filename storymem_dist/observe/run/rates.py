"""The speed of a run and the time it has left, computed from its folded events. Measures nothing itself."""

from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import Attempt, Rates, RowKey
from storymem_dist.story.modes import GIVEN


def rates(state: RunState, key: RowKey | None = None) -> Rates:
    """Return the rates of one row, or of the whole run. Clips that a storyboard gives are no work and do not count."""
    return _rates(state, key, [a for a in state.attempts() if key is None or a.row == key])


def rates_of_all(state: RunState) -> dict[RowKey | None, Rates]:
    """Return the rates of every row, and of the whole run under None; see ``rates``."""
    attempts = state.attempts()
    by_row: dict[RowKey | None, list[Attempt]] = {key: [] for key in state.rows}
    for attempt in attempts:
        by_row[attempt.row].append(attempt)
    return {key: _rates(state, key, of) for key, of in {**by_row, None: attempts}.items()}


def _rates(state: RunState, key: RowKey | None, attempts: list[Attempt]) -> Rates:
    rows = [state.rows[key]] if key is not None else list(state.rows.values())
    finished = [a for a in attempts if a.outcome == "finished" and a.started.mode != GIVEN]
    timed = [a for a in attempts if a.num_timed_steps]
    steps = sum(a.num_timed_steps for a in timed)
    step_seconds = sum(a.step_seconds for a in timed)
    device_seconds = sum(row.device_seconds for row in rows)
    alive = sum(row.alive_seconds for row in rows)
    with_tokens = [a for a in timed if a.started.num_tokens is not None]
    token_seconds = sum(a.step_seconds for a in with_tokens)
    tokens = sum((a.started.num_tokens or 0) * a.num_timed_steps for a in with_tokens)
    return Rates(
        num_clips=len(finished),
        device_seconds=device_seconds,
        clips_per_gpu_hour=len(finished) * 3600.0 / device_seconds if device_seconds > 0 and finished else None,
        seconds_per_step=step_seconds / steps if steps else None,
        seconds_per_clip=_mean([a.end - a.start for a in finished if a.end is not None]),
        tokens_per_second=tokens / token_seconds if token_seconds > 0 else None,
        flop_utilisation=_flop_utilisation(state, timed),
        reuse_ratio=sum(a.num_reused_steps for a in timed) / steps if steps else None,
        wait_ratio=sum(row.waited_seconds for row in rows) / alive if alive > 0 else None,
    )


def seconds_left(state: RunState) -> float | None:
    """Estimate the seconds until the batch is done; None where nothing is known.

    The larger of: all remaining shots spread over the live replicas, and the longest path of shots that wait for each
    other, both at the mean time of the clips so far. Skipped stories do not count. Before the first clip:
    what the newest plan predicts.
    """
    seconds_per_clip = rates(state).seconds_per_clip
    if seconds_per_clip is None:
        return _planned_seconds_left(state)
    over = state.count("finished") + state.count("failed") + state.count("blocked")
    skipped = state.skipped
    left_out = sum(story.num_left for story in state.stories.values() if story.story_id in skipped)
    remaining = max(0, state.num_shots - over - left_out)
    paths = [story.longest_left for story in state.stories.values() if story.story_id not in skipped]
    live = sum(not row.is_over for row in state.rows.values()) or 1
    running = sum(
        min(1.0, row.attempt.step / row.attempt.num_steps)
        for row in state.rows.values()
        if row.attempt is not None and row.attempt.num_steps
    )
    spread = max(0.0, remaining - running) / live
    longest = max(0.0, max(paths, default=0) - (1.0 if running else 0.0))
    return seconds_per_clip * max(spread, longest)


def _planned_seconds_left(state: RunState) -> float | None:
    planned = [(when, event.total_seconds) for when, event in state.choices if event.total_seconds is not None]
    if not planned:
        return None
    when, total = max(planned)
    return max(0.0, total - (state.last_time - when))


def _flop_utilisation(state: RunState, timed: list[Attempt]) -> float | None:
    done, possible = 0.0, 0.0
    for attempt in timed:
        row = state.rows[attempt.row]
        start = next((s for s in row.starts if s.writer == attempt.writer), None)
        if start is None or start.job.peak_tflops is None or attempt.started.tflop_per_step is None:
            continue
        done += attempt.started.tflop_per_step * (attempt.num_timed_steps - attempt.num_reused_steps)
        num_devices = attempt.started.num_devices or start.job.num_devices
        possible += attempt.step_seconds * start.job.peak_tflops * num_devices
    return done / possible if possible > 0 else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
