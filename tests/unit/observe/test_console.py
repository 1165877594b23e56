import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

import storymem_dist.events as ev
from storymem_dist.observe.console import LiveConsole, PlainConsole
from storymem_dist.observe.journal import JournalTail, read_journal
from storymem_dist.observe.run import format as fmt
from storymem_dist.observe.settings import ConsoleSettings
from storymem_dist.observe.start import make_console
from tests.helpers.fake_run import FakeRun, restarted_run, whole_run


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[ev.StampedEvent]:
    run = whole_run(tmp_path_factory.mktemp("runs") / "run", num_stories=2, num_shots=2)
    return read_journal(run.root / "events")


def plain(events: list[ev.StampedEvent], level: str, interval: float = 0.0) -> str:
    stream = io.StringIO()
    console = PlainConsole(stream, level=level, line_interval_seconds=interval)
    for stamped in events:
        console.handle(stamped)
    console.close()
    return stream.getvalue()


def test_each_level_says_more_than_the_one_before(events: list[ev.StampedEvent]) -> None:
    quiet, normal, verbose = (plain(events, level) for level in ("quiet", "normal", "verbose"))
    assert "story_0/shot_01 finished" in quiet and "step" not in quiet and "load" not in quiet
    assert "story_0/shot_01 step 3/4, 1.50 s/it, low_noise, 28.1 GiB" in normal
    assert "load t2v high_noise: 28.6 GB, 1.9 GB/s" in normal
    assert "recalled" not in normal and "recalled shot_01 frame 0" in verbose
    assert "low quality shot_01 frame 3, quality 1.200" in verbose
    assert len(quiet.splitlines()) < len(normal.splitlines()) < len(verbose.splitlines())


def test_lines_carry_no_terminal_codes_and_name_time_and_replica(events: list[ev.StampedEvent]) -> None:
    for line in plain(events, "verbose").splitlines():
        assert re.match(r"\d\d:\d\d:\d\d r[01]  \S", line), line
        assert "\x1b" not in line


def test_reused_steps_are_shown_in_lines_in_the_live_view_and_in_the_summary(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1, reused_steps=(2, 3))
    events = read_journal(run.root / "events")
    reused = [line for line in plain(events, "normal").splitlines() if "reused" in line]
    assert [re.findall(r"step (\d)/4", line) for line in reused] == [["2"], ["3"]]
    stream = io.StringIO()
    live = LiveConsole(Console(file=stream, force_terminal=True, width=120, color_system=None))
    for stamped in events:
        live.handle(stamped)
        live.tick()
    assert "3/4 · 1.50 s/it · 2 reused" in stream.getvalue()
    live.close()
    assert "50.0 % of the steps reused" in stream.getvalue()


def test_progress_is_written_when_nothing_else_was_for_a_while(events: list[ev.StampedEvent]) -> None:
    own = [stamped for stamped in events if stamped.replica == 0]
    every, some, none = (re.findall(r"step (\d)/4", plain(own, "normal", interval)) for interval in (0.0, 3.0, 1000.0))
    assert every == ["1", "2", "3", "4"] * 2
    assert some == ["2", "4", "2", "4"], "steps of 1.5 and 1.9 s, at least 3 s after the line before"
    assert none == []
    assert "load t2v high_noise: 28.6 GB" in plain(own, "normal", 1000.0), "the end of loading is always written"


def test_a_log_of_the_first_replica_counts_the_shots_of_all_and_ends_with_the_summary(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=2, num_shots=1)
    stream = io.StringIO()
    own = [stamped for stamped in read_journal(run.root / "events") if stamped.replica == 0]
    console = PlainConsole(stream, tail=JournalTail(run.root / "events", skip=(own[0].writer,)))
    console.tick()
    for stamped in own:
        console.handle(stamped)
    console.close()
    text = stream.getvalue()
    assert "2/2 shots" in text
    assert "2 of 2 stories done · 2 shots rendered · 0 failed" in text
    assert "replica 1" in text and "denoise" in text


@pytest.mark.parametrize("kind", [PlainConsole, LiveConsole])
def test_a_restarted_replica_is_no_second_job_in_the_summary(
    tmp_path: Path, kind: type[PlainConsole] | type[LiveConsole]
) -> None:
    run, second = restarted_run(tmp_path / "run")
    stream = io.StringIO()
    tail = JournalTail(run.root / "events", skip=(second.writer,))
    target = stream if kind is PlainConsole else Console(file=stream, force_terminal=True, width=120)
    console = kind(target, tail=tail)
    for stamped in read_journal(run.root / "events"):
        if stamped.writer == second.writer:
            console.handle(stamped)
            console.tick()
    console.close()
    text = stream.getvalue()
    assert "replica 0" in text and "job 2" not in text
    assert "2 shots rendered · 1 resumed from a checkpoint · 0 failed" in text


def test_the_live_view_shows_batch_replica_and_loading_and_leaves_finished_shots_behind(tmp_path: Path) -> None:
    stream = io.StringIO()
    live = LiveConsole(Console(file=stream, force_terminal=True, width=120, color_system=None))
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=2)
    with run.replica(0) as replica:
        replica.observers.notify(
            ev.WeightsProgress(what="t2v low_noise", bytes_done=12_300_000_000, bytes_total=28_600_000_000)
        )
        run.load_weights(replica)
        run.shot(replica, 0, 0)
        run.shot(replica, 0, 1, stop_after_step=3)
    for stamped in read_journal(run.root / "events"):
        live.handle(stamped)
        live.tick()
    text = stream.getvalue()
    assert "12.3 GB of 28.6 GB" in text
    assert "1 of 2 shots" in text and "replica 0" in text
    assert "denoise · 3/4 · 1.90 s/it · 28.1 GiB" in text
    live.close()
    after = stream.getvalue()[len(text) :]
    assert "1 shot rendered" in after
    assert "\x1b[?25l" not in stream.getvalue().split("\x1b[?25h")[-1], "the cursor is left on"


def test_the_live_view_shows_what_other_replicas_do_now_but_not_what_they_did_before_it_started(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)
    stream = io.StringIO()
    tail = JournalTail(run.root / "events")
    live = LiveConsole(Console(file=stream, force_terminal=True, width=120, color_system=None), tail=tail)
    live.tick()
    assert "shot_01 finished" not in stream.getvalue()
    assert "1 of 1 shot" in stream.getvalue()
    with run.replica(1, at=time.time() + 5) as replica:
        replica.observers.notify(ev.WarningIssued(message="the disk is slow"))
    live._next_follow = 0.0
    live.tick()
    assert "warning: the disk is slow" in stream.getvalue()
    live.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("mode", "stream", "is_first_leader", "expected"),
    [
        ("auto", Terminal(), True, LiveConsole),
        ("auto", Terminal(), False, type(None)),
        ("auto", io.StringIO(), True, PlainConsole),
        ("auto", io.StringIO(), False, PlainConsole),
        ("plain", Terminal(), False, PlainConsole),
        ("off", Terminal(), True, type(None)),
    ],
)
def test_who_shows_what(mode: str, stream: io.StringIO, is_first_leader: bool, expected: type) -> None:
    console = make_console(ConsoleSettings(mode=mode), stream, is_first_leader=is_first_leader)
    assert type(console) is expected
    if console is not None:
        console.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.42, "0.42 s"),
        (12.34, "12.3 s"),
        (59.97, "1:00"),
        (245, "4:05"),
        (3723, "1:02:03"),
        (183900, "2 d 03:05"),
    ],
)
def test_durations_read_naturally(seconds: float | None, text: str) -> None:
    assert fmt.duration(seconds) == text


def test_sizes_and_rates_read_naturally() -> None:
    assert fmt.byte_count(57_200_000_000) == "57.2 GB" and fmt.byte_count(12) == "12 B" and fmt.byte_count(None) == "–"
    assert fmt.byte_rate(3_800_000_000, 2.0) == "1.9 GB/s" and fmt.byte_rate(1, 0.0) == "–"
    assert fmt.step_time(0.045) == "45 ms/it" and fmt.step_time(1.534) == "1.53 s/it"
    assert fmt.count(1, "story", "stories") == "1 story" and fmt.count(1200, "shot") == "1,200 shots"
    assert fmt.percent(0.41) == "41.0 %" and fmt.number(None) == "–" and fmt.gib(28.06) == "28.1 GiB"
