"""The console: lines for a log, or a view of the whole batch that redraws itself on a terminal.

``PlainConsole`` writes one line per important event, and progress lines at a limited rate. ``LiveConsole`` shows the
batch, one line per replica and the newest events; each finished shot leaves a permanent line. Both can follow the event
files of the other replicas (``tail``) and then report on the whole batch.

Knows events and terminals; nothing of ranks or rendering.
"""

import time
from collections import deque
from typing import TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import storymem_dist.events as ev
from storymem_dist.observe.journal import JournalTail
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.run.rates import rates, seconds_left
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.summary import summary
from storymem_dist.observe.run.values import Row
from storymem_dist.terminal.rich_console import SafeConsole, escape_streams
from storymem_dist.terminal.streams import print_on
from storymem_dist.terminal.text import printable

MAX_LIVE_ROWS = 24
"""Replicas with their own line in the live view; the others are only counted."""

BAR_WIDTH = 24

FOLLOW_SECONDS = 1.0
"""Seconds between two reads of the other replicas' event files."""

SLOW_FIGURES_SECONDS = 2.0
"""Seconds between two computations of figures over the whole batch (time left, clips per device-hour)."""


def event_line(event: ev.Event, level: str) -> Text | None:
    """Return one line about ``event`` for people; None if ``level`` hides it or it is shown as progress."""
    normal, verbose = level != "quiet", level == "verbose"
    match event:
        case ev.JobStarted():
            parts = [fmt.count(event.num_stories, "story", "stories"), fmt.count(event.num_shots, "shot")]
            parts.append(fmt.count(event.num_replicas, "replica"))
            where = f"{event.num_devices} x {event.device}" + (f" on {event.host}" if event.host else "")
            layout = f", layout {event.layout}" if event.layout else ""
            attention = f", attention {event.attention}" if event.attention else ""
            compiles = f", compile {event.compile}" if event.compile else ""
            facts = f"{where}{layout}{attention}{compiles}"
            return _text(f"started: {', '.join(parts)}; this one has {facts}") if normal else None
        case ev.LayoutChosen():
            compiled = ", compiled" if event.compiled else ""
            what = f"{event.layout}, weights {event.weights}, experts {event.experts}{compiled}"
            total = f", about {fmt.duration(event.total_seconds)} for all shots" if event.total_seconds else ""
            why = f": {event.reasons[0]}" if event.reasons else ""
            return _text(f"chosen: {what}{total}{why}") if normal else None
        case ev.JobFinished():
            style = {"finished": "green", "stopped": "yellow"}.get(event.outcome, "red")
            return _text(f"{event.outcome}: {event.num_rendered} rendered, {event.num_failed} failed", style=style)
        case ev.StoryFinished():
            if event.outcome == "finished":
                where = f": {event.video}" if event.video else ""
                return _text(f"{event.story_id} is complete{where}", style="green bold")
            return _text(f"{event.story_id} is incomplete: {event.message}", style="red")
        case ev.ShotStarted():
            if not normal:
                return None
            memory = f", {fmt.count(event.num_memory, 'memory keyframe')}" if event.num_memory else ""
            why = f" ({event.why})" if event.why else ""
            crew = f", {fmt.count(len(event.replicas), 'replica')} together" if event.replicas else ""
            name = f"{event.story_id}/{event.shot_id}"
            return _text(f"{name} started: {event.mode}, seed {event.seed}{memory}{crew}{why}")
        case ev.ShotFinished():
            stages = event.stage_seconds
            slow = sorted((name for name in stages if stages[name] >= 0.05), key=lambda name: -stages[name])[:3]
            slowest = ", ".join(f"{name} {fmt.duration(stages[name])}" for name in slow)
            kept = f", kept {fmt.count(len(event.keyframes), 'keyframe')}" if normal else ""
            detail = f" ({slowest})" if slowest and normal else ""
            took = fmt.duration(event.elapsed_seconds)
            return _text(f"{event.story_id}/{event.shot_id} finished in {took}{detail}{kept}", style="green")
        case ev.ShotFailed():
            again = "; will be tried again" if event.will_retry else ""
            at = f" in {event.stage}" if event.stage else ""
            return _text(f"{event.story_id}/{event.shot_id} failed{at}: {event.reason}{again}", style="red")
        case ev.ShotResumed():
            return _text(f"{event.story_id}/{event.shot_id} resumes after step {event.step} of {event.num_steps}")
        case ev.ShotSkipped():
            if event.reason == "committed":
                return _text(f"{event.story_id}/{event.shot_id} is already committed", style="dim") if verbose else None
            return _text(f"{event.story_id}/{event.shot_id} skipped: {event.reason}", style="yellow")
        case ev.StoryboardRejected():
            return _text(f"{event.source} rejected: {event.message}", style="red")
        case ev.WarningIssued():
            return _text(f"warning: {event.message}", style="yellow")
        case ev.RequestApplied():
            return None if event.at_start and not verbose else _request_line(event)
        case ev.StopRequested():
            return _text(f"stopping after this step ({event.reason})", style="yellow")
        case ev.ReplicaWaited():
            return _text(f"waited {fmt.duration(event.elapsed_seconds)}: {event.reason}") if verbose else None
        case ev.ReplicaHelped():
            what = f"helped replica {event.leader} with {event.story_id}/{event.shot_id}"
            return _text(f"{what} for {fmt.duration(event.elapsed_seconds)}", style="dim") if verbose else None
        case ev.StageFinished():
            shot = f"{event.story_id}/{event.shot_id} " if event.shot_id else ""
            return _text(f"{shot}{event.stage} {fmt.duration(event.elapsed_seconds)}", style="dim") if verbose else None
        case ev.LorasUsed():
            read = "already in host memory" if event.already_read else f"read in {event.elapsed_seconds:.1f} s"
            placed = f"{event.device_gib:.2f} GiB on the device (copied in {event.device_seconds:.1f} s)"
            what = f"{event.story_id}/{event.shot_id} used {fmt.count(event.num_loras, 'LoRA')} of its own"
            return _text(f"{what}: {read}, {placed}", style="dim") if normal else None
        case ev.MemoryDecided():
            return _memory_line(event) if verbose else None
    return None


def _text(text: str, style: str = "") -> Text:
    """Text of any origin, in one line."""
    return Text(printable(text), style=style)


def _request_line(event: ev.RequestApplied) -> Text:
    target = f" {event.story_id}" if event.story_id else ""
    who = f" by {event.who}" if event.who else ""
    effect = f": {event.message}" if event.message else ""
    return _text(f"request {event.number}{who}: {event.action}{target}{effect}", style="cyan")


def _memory_line(event: ev.MemoryDecided) -> Text:
    source = "reference image" if event.source_shot_index < 0 else f"shot_{event.source_shot_index + 1:02d}"
    scores = "".join(
        f", {name} {value:.3f}"
        for name, value in (("similarity", event.similarity), ("quality", event.quality))
        if value is not None
    )
    why = f": {event.why}" if event.why else ""
    what = f"{event.verdict.replace('_', ' ')} {source} frame {event.source_frame_index}"
    return _text(f"{event.story_id}/{event.shot_id} {what}{scores}{why}", style="dim")


def _weights_text(event: ev.WeightsProgress) -> str:
    done, total = fmt.byte_count(event.bytes_done), fmt.byte_count(event.bytes_total)
    rate = fmt.byte_rate(event.bytes_done, event.elapsed_seconds)
    amount = done if event.bytes_done >= event.bytes_total else f"{done} of {total}"
    return f"{event.action} {event.what}: {amount}, {rate}"


class PlainConsole:
    """Writes lines of plain text, for logs. ``tail`` (optional) makes it count the shots of all replicas."""

    name = "console"
    tick_seconds = FOLLOW_SECONDS

    def __init__(
        self,
        stream: TextIO,
        *,
        level: str = "normal",
        line_interval_seconds: float = 30.0,
        tail: JournalTail | None = None,
    ) -> None:
        self._stream = stream
        self._level = level
        self._interval = line_interval_seconds
        self._tail = tail
        self._state = RunState()
        self._last_line = 0.0
        self._summarize = False
        self._knows_history = False

    def handle(self, stamped: ev.StampedEvent) -> None:
        """Write the event's line, if it has one at this level."""
        if not self._knows_history:
            self.tick()
        self._state.apply(stamped)
        event = stamped.event
        if isinstance(event, ev.JobFinished):
            self._summarize = self._tail is not None
        if isinstance(event, ev.RequestApplied) and self._tail is None and self._level != "verbose":
            return  # the first leader's log has it
        line = event_line(event, self._level)
        if line is not None:
            self._write(stamped, line.plain + self._batch_text(event))
        elif self._level != "quiet":
            self._progress(stamped)

    def tick(self) -> None:
        """Read the new events of the other replicas; the first call also reads those of earlier starts."""
        self._knows_history = True
        for stamped in self._tail.follow() if self._tail is not None else ():
            self._state.apply(stamped)

    def close(self) -> None:
        """Write the summary (if the whole batch is known)."""
        if self._summarize:
            for stamped in self._tail.poll() if self._tail is not None else ():
                self._state.apply(stamped)
            SafeConsole(self._stream, width=120, no_color=True, highlight=False).print(summary(self._state))

    def _progress(self, stamped: ev.StampedEvent) -> None:
        event = stamped.event
        due = stamped.wall_time - self._last_line >= self._interval
        if isinstance(event, ev.WeightsProgress) and (due or event.bytes_done >= event.bytes_total):
            self._write(stamped, _weights_text(event))
        elif isinstance(event, ev.StepFinished) and due:
            parts = [f"step {event.step}/{event.num_steps}", fmt.step_time(event.elapsed_seconds), event.expert]
            if event.gpu_memory_gib is not None:
                parts.append(fmt.gib(event.gpu_memory_gib))
            if event.reused:
                parts.append("reused")
            self._write(stamped, f"{event.story_id}/{event.shot_id} " + ", ".join(part for part in parts if part))

    def _batch_text(self, event: ev.Event) -> str:
        if self._tail is None or not isinstance(event, ev.ShotFinished):
            return ""
        left = seconds_left(self._state)
        about = f", about {fmt.clock(left)} left" if left else ""
        return f" · {self._state.count('finished')}/{self._state.num_shots} shots{about}"

    def _write(self, stamped: ev.StampedEvent, text: str) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(stamped.wall_time))
        self._last_line = stamped.wall_time
        print_on(self._stream, f"{clock} r{stamped.replica}  {text}")


class LiveConsole:
    """A view that redraws itself: the batch, each replica, the newest events. Finished shots stay above it as lines."""

    name = "console"
    tick_seconds = 0.25

    def __init__(
        self, console: SafeConsole, *, level: str = "normal", title: str = "", tail: JournalTail | None = None
    ) -> None:
        self._console = console
        self._level = level
        self._title = title
        self._tail = tail
        self._state = RunState()
        self._news: deque[Text] = deque(maxlen=4)
        self._next_follow = 0.0
        self._started = time.time()
        self._slow_figures: tuple[float, int, int, float | None, float | None] = (0.0, 0, 0, None, None)
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=True, redirect_stderr=True
        )
        self._live.start()
        escape_streams()  # until the view stops
        console.show_cursor(True)  # a killed process must not leave the terminal without a cursor

    def handle(self, stamped: ev.StampedEvent) -> None:
        """Apply the event; ends of shots and stories, warnings and stops leave a permanent line."""
        if not self._next_follow:
            self._follow()  # events of earlier starts first
        event = stamped.event
        is_known = isinstance(event, ev.RequestApplied) and event.number in self._state.requests
        self._state.apply(stamped)
        line = event_line(event, self._level)
        if line is None or (is_known and self._level != "verbose"):  # each replica reports that it applied a request
            return
        lasting = (
            ev.ShotFinished,
            ev.ShotFailed,
            ev.StoryFinished,
            ev.StoryboardRejected,
            ev.WarningIssued,
            ev.RequestApplied,
            ev.StopRequested,
        )
        if isinstance(event, lasting) or self._level == "verbose":
            self._live.console.print(self._stamped_line(stamped, line), soft_wrap=True, highlight=False)
        else:
            self._news.append(self._stamped_line(stamped, line))

    def tick(self) -> None:
        """Follow the other replicas and redraw."""
        if time.monotonic() >= self._next_follow:
            self._follow()
        self._live.update(self._view(), refresh=True)

    def close(self) -> None:
        """Remove the view and print the summary."""
        self._take(self._tail.poll() if self._tail is not None else [])
        self._live.update(self._view(), refresh=True)
        self._live.stop()
        if self._state.rows:
            self._console.print(summary(self._state), highlight=False)

    def _follow(self) -> None:
        self._next_follow = time.monotonic() + FOLLOW_SECONDS
        self._take(self._tail.follow() if self._tail is not None else [])

    def _take(self, events: list[ev.StampedEvent]) -> None:
        for stamped in events:
            if stamped.wall_time < self._started:  # from an earlier start: apply it without a line
                self._state.apply(stamped)
            else:
                self.handle(stamped)

    def _stamped_line(self, stamped: ev.StampedEvent, line: Text) -> Text:
        clock = time.strftime("%H:%M:%S", time.localtime(stamped.wall_time))
        replica = f" r{stamped.replica}" if len(self._state.rows) > 1 else ""
        return Text.assemble((f"{clock}{replica}  ", "dim"), line)

    def _view(self) -> RenderableType:
        rows = sorted(self._state.rows.items())
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, max_width=36, overflow="ellipsis")
        table.add_column(width=BAR_WIDTH)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._add_batch_row(table)
        for key, row in rows[:MAX_LIVE_ROWS]:
            what, bar, detail = self._row_cells(row)
            table.add_row(_text(self._state.row_label(key), style="cyan"), what, bar, detail)
        if len(rows) > MAX_LIVE_ROWS:
            table.add_row(_text(f"and {len(rows) - MAX_LIVE_ROWS} more replicas", style="dim"), "", "", "")
        return Group(Text(""), table, *self._news)

    def _add_batch_row(self, table: Table) -> None:
        now = time.monotonic()
        if now - self._slow_figures[0] >= SLOW_FIGURES_SECONDS or self._state.num_events < 500:
            finished, failed = self._state.count("finished"), self._state.count("failed") + self._state.count("blocked")
            left, pace = seconds_left(self._state), rates(self._state).clips_per_gpu_hour
            self._slow_figures = (now, finished, failed, left, pace)
        _, finished, failed, left, pace = self._slow_figures
        detail = Text()
        detail.append(fmt.clock(time.time() - self._started))
        if failed:
            detail.append(f" · {failed} failed", style="red")
        if left:
            detail.append(f" · about {fmt.clock(left)} left")
        if pace is not None:
            detail.append(f" · {fmt.number(pace)} clips/device-hour", style="dim")
        num_shots = self._state.num_shots
        table.add_row(
            _text(self._title or "batch", style="bold"),
            _text(f"{finished} of {fmt.count(num_shots, 'shot')}"),
            _bar(finished, num_shots),
            detail,
        )

    def _row_cells(self, row: Row) -> tuple[Text, RenderableType, Text]:
        if row.is_over:
            return _text(row.starts[-1].outcome, style="dim"), Text(""), Text("")
        if row.weights:
            event = next(reversed(row.weights.values()))
            bar = _bar(event.bytes_done, event.bytes_total)
            rate = fmt.byte_rate(event.bytes_done, event.elapsed_seconds)
            amount = f"{fmt.byte_count(event.bytes_done)} of {fmt.byte_count(event.bytes_total)} · {rate}"
            return _text(f"{event.action} {event.what}"), bar, Text(amount)
        attempt = row.attempt
        if attempt is None:
            return _text(row.stage or "waiting", style="" if row.stage else "dim"), Text(""), Text("")
        what = _text(f"{attempt.started.story_id}/{attempt.started.shot_id}")
        facts = [row.stage] if row.stage else []
        if attempt.step:
            facts += [f"{attempt.step}/{attempt.num_steps}", fmt.step_time(row.seconds_per_step)]
        if attempt.num_reused_steps:
            facts.append(f"{attempt.num_reused_steps} reused")
        if row.gpu_memory_gib is not None:
            facts.append(fmt.gib(row.gpu_memory_gib))
        return what, _bar(attempt.step, attempt.num_steps), _text(" · ".join(facts))


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(
        total=max(1, total), completed=done, width=BAR_WIDTH, complete_style="cyan", finished_style="green"
    )
