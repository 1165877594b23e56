"""Requests to the queue in the folded state, the terminal and the summary."""

import io
from pathlib import Path

import pytest
from rich.console import Console

import storymem_dist.events as ev
from storymem_dist.observe.console import LiveConsole, PlainConsole
from storymem_dist.observe.journal import JournalTail, read_journal
from storymem_dist.observe.run.rates import seconds_left
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.summary import load_run_state, summary
from tests.helpers.fake_run import START_TIME, FakeRun, whole_run


def request(number: int, action: str, **values: object) -> ev.RequestApplied:
    return ev.RequestApplied(number=number, action=action, who="lea@login1", asked_at=START_TIME, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """Two replicas apply two requests; the first one after 2 s, the other after 5 s."""
    run = FakeRun(tmp_path_factory.mktemp("runs") / "run", num_stories=2, num_shots=2)
    for number, seconds in ((0, 2.0), (1, 5.0)):
        with run.replica(number, num_replicas=2) as replica:
            replica.clock.pass_(seconds)
            replica.observers.notify(request(1, "skip", story_id="story_1", message=f"seen by {number}"))
            replica.observers.notify(request(2, "pause", message="no other shot begins"))
            if number == 0:
                run.shot(replica, 0, 0)
    return run


def test_a_request_is_kept_once_with_who_applied_it_and_when(run: FakeRun) -> None:
    state = load_run_state(run.root)
    assert sorted(state.requests) == [1, 2]
    skip = state.requests[1]
    assert [(row, message) for _, row, message in skip.applied] == [(("", 0), "seen by 0"), (("", 1), "seen by 1")]
    assert (skip.seconds_to_effect, skip.seconds_to_all) == (2.0, 5.0)
    assert skip.messages == ["seen by 0", "seen by 1"] and state.requests[2].messages == ["no other shot begins"]
    assert state.skipped == {"story_1"}


def test_what_a_later_job_reports_at_its_start_changes_nothing_that_is_known(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=2)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0)
        replica.observers.notify(request(1, "pause", message="no other shot begins"))
    with run.replica(0) as replica:
        replica.clock.pass_(100.0)
        replica.observers.notify(request(1, "pause", message="planned", at_start=True))
        replica.observers.notify(request(2, "rerender", story_id="story_0", shots=("shot_01",), at_start=True))
        replica.observers.notify(request(2, "rerender", story_id="story_0", shots=("shot_01",), at_start=True))
    state = load_run_state(run.root)
    assert state.requests[1].messages == ["no other shot begins"] and len(state.requests[2].applied) == 1
    assert [shot.status for shot in state.stories["story_0"].shots.values()] == ["waiting"]


@pytest.mark.parametrize("asked_at", [0.0, float("nan"), START_TIME + 100])
def test_a_time_that_cannot_be_is_no_time_to_effect(tmp_path: Path, asked_at: float) -> None:
    run = FakeRun(tmp_path / "run", num_stories=0)
    with run.replica(0) as replica:
        replica.observers.notify(ev.RequestApplied(number=1, action="pause", asked_at=asked_at))
    seconds = load_run_state(run.root).requests[1].seconds_to_effect
    assert seconds == (0.0 if asked_at > START_TIME else None)


def test_a_skip_is_taken_back_by_an_unskip_and_by_first_in_the_order_of_the_log() -> None:
    state = RunState()
    actions = [(4, "first", "b"), (1, "skip", "a"), (3, "unskip", "a"), (2, "skip", "b"), (5, "skip", "c")]
    for sequence, (number, action, story_id) in enumerate(actions):
        event = request(number, action, story_id=story_id)
        state.apply(ev.StampedEvent(event=event, wall_time=1.0, writer="w", replica=0, sequence=sequence))
    assert state.skipped == {"c"}


def test_shots_that_are_rendered_again_wait_and_those_of_others_stay(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=2, num_shots=3, num_replicas=1)
    state = load_run_state(run.root)
    assert state.count("finished") == 6
    event = request(1, "rerender", story_id="story_0", shots=("shot_02", "shot_03"))
    for writer in ("start01-r0", "another"):  # the second replica applies it when the shot is rendered again
        state.apply(ev.StampedEvent(event=event, wall_time=START_TIME + 900, writer=writer, replica=0, sequence=900))
        assert [shot.status for shot in state.stories["story_0"].shots.values()] == ["finished", "waiting", "waiting"]
        assert (state.stories["story_0"].outcome, state.stories["story_1"].outcome) == ("", "finished")
    finished = ev.ShotFinished(story_id="story_0", shot_id="shot_02")
    state.apply(ev.StampedEvent(event=finished, wall_time=START_TIME + 901, writer="another", replica=0, sequence=901))
    state.apply(ev.StampedEvent(event=event, wall_time=START_TIME + 902, writer="late", replica=1, sequence=0))
    assert state.count("finished") == 5, "a replica that is late takes nothing back"


def test_a_skipped_story_takes_no_time(run: FakeRun) -> None:
    with_skip, without = RunState(), RunState()
    for stamped in read_journal(run.root / "events"):
        with_skip.apply(stamped)
        if not isinstance(stamped.event, ev.RequestApplied):
            without.apply(stamped)
    left, all_left = seconds_left(with_skip), seconds_left(without)
    assert left is not None and all_left is not None and 0 < left < all_left


def test_the_first_leaders_log_has_a_line_for_a_request_and_the_others_none(run: FakeRun, tmp_path: Path) -> None:
    for tail, level, expected in (
        (JournalTail(tmp_path), "normal", 1),
        (JournalTail(tmp_path), "quiet", 1),
        (None, "normal", 0),
        (None, "verbose", 1),
    ):
        stream = io.StringIO()
        console = PlainConsole(stream, level=level, tail=tail)
        console.handle(read_journal(run.root / "events")[0])
        for stamped in read_journal(run.root / "events"):
            if stamped.replica == 0 and isinstance(stamped.event, ev.RequestApplied):
                console.handle(stamped)
        lines = [line for line in stream.getvalue().splitlines() if "request 1" in line]
        assert len(lines) == expected, level
        assert all("request 1 by lea@login1: skip story_1: seen by 0" in line for line in lines)


def test_the_live_view_keeps_one_line_for_a_request_of_all_replicas(run: FakeRun) -> None:
    stream = io.StringIO()
    live = LiveConsole(Console(file=stream, force_terminal=True, width=120, color_system=None))
    for stamped in read_journal(run.root / "events"):
        live.handle(stamped)
    live.close()
    view, _, table = stream.getvalue().partition("Requests")
    assert view.count("request 1 by lea@login1: skip story_1: seen by 0") == 1 and "seen by 1" not in view
    assert "2.0 s (all: 5.0 s)" in table and "no other shot begins" in table


def test_a_hostile_request_is_escaped(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=0)
    with run.replica(0) as replica:
        replica.observers.notify(
            ev.RequestApplied(
                number=1, action="skip", story_id="\x1b[31mx\ny", who="\u202e", message="\r[bold]x[/bold] \x07"
            )
        )
    stream = io.StringIO()
    console = PlainConsole(stream, tail=JournalTail(tmp_path))
    for stamped in read_journal(run.root / "events"):
        console.handle(stamped)
    Console(file=stream, width=200, no_color=True, highlight=False).print(summary(load_run_state(run.root)))
    text = stream.getvalue()
    assert not set("\x1b\u202e\r\x07") & set(text)
    assert text.count("[bold]x[/bold]") == 2 and r"\x1b[31mx\ny" in text
