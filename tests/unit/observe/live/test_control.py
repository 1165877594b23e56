"""The buttons of a live page: each publishes the request that ``storymem-queue`` would, or says why not."""

from pathlib import Path
from typing import Any

import pytest

from storymem_dist.artifacts.requests import Request, RequestLog
from storymem_dist.observe.live.control import ACTIONS, MAX_BODY_BYTES
from tests.helpers.fake_run import FakeRun
from tests.helpers.live_page import TOKEN, LivePage, live_page


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = FakeRun(tmp_path_factory.mktemp("control") / "run", num_stories=2, num_shots=2)
    with run.replica(0) as replica:
        for story, shot in ((0, 0), (0, 1), (1, 0)):
            run.shot(replica, story, shot)
    return run.root


@pytest.fixture(scope="module")
def page(root: Path) -> Any:
    with live_page(root) as page:
        yield page


REQUESTS = [
    ({"action": "pause"}, Request(action="pause")),
    ({"action": "resume"}, Request(action="resume")),
    ({"action": "skip", "story_id": "story_1"}, Request(action="skip", story_id="story_1")),
    ({"action": "unskip", "story_id": "story_1"}, Request(action="unskip", story_id="story_1")),
    ({"action": "first", "story_id": "story_1"}, Request(action="first", story_id="story_1")),
    ({"action": "rerender", "story_id": "story_0"}, Request(action="rerender", story_id="story_0")),
    (
        {"action": "rerender", "story_id": "story_0", "shots": ["shot_02"], "only": True},
        Request(action="rerender", story_id="story_0", shots=("shot_02",), only=True),
    ),
    ({"action": "stop"}, Request(action="stop")),
    ({"action": "stop", "now": True}, Request(action="stop", now=True)),
]


def test_every_button_publishes_its_request(page: LivePage, root: Path) -> None:
    log = RequestLog(root)
    for number, (sent, expected) in enumerate(REQUESTS, start=1):
        answer = page.ask(**sent)
        assert answer.status_code == 200, answer.text
        assert answer.json()["number"] == number and answer.json()["text"].startswith(f"request {number}: ")
        (found,) = log.read_new()
        assert found.describe() == expected.describe() and found.via == "live page"
        assert found.who and found.when > 0
    assert {sent["action"] for sent, _ in REQUESTS} == set(ACTIONS)
    needless = page.ask(action="resume")
    assert needless.json() == {"number": None, "text": "the queue is not paused"}
    assert log.read_new() == []


@pytest.mark.parametrize(("sent", "words"), [
    ({"action": "skip", "story_id": "no"}, "no story 'no' in this run folder; there are: story_0, story_1"),
    ({"action": "skip"}, "no story ''"),
    ({"action": "rerender", "story_id": "story_0", "shots": ["shot_9"]}, "has no shot 'shot_9'"),
    ({"action": "rerender", "story_id": "story_0", "shots": "shot_01"}, "shots is a list"),
    ({"action": "rerender", "story_id": "story_0", "only": "yes"}, "only='yes' is not allowed"),
    ({"action": "rerender", "story_id": 7}, "story_id=7 is not allowed"),
    ({"action": "add", "story_id": "x"}, "action='add' is not allowed"),
    ({"action": ["pause"]}, "is not allowed; use one of: pause"),
    ({"action": "pause", "who": "root@moon"}, "pause has no 'who'"),
    ({"action": "stop", "now": 1}, "now=1 is not allowed"),
    ({}, "action=None"),
])  # fmt: skip
def test_a_wrong_request_is_refused_in_words(page: LivePage, root: Path, sent: dict[str, Any], words: str) -> None:
    before = len(list(root.glob("requests/*/*")))
    answer = page.ask(**sent)
    assert answer.status_code == 400 and words in answer.json()["error"]
    assert len(list(root.glob("requests/*/*"))) == before


@pytest.mark.parametrize(("body", "kind", "status"), [
    (b"{", "application/json", 400), (b"[]", "application/json", 400), (b"\xff\xfe", "application/json", 400),
    (b'{"action":"pause","action":"stop"}', "application/json", 400), (b"[" * 9000, "application/json", 400),
    (b'{"action":"pause"}', "text/plain", 415), (b"action=pause", "application/x-www-form-urlencoded", 415),
    (b" " * (MAX_BODY_BYTES + 1), "application/json", 413),
])  # fmt: skip
def test_a_body_that_is_no_request_is_refused(page: LivePage, root: Path, body: bytes, kind: str, status: int) -> None:
    before = len(list(root.glob("requests/*/*")))
    headers = {"content-type": kind, "x-storymem-token": TOKEN}
    answer = page.send(("POST", "/control", {"content": body, "headers": headers}))[0]
    assert answer.status_code == status and answer.json()["error"]
    assert len(list(root.glob("requests/*/*"))) == before
