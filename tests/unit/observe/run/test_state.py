from dataclasses import replace
from pathlib import Path

import pytest

import storymem_dist.events as ev
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.report.timeline import timeline
from storymem_dist.observe.run.rates import rates, seconds_left
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.summary import load_run_state
from tests.helpers.fake_run import START_TIME, FakeReplica, FakeRun, restarted_run, whole_run


def fold(root: Path) -> RunState:
    state = RunState()
    for stamped in read_journal(root / "events"):
        state.apply(stamped)
    return state


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs") / "complete", num_stories=2, num_shots=3).root


def test_a_complete_run_is_counted_shot_by_shot(complete: Path) -> None:
    state = load_run_state(complete)
    assert state.count("finished") == state.num_shots == 6
    assert [row.num_finished for row in state.rows.values()] == [3, 3]
    assert all(row.is_over for row in state.rows.values())
    assert {story.outcome for story in state.stories.values()} == {"finished"}


def test_rates_follow_from_the_events(complete: Path) -> None:
    speed = rates(fold(complete))
    steps_per_shot = {0: 1.5, 1: 1.9, 2: 2.1}  # 0.2 s more for each memory keyframe: 0, 2 and 3
    assert speed.seconds_per_step == pytest.approx(sum(steps_per_shot.values()) / 3)
    per_clip = sum(4 * seconds + 0.4 + 1.1 + 0.3 + 0.2 for seconds in steps_per_shot.values()) / 3
    assert speed.seconds_per_clip == pytest.approx(per_clip, rel=1e-5)
    one_replica = 28.6 / 1.9 + 3 * per_clip + 3.0
    assert speed.device_seconds == pytest.approx(2 * one_replica, rel=1e-5)
    assert speed.clips_per_gpu_hour == pytest.approx(6 * 3600 / speed.device_seconds)
    assert speed.wait_ratio == pytest.approx(3.0 / one_replica, rel=1e-5)
    assert speed.tokens_per_second == pytest.approx(1560 / speed.seconds_per_step)
    assert speed.flop_utilisation == pytest.approx(0.4 / speed.seconds_per_step)


def test_steps_that_the_cache_answered_are_counted_by_shot_replica_and_run(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=1)
    for number, reused in ((0, (3,)), (1, ())):
        run.reused_steps = reused
        with run.replica(number, num_replicas=2) as replica:
            run.shot(replica, number, 0)
    state = fold(run.root)
    assert [attempt.num_reused_steps for attempt in state.attempts()] == [1, 0]
    assert [rates(state, ("", number)).reuse_ratio for number in (0, 1)] == [0.25, 0.0]
    assert rates(state).reuse_ratio == 0.125
    assert rates(state, ("", 0)).flop_utilisation == pytest.approx(0.75 * 0.4 / 1.5), "a reused step is no work"
    assert rates(RunState()).reuse_ratio is None


def test_a_shot_of_several_replicas_counts_for_one_and_takes_the_time_of_all(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    with run.replica(0, num_replicas=2) as leader, run.replica(1, num_replicas=2) as helper:
        run.shot(leader, 0, 0)
        helper.clock.pass_(9.0)
        helper.observers.notify(ev.ReplicaHelped(story_id="story_0", shot_id="shot_01", leader=0, elapsed_seconds=8.0))
    state = fold(run.root)
    (helping,) = [span for span in state.rows["", 1].spans if span.kind == "helping"]
    assert helping.end is not None and helping.end - helping.start == 8.0 and helping.shot_id == "shot_01"
    assert [row.num_finished for _, row in sorted(state.rows.items())] == [1, 0]
    assert rates(state, ("", 1)).wait_ratio == 0.0, "it was not idle"
    (attempt,) = state.attempts()
    alone = rates(state).flop_utilisation
    attempt.started = replace(attempt.started, num_devices=2, replicas=(0, 1))
    assert alone is not None and rates(state).flop_utilisation == alone / 2
    assert "helping" in timeline(state) and "k-helping" in timeline(state)


def test_recalled_keyframes_get_the_scores_with_which_they_were_kept(complete: Path) -> None:
    state = fold(complete)
    attempt = state.stories["story_0"].shots["shot_03"].last
    assert attempt is not None
    recalled = [d for d in attempt.decisions if d.verdict == "recalled" and d.source_shot_index == 1]
    assert [d.quality for d in recalled] == [None]
    assert [state.with_scores(d).quality for d in recalled] == [4.5]
    assert [state.with_scores(d).bank_similarity for d in recalled] == [0.71]


def test_a_killed_replica_leaves_an_interrupted_attempt_and_its_restart_continues_the_same_row(tmp_path: Path) -> None:
    run, _ = restarted_run(tmp_path / "run")
    state = fold(run.root)
    assert list(state.rows) == [("", 0)]
    interrupted, resumed = state.stories["story_0"].shots["shot_02"].attempts
    assert (interrupted.outcome, interrupted.step) == ("interrupted", 2)
    assert (resumed.outcome, resumed.resumed_step, resumed.step, resumed.num_timed_steps) == ("finished", 2, 4, 2)
    row = state.rows[("", 0)]
    assert (row.num_finished, row.num_resumed, len(row.starts)) == (2, 1, 2)
    assert state.up_seconds < 60.0 < state.last_time - START_TIME


def test_an_earlier_start_whose_events_arrive_late_is_no_other_job(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=2)
    with run.replica(0) as first:
        run.shot(first, 0, 0)
    with run.replica(0, at=START_TIME + 500) as second:
        run.load_weights(second)
        run.shot(second, 0, 1)
        run.finish(second)
    earlier, later = (
        [stamped for stamped in read_journal(run.root / "events") if stamped.writer == replica.writer]
        for replica in (first, second)
    )
    state = RunState()
    for stamped in (later[0], *earlier, *later[1:]):
        state.apply(stamped)
    assert list(state.rows) == [("", 0)]
    row = state.rows[("", 0)]
    assert [start.writer for start in row.starts] == [first.writer, second.writer]
    assert row.is_over and row.num_finished == 2


def test_two_jobs_of_one_name_at_once_are_two_rows_not_a_restart(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=1, job="")
    with run.replica(0) as one:
        one.clock.pass_(1.0)
        with run.replica(0, at=START_TIME + 2.0) as other:
            run.shot(one, 0, 0)
            run.shot(other, 1, 0)
            run.finish(one)
            run.finish(other)
    state = fold(run.root)
    assert len(state.rows) == 2
    assert sorted(row.num_finished for row in state.rows.values()) == [1, 1]
    assert [attempt.outcome for attempt in state.attempts()] == ["finished", "finished"]
    assert all(row.is_over for row in state.rows.values())


@pytest.mark.parametrize(("outcome", "pause", "num_rows"), [("stopped", 1.0, 1), (None, 300.0, 1), (None, 1.0, 2)])
def test_a_later_job_continues_the_rows_that_an_earlier_one_has_left(
    tmp_path: Path, outcome: str | None, pause: float, num_rows: int
) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=2, job="torchrun-1")
    with run.replica(0) as replica:
        run.shot(replica, 0, 0)
        if outcome is not None:
            run.finish(replica, outcome)
    run.job = "torchrun-2"
    with run.replica(0, at=replica.clock.now + pause) as later:
        run.shot(later, 0, 1)
        run.finish(later)
    state = fold(run.root)
    assert len(state.rows) == num_rows
    assert sum(row.num_finished for row in state.rows.values()) == 2
    labels = {state.row_label(key) for key in state.rows}
    assert labels == ({"replica 0"} if num_rows == 1 else {"replica 0", "job 2 replica 0"})


def test_an_attempt_that_was_under_way_when_the_other_job_started_is_not_taken_for_dead(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=1, job="")
    with run.replica(0) as one, run.replica(0, at=START_TIME + 3.0) as other:
        run.shot(one, 0, 0)  # from 0 to 8 s: the other job starts in the middle of it
        run.shot(other, 1, 0)
    state = fold(run.root)
    assert [attempt.outcome for attempt in state.attempts()] == ["finished", "finished"]
    assert state.count("finished") == 2


def _begin(replica: FakeReplica, story: int) -> None:
    names = {"story_id": f"story_{story}", "shot_id": "shot_01"}
    replica.observers.notify(ev.ShotStarted(**names, num_steps=4))
    replica.observers.notify(ev.StageStarted(stage="denoise", **names))


def _begin_saving(replica: FakeReplica, story: int) -> None:
    names = {"story_id": f"story_{story}", "shot_id": "shot_01"}
    replica.clock.pass_(10.0)
    replica.observers.notify(ev.StageFinished(stage="denoise", elapsed_seconds=10.0, **names))
    replica.observers.notify(ev.StageStarted(stage="save", **names))


@pytest.mark.parametrize("end", ["saved", "saved before the next began", "failed", "killed"])
def test_a_shot_may_be_saved_while_the_next_one_is_rendered(tmp_path: Path, end: str) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=1)
    names = {"story_id": "story_0", "shot_id": "shot_01"}
    with run.replica(0) as replica:
        notify = replica.observers.notify
        _begin(replica, 0)
        _begin_saving(replica, 0)
        if end == "saved before the next began":
            notify(ev.StageFinished(stage="save", elapsed_seconds=0.0, **names))
        _begin(replica, 1)
        row = fold(run.root).rows[("", 0)]
        assert row.attempt is not None and row.attempt.started.story_id == "story_1" and row.stage == "denoise"
        replica.clock.pass_(3.0)
        if end == "saved":
            notify(ev.StageFinished(stage="save", elapsed_seconds=3.0, **names))
        if end == "failed":
            notify(ev.ShotFailed(**names, reason="No space left on device"))
        elif end != "killed":
            notify(ev.ShotFinished(**names))
        replica.clock.pass_(4.0)
        notify(
            ev.StepFinished(story_id="story_1", shot_id="shot_01", step=1, num_steps=4, expert="", elapsed_seconds=7)
        )
    state = fold(run.root)
    row, saved, running = state.rows[("", 0)], *state.attempts()
    if end == "killed":
        assert (saved.outcome, running.outcome, row.saving) == ("running", "running", saved)
        with run.replica(0, at=START_TIME + 500):
            pass
        assert {attempt.outcome for attempt in fold(run.root).attempts()} == {"interrupted"}
        return
    assert (saved.outcome, saved.end) == ("failed" if end == "failed" else "finished", START_TIME + 13.0)
    assert (running.outcome, running.step, row.attempt, row.saving) == ("running", 1, running, None)
    assert [span.kind for span in row.open_spans] == ["denoise"], "the end of the one ends no stage of the other"
    assert [(span.kind, span.end) for span in row.spans if span.kind == "save"] == [
        ("save", START_TIME + (10.0 if end == "saved before the next began" else 13.0))
    ]
    assert row.num_finished == (end != "failed")
    assert [failure.stage for failure in state.failures] == (["save"] if end == "failed" else [])
    assert rates(state).num_clips == row.num_finished


def test_failures_name_the_stage_and_what_depends_on_them_is_blocked(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=3)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0, fail="CUDA out of memory")
        replica.observers.notify(ev.ShotSkipped(story_id="story_0", shot_id="shot_02", reason="predecessor failed"))
        replica.observers.notify(ev.StoryboardRejected(source="bad.json", message="scene 1: no prompts"))
    state = fold(run.root)
    assert [(failure.shot_id, failure.stage, failure.reason) for failure in state.failures] == [
        ("shot_01", "denoise", "CUDA out of memory"),
        ("", "", "scene 1: no prompts"),
    ]
    assert (state.count("failed"), state.count("blocked")) == (1, 1)


def test_time_left_is_bound_by_the_longest_chain(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=2, num_shots=4)
    with run.replica(0) as replica:
        for shot in range(4):
            run.shot(replica, 0, shot)
        run.shot(replica, 1, 0)
    state = fold(run.root)
    per_clip = rates(state).seconds_per_clip
    assert per_clip is not None
    assert seconds_left(state) == pytest.approx(3 * per_clip)
    state.rows[("", 1)] = state.rows[("", 0)]
    assert seconds_left(state) == pytest.approx(3 * per_clip), "a second replica does not shorten a chain"


def test_events_of_a_writer_that_never_announced_itself_are_kept() -> None:
    state = RunState()
    event = ev.ShotStarted(story_id="a", shot_id="shot_01", num_steps=4)
    state.apply(ev.StampedEvent(event=event, wall_time=1.0, writer="library", replica=0, sequence=0))
    assert state.count("running") == 1
    state.apply(
        ev.StampedEvent(event=ev.WarningIssued(message="m"), wall_time=2.0, writer="other", replica=5, sequence=0)
    )
    assert list(state.rows) == [("", 0)]
