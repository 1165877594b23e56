"""Where a rank is, in words, after the events of a shot."""

import pytest

from storymem_dist.events import (
    Event,
    ShotFailed,
    StageFinished,
    StageStarted,
    StepFinished,
    WarningIssued,
    WeightsProgress,
    timed_stage,
)
from storymem_dist.parallel.progress import ProgressBoard
from tests.helpers.fake_renderer import Events

SHOT = {"story_id": "moon", "shot_id": "shot_02"}
BOTH = "stage 'save' of moon:shot_02 and stage 'join' of moon"
NEXT = {"story_id": "moon", "shot_id": "shot_03"}


def begin(stage: str, **shot: str) -> Event:
    return StageStarted(stage=stage, **shot)


def end(stage: str, **shot: str) -> Event:
    return StageFinished(stage=stage, elapsed_seconds=1.0, **shot)


def step(number: int) -> Event:
    return StepFinished(step=number, num_steps=8, expert="high_noise", elapsed_seconds=1.0, **SHOT)


@pytest.mark.parametrize(
    ("events", "where"),
    [
        ([], "the start of the job"),
        ([begin("load")], "stage 'load'"),
        ([begin("denoise", **SHOT)], "stage 'denoise' of moon:shot_02, before its first step has ended"),
        ([begin("denoise", **SHOT), step(2)], "stage 'denoise' of moon:shot_02, step 3 of 8"),
        ([begin("denoise", **SHOT), step(8)], "stage 'denoise' of moon:shot_02, after its last step"),
        (
            [begin("denoise", **SHOT), begin("compile", **SHOT)],
            "stage 'denoise' of moon:shot_02, before its first step has ended, while blocks are compiled",
        ),
        (
            [begin("denoise", **SHOT), begin("compile", **SHOT), end("compile", **SHOT), step(2)],
            "stage 'denoise' of moon:shot_02, step 3 of 8",
        ),
        ([begin("decode", **SHOT)], "stage 'decode' of moon:shot_02"),
        ([end("keyframes", **SHOT)], "the time after stage 'keyframes' of moon:shot_02"),
        ([end("keyframes", **SHOT), begin("save", **SHOT)], "stage 'save' of moon:shot_02"),
        ([begin("save", **SHOT), end("save", **SHOT), begin("recall", **NEXT)], "stage 'recall' of moon:shot_03"),
        (
            [begin("save", **SHOT), begin("recall", **NEXT)],
            "stage 'recall' of moon:shot_03 (with stage 'save' of moon:shot_02 in the background)",
        ),
        ([end("keyframes", **SHOT), begin("save", **SHOT), begin("join", story_id="moon")], BOTH),
        ([begin("join", story_id="moon"), WarningIssued(message="full disk", source="join")], "the start of the job"),
        ([begin("save", **SHOT), ShotFailed(reason="full disk", **SHOT), begin("load")], "stage 'load'"),
    ],
)
def test_the_position_is_described_in_words(events: list[Event], where: str) -> None:
    board, passed_on = ProgressBoard(), Events()
    observer = board.watching(passed_on)
    for event in events:
        observer.notify(event)
    assert board.look().where == where
    assert passed_on.seen == events


def test_leader_and_peers_count_the_same_and_every_event_is_a_sign_of_life() -> None:
    leader, peer = ProgressBoard(), ProgressBoard()
    for board in (leader, peer):
        with timed_stage(board.watching(Events()), "denoise", **SHOT):
            board.watching(Events()).notify(step(1))
    with timed_stage(leader.watching(Events()), "save", **SHOT):
        assert leader.look().number == peer.look().number == 3
        signs = leader.look().num_signs
        leader.sign()
        assert leader.look().num_signs == signs, "a leader that only waits for its own save may hang"
    signs = leader.look().num_signs
    leader.watching(Events()).notify(WeightsProgress(what="t2v", bytes_done=1, bytes_total=2))
    leader.sign()
    assert (leader.look().num_signs, leader.look().number) == (signs + 2, 3)


def test_only_reading_weights_and_texts_is_slow() -> None:
    slow = []
    for stage in ("text", "load", "recall", "condition", "denoise", "decode", "keyframes"):
        board = ProgressBoard()
        with timed_stage(board.watching(Events()), stage):
            slow += [stage] if board.look().is_slow else []
        assert not board.look().is_slow
    assert slow == ["text", "load"]


def test_the_compiler_may_take_its_time_and_is_no_step_of_its_own() -> None:
    """Ranks may differ in what they find compiled, so it does not count in their lock step."""
    board = ProgressBoard()
    board.note(begin("denoise", **SHOT))
    before = board.look()
    board.note(begin("compile", **SHOT))
    during = board.look()
    board.note(end("compile", **SHOT))
    assert (before.is_slow, during.is_slow, board.look().is_slow) == (False, True, False)
    assert before.number == during.number == board.look().number
    assert board.look().num_signs == before.num_signs + 2
