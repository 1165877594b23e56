"""What an event changes in one row of a run and in its open attempts. ``state`` decides which row it is."""

import storymem_dist.events as ev
from storymem_dist.observe.run.values import Attempt, Row, Span


def end_attempt(row: Row, attempt: Attempt, outcome: str, when: float) -> None:
    """End an open attempt of a row, and the stages of its shot."""
    attempt.outcome, attempt.end = outcome, max(attempt.start, when)
    close_spans(row, [span for span in row.open_spans if attempt.owns(span)], when)
    if attempt is row.saving:
        row.saving = None
    else:
        row.attempt = None
        row.recent_steps.clear()


def close_spans(row: Row, spans: list[Span], when: float) -> None:
    """End open stages."""
    for span in spans:
        row.open_spans.remove(span)
        span.end = max(span.start, when)
        row.spans.append(span)


def stage_finished(row: Row, now: float, event: ev.StageFinished) -> None:
    """A stage is over, whether or not its start was seen."""
    for span in reversed(row.open_spans):
        if (span.kind, span.story_id, span.shot_id) == (event.stage, event.story_id, event.shot_id):
            row.open_spans.remove(span)
            break
    row.spans.append(
        Span(
            kind=event.stage,
            start=now - event.elapsed_seconds,
            end=now,
            story_id=event.story_id,
            shot_id=event.shot_id,
        )
    )
    attempt = row.open_attempt(event.story_id or "", event.shot_id or "")
    if attempt is not None:
        attempt.stage_seconds[event.stage] = attempt.stage_seconds.get(event.stage, 0.0) + event.elapsed_seconds


def step_finished(row: Row, event: ev.StepFinished) -> None:
    """A denoising step is done."""
    row.recent_steps.append(event.elapsed_seconds)
    if event.gpu_memory_gib is not None:
        row.gpu_memory_gib = event.gpu_memory_gib
    attempt = row.open_attempt(event.story_id, event.shot_id)
    if attempt is None:
        return
    attempt.step, attempt.num_steps = event.step, event.num_steps
    attempt.num_timed_steps += 1
    attempt.num_reused_steps += event.reused
    attempt.step_seconds += event.elapsed_seconds
    steps, seconds = attempt.expert_steps.get(event.expert, (0, 0.0))
    attempt.expert_steps[event.expert] = (steps + 1, seconds + event.elapsed_seconds)


def throughput(row: Row, event: ev.ThroughputSampled) -> None:
    """A sample of what only the process knows."""
    if event.gpu_memory_gib is not None:
        row.gpu_memory_gib = event.gpu_memory_gib
    if event.queue_depth is not None:
        row.queue_depths.append(event.queue_depth)
    if event.collective_seconds is not None:
        row.collective_seconds = (row.collective_seconds or 0.0) + event.collective_seconds
    if event.bytes_read is not None:
        row.bytes_read = (row.bytes_read or 0) + event.bytes_read
