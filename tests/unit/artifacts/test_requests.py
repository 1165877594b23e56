"""The request log: one order, nothing lost or written over, and a state that depends on the log alone."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storymem_dist.artifacts.requests import DAMAGED, PER_FOLDER, QueueState, Request, RequestLog, check_request
from storymem_dist.errors import ConfigError
from storymem_dist.files import read_limited
from storymem_dist.story.loading import load_storyboards
from tests.helpers.fake_renderer import make_story

BOARD = {
    "story_name": "The reef",
    "style": "ink",
    "seed": 5,
    "scenes": [
        {
            "scene_num": 1,
            "shots": [
                {"prompt": "a reef", "name": "reef"},
                {
                    "prompt": "fish",
                    "recall": ["reef"],
                    "guidance": [3.5, 4.0],
                    "negative_prompt": "",
                    "remember": False,
                },
                {"prompt": "the diver", "cut": False, "num_frames": 33},
            ],
        }
    ],
}


def apply_all(log: RequestLog) -> QueueState:
    state = QueueState()
    for request in log.read_new():
        state.apply(request)
    return state


def test_requests_are_numbered_and_read_once(tmp_path: Path) -> None:
    log, reader = RequestLog(tmp_path), RequestLog(tmp_path)
    assert reader.read_new() == []
    sent = [log.publish(Request(action="pause", via="test")), log.publish(Request(action="skip", story_id="ocean"))]
    assert [one.number for one in sent] == [1, 2]
    assert all(one.who and one.when for one in sent)
    assert reader.read_new() == sent
    assert reader.read_new() == [] and reader.number == 2
    log.publish(Request(action="rerender", story_id="ocean", shots=("shot_03",), only=True))
    (third,) = reader.read_new()
    assert third.describe() == "rerender ocean:shot_03 --only"


def test_publishers_at_once_lose_nothing(tmp_path: Path) -> None:
    def publish(number: int) -> None:
        log = RequestLog(tmp_path)
        for count in range(10):
            log.publish(Request(action="first", story_id=f"story_{number}_{count}"))

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = RequestLog(tmp_path).read_new()
    assert [one.number for one in found] == list(range(1, 41))
    assert len({one.story_id for one in found}) == 40


def test_folders_hold_some_thousand_names_and_a_hole_is_filled(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    for number in range(1, PER_FOLDER):
        path = log.path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"action": "pause"}))
    sent = log.publish(Request(action="resume"))
    assert sent.number == PER_FOLDER
    assert log.path(sent.number).parent.name == "001"
    log.path(7).unlink()  # by hand: readers would wait there for ever
    assert RequestLog(tmp_path).publish(Request(action="stop")).number == 7
    assert len(RequestLog(tmp_path).read_new()) == PER_FOLDER


def test_a_request_has_the_permissions_of_the_run_folder(tmp_path: Path) -> None:
    root, before = tmp_path / "run", os.umask(0o077)
    try:
        root.mkdir()
        root.chmod(0o770)
        log = RequestLog(root)
        log.publish(Request(action="pause"))
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (log.folder, log.path(1).parent, log.path(1))]
    assert modes == [0o770, 0o770, 0o660]


def test_names_that_lead_nowhere_hold_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RequestLog(tmp_path)
    log.publish(Request(action="pause"))
    log.path(2).symlink_to("nothing")
    log.path(3).mkdir()
    assert log.publish(Request(action="resume")).number == 4

    def forbidden(path: Path, max_bytes: int) -> bytes:
        if path.name == log.path(1).name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_limited(path, max_bytes)

    monkeypatch.setattr("storymem_dist.artifacts.requests.read_limited", forbidden)
    found = RequestLog(tmp_path).read_new()
    assert [request.action for request in found] == [DAMAGED, DAMAGED, DAMAGED, "resume"]
    assert "Permission denied" in found[0].problem


def test_a_story_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "reef.json"
    path.write_text(json.dumps(BOARD))
    (story,) = load_storyboards(path).stories
    story = replace(story, priority=-3, seed=11)
    RequestLog(tmp_path).publish(Request(action="add", story_id=story.story_id, story=story))
    path.unlink()
    (request,) = RequestLog(tmp_path).read_new()
    assert request.story is not None
    assert replace(request.story, style="", warnings=()) == replace(story, style="", warnings=())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"action": "format disk"}',
        '{"action": "skip"}',
        '{"action": "skip", "story_id": "../x"}',
        '{"action": "skip", "story_id": 7}',
        '{"action": "rerender", "story_id": "x", "shots": ["../../etc"]}',
        '{"action": "pause", "when": "yesterday"}',
        '{"action": "rerender", "story_id": "x", "seed": -1}',
        '{"action": "pause", "who": "' + "x" * 300 + '"}',
        '{"action": "add", "story_id": "x"}',
        '{"action": "add", "story_id": "x", "story": {}, "priority": 1e300}',
        '{"action": "add", "story_id": "x", "story": {"scenes": []}, "source": "a\\u0000b"}',
    ],
)
def test_a_file_that_is_no_request_changes_nothing(tmp_path: Path, text: str) -> None:
    log = RequestLog(tmp_path)
    log.path(1).parent.mkdir(parents=True)
    log.path(1).write_text(text)
    log.publish(Request(action="pause"))
    bad, good = RequestLog(tmp_path).read_new()
    assert bad.action == DAMAGED and str(log.path(1)) in bad.problem
    state = QueueState()
    state.apply(bad)
    assert state == QueueState(requests=[bad])
    assert good.action == "pause"


def test_a_story_that_cannot_be_rendered_any_more_is_not_added(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    story = make_story("ocean", 1, reference_images=(tmp_path / "gone.png",))
    log.publish(Request(action="add", story_id="ocean", story=story))
    (request,) = RequestLog(tmp_path).read_new()
    assert request.story is None and "gone.png" in request.problem
    state = QueueState()
    state.apply(request)
    assert not state.added


def test_the_newest_first_comes_first_and_takes_back_a_skip(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    for action, story_id in [("first", "a"), ("skip", "b"), ("skip", "c"), ("first", "b"), ("unskip", "d")]:
        log.publish(Request(action=action, story_id=story_id))
    state = apply_all(RequestLog(tmp_path))
    assert state.first["b"] < state.first["a"] < -(2**31)
    assert list(state.skipped) == ["c"]


def generation(state: QueueState, shot_id: str) -> tuple[int, int]:
    own, for_others = state.again("s", shot_id)
    return own.generation, for_others.generation


def test_generations() -> None:
    state = QueueState()

    def ask(*shots: str, only: bool, seed: int | None = None) -> None:
        state.apply(Request(action="rerender", story_id="s", shots=shots, only=only, seed=seed))

    assert generation(state, "shot_01") == (0, 0)
    ask("shot_01", only=True, seed=7)
    assert (generation(state, "shot_01"), generation(state, "shot_02")) == ((1, 0), (0, 0))
    own, for_others = state.again("s", "shot_01")
    assert (own.seed, for_others.seed) == (7, None)
    ask(only=False)
    assert (generation(state, "shot_01"), generation(state, "shot_02")) == ((2, 2), (1, 1))
    assert state.again("s", "shot_01")[1].seed == 7
    ask("shot_01", only=False)
    assert generation(state, "shot_01") == (3, 3)
    ask(only=False, seed=9)
    assert state.again("s", "shot_01")[0] == state.again("s", "shot_01")[1]
    assert (state.again("s", "shot_01")[0].seed, state.again("s", "shot_01")[0].of_story) == (9, True)
    assert state.again("t", "shot_01")[0].generation == 0


_REQUESTS = st.lists(
    st.builds(
        Request,
        action=st.sampled_from(["rerender"]),
        story_id=st.just("s"),
        shots=st.sampled_from([(), ("shot_01",), ("shot_02",), ("shot_01", "shot_02")]),
        only=st.booleans(),
    ),
    max_size=12,
)


@given(requests=_REQUESTS)
@settings(max_examples=200, deadline=None)
def test_every_request_to_rerender_gives_a_new_generation(requests: list[Request]) -> None:
    """Or a shot would be found committed and not be rendered again, and its followers would show an earlier one."""
    state, own, others = QueueState(), [(0, 0)], [(0, 0)]
    for request in requests:
        state.apply(request)
        both = [generation(state, shot_id) for shot_id in ("shot_01", "shot_02")]
        own.append((both[0][0], both[1][0]))
        others.append((both[0][1], both[1][1]))
        for position, shot_id in enumerate(("shot_01", "shot_02")):
            is_asked = not request.shots or shot_id in request.shots
            assert own[-1][position] - own[-2][position] == is_asked
            grows = others[-1][position] > others[-2][position]
            assert grows == (is_asked and not request.only)
            assert others[-1][position] <= own[-1][position]


def test_what_can_have_no_effect_is_refused() -> None:
    known = {"ocean": ["shot_01", "shot_02"], "city": ["shot_01"]}
    check_request(Request(action="pause"), known)
    check_request(Request(action="rerender", story_id="ocean", shots=("shot_02",)), known)
    check_request(Request(action="add", story_id="new", story=make_story("new", 1)), known)
    for request, words in [
        (Request(action="skip", story_id="ocaen"), "no story 'ocaen' in this run folder; did you mean ocean?"),
        (
            Request(action="rerender", story_id="city", shots=("shot_02",)),
            "city has no shot 'shot_02'; did you mean shot_01?",
        ),
        (Request(action="add", story_id="city", story=make_story("city", 1)), "'city' is taken"),
        (Request(action="add", story_id="new"), "needs the story"),
        (Request(action="explode"), "'explode' is no request; use one of: add, pause"),
    ]:
        with pytest.raises(ConfigError, match=words):
            check_request(request, known)
