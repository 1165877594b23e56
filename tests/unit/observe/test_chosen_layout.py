"""A layout that a plan chose, on its way from the event to people: terminal, time left, report."""

import io
from pathlib import Path

import pytest

import storymem_dist.events as ev
from storymem_dist.observe.console import PlainConsole, event_line
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.report import write_report
from storymem_dist.observe.run.rates import seconds_left
from storymem_dist.observe.run.state import RunState
from tests.helpers.fake_run import START_TIME, FakeRun

CHOSEN = ev.LayoutChosen(
    layout="replica 2 x cfg 1 x ring 1 x ulysses 4",
    weights="fsdp",
    experts="swap",
    compiled=True,
    reasons=("it ends first <of all>", "constants fitted on a published figure"),
    considered=("replica 8 x cfg 1 x ring 1 x ulysses 1, weights replicated: does not fit",),
    memory_gib={"weights": 26.6, "text_encoder": 10.6},
    seconds_per_step=5.14,
    seconds_per_shot=240.0,
    total_seconds=7200.0,
)


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=3)
    with run.replica(0) as replica:
        replica.observers.notify(CHOSEN)
        replica.clock.pass_(600)
        replica.observers.notify(ev.WarningIssued(message="later"))
    return run


def fold(run: FakeRun) -> RunState:
    state = RunState()
    for stamped in read_journal(run.root / "events"):
        state.apply(stamped)
    return state


def test_the_event_survives_its_file_and_one_of_an_older_version_has_no_choice(run: FakeRun) -> None:
    assert [event for _, event in fold(run).choices] == [CHOSEN]
    old = {"event": "JobStarted", "run_id": "x", "layout": "replica 1 x cfg 1 x ring 1 x ulysses 1"}
    assert isinstance(ev.event_from_dict(old), ev.JobStarted)


def test_one_line_says_what_was_chosen_and_why() -> None:
    line = event_line(CHOSEN, "normal")
    assert line is not None and line.plain == (
        "chosen: replica 2 x cfg 1 x ring 1 x ulysses 4, weights fsdp, experts swap, compiled, about 2:00:00 for all "
        "shots: it ends first <of all>"
    )
    assert event_line(CHOSEN, "quiet") is None
    stream = io.StringIO()
    PlainConsole(stream).handle(ev.StampedEvent(event=CHOSEN, wall_time=START_TIME, writer="w", replica=0, sequence=0))
    assert "chosen: replica 2" in stream.getvalue()


def test_the_time_left_is_the_plans_until_a_shot_has_been_measured(run: FakeRun) -> None:
    assert seconds_left(fold(run)) == pytest.approx(7200 - 600)
    with run.replica(0, at=START_TIME + 700) as replica:
        run.shot(replica, 0, 0)
    left = seconds_left(fold(run))
    assert left is not None and left < 600, "two shots like the first one"


def test_the_report_shows_the_choice_and_what_else_there_was(run: FakeRun) -> None:
    page = write_report(run.root, run.root / "report.html").read_text()
    assert "replica 2 x cfg 1 x ring 1 x ulysses 4, weights fsdp, experts swap, compiled" in page
    assert "it ends first &lt;of all&gt;" in page and "weights replicated: does not fit" in page
    assert "26.6 GiB" in page and "Memory: text encoder" in page and "5.14 s/it" in page
