"""The state of a run, folded from its events, as console, W&B, summary and report all use it.

``RunState.apply`` takes stamped events of any number of writers, roughly in order of time. It is one class because
nearly every event changes rows, attempts and shots at once; what changes one row alone is in ``row_changes``. The types
are in ``values``, speeds in ``rates``. Knows events; nothing of files, terminals or services.
"""

from dataclasses import replace

import storymem_dist.events as ev
from storymem_dist.observe.run import row_changes
from storymem_dist.observe.run.values import (
    AppliedRequest,
    Attempt,
    Failure,
    Row,
    RowKey,
    ShotState,
    Span,
    Start,
    StoryState,
)

SILENCE_SECONDS = 60.0
"""The next job continues the row of a replica that sent nothing for this long (system samples come more often)."""


class RunState:
    """What is known of a run from its events so far."""

    def __init__(self) -> None:
        self.run_id = ""
        self.stories: dict[str, StoryState] = {}
        self.rows: dict[RowKey, Row] = {}
        self.systems: dict[tuple[str, int], ev.SystemSampled] = {}
        self.failures: list[Failure] = []
        self.warnings: list[tuple[float, str]] = []
        self.stops: list[tuple[float, str]] = []
        self.requests: dict[int, AppliedRequest] = {}
        self.choices: list[tuple[float, ev.LayoutChosen]] = []
        self.versions: dict[str, str] = {}
        self.config_hashes: list[str] = []
        self.announced_shots = 0
        self.announced_stories = 0
        self.first_time: float | None = None
        self.last_time = 0.0
        self.num_events = 0
        self.keyframe_scores: dict[tuple[str, int, int], ev.MemoryDecided] = {}
        self._row_of_writer: dict[str, RowKey] = {}

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def num_shots(self) -> int:
        """Shots of the whole batch, as far as known."""
        known = sum(max(story.num_shots, len(story.shots)) for story in self.stories.values())
        return max(known, self.announced_shots)

    @property
    def up_seconds(self) -> float:
        """Seconds during which at least one replica was up: without the pauses between a stop and a restart."""
        seconds, reached = 0.0, 0.0
        for start, end in sorted((s.start, s.last_seen) for row in self.rows.values() for s in row.starts):
            seconds += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return seconds

    @property
    def skipped(self) -> set[str]:
        """Ids of the stories that people asked to skip, as far as replicas have applied it."""
        skipped: set[str] = set()
        for _, one in sorted(self.requests.items()):
            if one.request.action == "skip":
                skipped.add(one.request.story_id)
            elif one.request.action in ("unskip", "first"):
                skipped.discard(one.request.story_id)
        return skipped

    def count(self, status: str) -> int:
        """Number of shots in ``status`` (``waiting`` counts only shots that an event has named)."""
        return sum(shot.status == status for story in self.stories.values() for shot in story.shots.values())

    def attempts(self) -> list[Attempt]:
        """All attempts, story by story in order."""
        return [a for story in self.stories.values() for shot in story.shots.values() for a in shot.attempts]

    def with_scores(self, event: ev.MemoryDecided) -> ev.MemoryDecided:
        """Return a decision about a keyframe of the bank with the scores that the keyframe had when it was kept."""
        if event.verdict not in ("recalled", "evicted") or event.slot is None:
            return event
        kept = self.keyframe_scores.get((event.story_id, event.source_shot_index, event.slot))
        if kept is None:
            return event
        return replace(
            event,
            similarity=kept.similarity if event.similarity is None else event.similarity,
            bank_similarity=kept.bank_similarity if event.bank_similarity is None else event.bank_similarity,
            against=kept.against if event.against is None else event.against,
            quality=kept.quality if event.quality is None else event.quality,
        )

    def row_label(self, key: RowKey) -> str:
        """``replica 0``, or ``job 2 replica 0`` if several jobs worked at the same time."""
        name, replica = key
        return f"{name} replica {replica}" if name else f"replica {replica}"

    def newest_start(self, job: str, replica: int) -> Start | None:
        """The last start of a replica of ``job``; None if there is none."""
        starts = [
            start
            for row in self.rows.values()
            for start in row.starts
            if row.key[1] == replica and start.job.job == job
        ]
        return max(starts, key=lambda start: start.start, default=None)

    # -- folding -------------------------------------------------------------------------------------------------------

    def apply(self, stamped: ev.StampedEvent) -> None:
        """Apply one event."""
        now, event = stamped.wall_time, stamped.event
        self.num_events += 1
        self.first_time = now if self.first_time is None else min(self.first_time, now)
        self.last_time = max(self.last_time, now)
        if isinstance(event, ev.WarningIssued):  # also from writers that render nothing
            self.warnings.append((now, event.message))
            return
        if isinstance(event, ev.SystemSampled):
            self.systems[(event.host, event.rank)] = event
            self._see(stamped)
            return
        if isinstance(event, ev.JobStarted):
            self._job_started(stamped, event)
            return
        row = self._row(stamped)
        row.last_seen = max(row.last_seen, now)
        self._see(stamped)
        match event:
            case ev.JobFinished():
                self._job_finished(row, stamped, event)
            case ev.StoryStarted():
                story = self._story(event.story_id)
                story.name, story.num_shots = event.name or story.name, max(story.num_shots, event.num_shots)
                story.waits_for, story.priority = event.waits_for or story.waits_for, event.priority
            case ev.StoryFinished():
                story = self._story(event.story_id)
                story.outcome, story.video, story.message = event.outcome, event.video, event.message
            case ev.ShotStarted():
                self._shot_started(row, stamped, event)
            case ev.ShotFinished() | ev.ShotFailed() | ev.ShotResumed() | ev.ShotSkipped():
                self._shot_changed(row, now, event)
            case ev.StageStarted():
                row.open_spans.append(Span(kind=event.stage, start=now, story_id=event.story_id, shot_id=event.shot_id))
                attempt = row.open_attempt(event.story_id or "", event.shot_id or "")
                if attempt is not None and event.stage == "save":
                    attempt.is_rendered = True
            case ev.StageFinished():
                row_changes.stage_finished(row, now, event)
            case ev.StepFinished():
                row_changes.step_finished(row, event)
            case ev.MemoryDecided():
                self._memory_decided(row, event)
            case ev.WeightsProgress():
                row.weights[event.what] = event
                if event.bytes_done >= event.bytes_total:
                    row.weights_done.append(row.weights.pop(event.what))
            case ev.ThroughputSampled():
                row_changes.throughput(row, event)
            case ev.ReplicaWaited():
                row.waited_seconds += event.elapsed_seconds
                row.spans.append(Span(kind="wait", start=now - event.elapsed_seconds, end=now))
            case ev.ReplicaHelped():
                began = now - event.elapsed_seconds
                row.spans.append(Span("helping", began, now, event.story_id, event.shot_id))
            case ev.StoryboardRejected():
                self.failures.append(Failure(wall_time=now, story_id=event.source, shot_id="", reason=event.message))
            case ev.StopRequested():
                self.stops.append((now, event.reason))
            case ev.RequestApplied(at_start=True) if event.number in self.requests:
                pass
            case ev.RequestApplied():
                if event.number not in self.requests:
                    self.requests[event.number] = AppliedRequest(request=event)
                    if event.action == "rerender" and event.story_id in self.stories:
                        self.stories[event.story_id].render_again(event.shots)
                self.requests[event.number].applied.append((now, row.key, event.message))
            case ev.LayoutChosen():
                self.choices.append((now, event))

    def _row(self, stamped: ev.StampedEvent) -> Row:
        key = self._row_of_writer.setdefault(stamped.writer, ("", stamped.replica))
        row = self.rows.setdefault(key, Row(key=key))
        newest = row.starts[-1] if row.starts else None
        if newest is not None and newest.writer != stamped.writer and stamped.wall_time > newest.start:
            return self._split_row(stamped, row)
        return row

    def _new_row(self, stamped: ev.StampedEvent) -> Row:
        """Create a row whose name differs from those of other jobs with the same replica number."""
        number = sum(replica == stamped.replica for _, replica in self.rows)
        key = (f"job {number + 1}" if number else "", stamped.replica)
        self._row_of_writer[stamped.writer] = key
        return self.rows.setdefault(key, Row(key=key))

    def _row_to_continue(self, job: str, replica: int, now: float) -> Row | None:
        """The row of an earlier start of the same job, else one whose job has ended or is silent."""
        rows = [row for key, row in sorted(self.rows.items()) if key[1] == replica]
        for row in rows:
            if row.starts and row.starts[-1].job.job == job:
                return row
        return next((row for row in rows if row.is_over or now - row.last_seen > SILENCE_SECONDS), None)

    def _split_row(self, stamped: ev.StampedEvent, row: Row) -> Row:
        """Move a writer to its own row: it still sends events although its row has a newer start.

        So the newer start was not a restart but a second job on the same folder with the same name (jobs that people
        start by hand have none).
        """
        own = [start for start in row.starts if start.writer == stamped.writer]
        separate = self._new_row(stamped)
        separate.starts.extend(own)
        row.starts = [start for start in row.starts if start.writer != stamped.writer]
        attempts = sorted((a for a in self.attempts() if a.writer == stamped.writer), key=lambda a: a.start)
        for attempt in attempts:
            attempt.row = separate.key
            row.num_finished -= attempt.outcome == "finished"
            separate.num_finished += attempt.outcome == "finished"
        for attempt in attempts[-2:]:  # the last two may have been marked ended by mistake
            if attempt.outcome == "interrupted":
                separate.saving, separate.attempt = separate.attempt, attempt
                attempt.outcome, attempt.end = "running", None
                self._shot(attempt.started.story_id, attempt.started.shot_id).status = "running"
        return separate

    def _see(self, stamped: ev.StampedEvent) -> None:
        key = self._row_of_writer.get(stamped.writer)
        if key is None:
            return
        for start in reversed(self.rows[key].starts):
            if start.writer == stamped.writer:
                start.last_seen = max(start.last_seen, stamped.wall_time)
                return

    def _job_started(self, stamped: ev.StampedEvent, event: ev.JobStarted) -> None:
        now = stamped.wall_time
        row = self._row_to_continue(event.job, stamped.replica, now)
        if row is None:
            row = self._new_row(stamped)
        self._row_of_writer[stamped.writer] = row.key
        if not row.starts or row.starts[-1].start <= now:  # else an earlier start whose event arrives late
            self._close_open(row, "interrupted", row.last_seen)
        row.starts.append(Start(writer=stamped.writer, job=event, start=now, last_seen=now))
        row.starts.sort(key=lambda start: start.start)
        row.last_seen = max(row.last_seen, now)
        self.run_id = event.run_id or self.run_id
        self.versions.update(event.versions)
        self.announced_shots = max(self.announced_shots, event.num_shots)
        self.announced_stories = max(self.announced_stories, event.num_stories)
        if event.config_hash and event.config_hash not in self.config_hashes:
            self.config_hashes.append(event.config_hash)

    def _job_finished(self, row: Row, stamped: ev.StampedEvent, event: ev.JobFinished) -> None:
        self._close_open(row, "stopped" if event.outcome == "stopped" else "interrupted", stamped.wall_time)
        for start in row.starts:
            if start.writer == stamped.writer:
                start.outcome = event.outcome

    def _close_open(self, row: Row, outcome: str, when: float) -> None:
        """End the open attempts and stages of a row whose process has ended."""
        for attempt in (row.saving, row.attempt):
            if attempt is not None:
                self._interrupt(row, attempt, outcome, when)
        row_changes.close_spans(row, list(row.open_spans), when)
        row.weights.clear()

    def _interrupt(self, row: Row, attempt: Attempt, outcome: str, when: float) -> None:
        """End an attempt that neither finished nor failed."""
        row_changes.end_attempt(row, attempt, outcome, when)
        shot = self._shot(attempt.started.story_id, attempt.started.shot_id)
        if shot.last is attempt:
            shot.status = "waiting"

    def _story(self, story_id: str) -> StoryState:
        return self.stories.setdefault(story_id, StoryState(story_id=story_id, number=len(self.stories)))

    def _shot(self, story_id: str, shot_id: str) -> ShotState:
        shots = self._story(story_id).shots
        return shots.setdefault(shot_id, ShotState(story_id=story_id, shot_id=shot_id))

    def _shot_started(self, row: Row, stamped: ev.StampedEvent, event: ev.ShotStarted) -> None:
        being_saved = row.attempt if row.attempt is not None and row.attempt.is_rendered else None
        for before in (row.saving, row.attempt):
            if before is not None and before is not being_saved:
                self._interrupt(row, before, "interrupted", stamped.wall_time)
        row.saving = being_saved
        row.weights.clear()
        row.recent_steps.clear()
        attempt = Attempt(
            started=event, row=row.key, writer=stamped.writer, start=stamped.wall_time, num_steps=event.num_steps
        )
        shot = self._shot(event.story_id, event.shot_id)
        shot.attempts.append(attempt)
        shot.status, shot.shot_index, shot.reason = "running", event.shot_index, ""
        row.attempt = attempt

    def _shot_changed(
        self, row: Row, now: float, event: ev.ShotFinished | ev.ShotFailed | ev.ShotResumed | ev.ShotSkipped
    ) -> None:
        shot = self._shot(event.story_id, event.shot_id)
        attempt = row.open_attempt(event.story_id, event.shot_id)
        match event:
            case ev.ShotResumed():
                row.num_resumed += 1
                if attempt is not None:
                    attempt.resumed_step = attempt.step = event.step
                return
            case ev.ShotSkipped():
                committed = event.reason == "committed"
                if shot.status != "finished":
                    shot.status = "finished" if committed else "blocked"
                    shot.committed_before = committed
                    shot.reason = "" if committed else event.reason
                return
            case ev.ShotFinished():
                shot.status, shot.reason = "finished", ""
                row.num_finished += not event.already_committed
            case ev.ShotFailed():
                shot.status, shot.reason = ("waiting" if event.will_retry else "failed"), event.reason
                row.num_failed += 1
                self.failures.append(
                    Failure(
                        wall_time=now,
                        story_id=event.story_id,
                        shot_id=event.shot_id,
                        reason=event.reason,
                        stage=event.stage or (row.stage if attempt is row.attempt else "save"),
                        will_retry=event.will_retry,
                    )
                )
        if attempt is None:
            return
        if isinstance(event, ev.ShotFinished):
            attempt.finished = event
            attempt.stage_seconds.update(event.stage_seconds)
            row_changes.end_attempt(row, attempt, "finished", now)
        else:
            attempt.reason = event.reason
            row_changes.end_attempt(row, attempt, "failed", now)

    def _memory_decided(self, row: Row, event: ev.MemoryDecided) -> None:
        attempt = row.open_attempt(event.story_id, event.shot_id)
        if attempt is not None:
            attempt.decisions.append(event)
        if event.verdict.startswith("kept") and event.slot is not None:
            self.keyframe_scores[(event.story_id, event.source_shot_index, event.slot)] = event
