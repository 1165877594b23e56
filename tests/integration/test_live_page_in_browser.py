"""The live page as people meet it: in headless Chromium while a run goes on, its server goes and comes back.

Needs Chromium, Node.js and the packages of ``tests/browser`` (``npm ci --prefix tests/browser``); skipped without.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from storymem_dist.artifacts.requests import RequestLog
from tests.helpers.fake_run import FakeRun
from tests.helpers.live_page import TOKEN, served, wait_until
from tests.integration.test_report_in_browser import BROWSER, CHROMIUM
from tests.integration.test_report_in_browser import pytestmark as pytestmark


@contextlib.contextmanager
def browser(*addresses: str) -> Iterator[subprocess.Popen[str]]:
    command = ["node", str(BROWSER / "live.mjs"), *addresses, "--chromium", str(CHROMIUM)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the browser saw, and what the run folder holds afterwards."""
    run = FakeRun(tmp_path_factory.mktemp("live") / "run", num_stories=2, num_shots=4)
    values: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        replica = stack.enter_context(run.replica(at=time.time()))
        run.load_weights(replica)
        run.shot(replica, 0, 0)
        run.shot(replica, 1, 0)
        page = stack.enter_context(served([run.root]))
        both = stack.enter_context(served([run.root, run.root]))
        process = stack.enter_context(browser(*(f"{one.address}/#token={TOKEN}" for one in (page, both))))
        assert process.stdin is not None and process.stdout is not None
        while (line := process.stdout.readline().strip()) and not line.startswith("{"):
            match line:
                case "begin shot_02":
                    run.shot(replica, 0, 1, stop_after_step=2)
                case "finish shot_02":
                    run.shot(replica, 0, 1)
                case "stop the server":
                    page.stop()
                case "start the server":
                    page = stack.enter_context(served([run.root], port=page.port))
                case "finish shot_03":
                    run.shot(replica, 0, 2)
                case "count the followers":
                    wait_until(lambda hub=page.hub: hub.num_followers == 0)  # type: ignore[misc]
                    values["hidden page reads nothing"] = True
                case _:
                    raise AssertionError(line)
            process.stdin.write("\n")
            process.stdin.flush()
        assert line, "the browser ended early"
        values |= json.loads(line)
    values["requests"] = [request.describe() for request in RequestLog(run.root).read_new()]
    return values


def test_shots_appear_while_they_are_rendered_and_disturb_nobody(seen: dict[str, Any]) -> None:
    assert seen["progress"] == "2"
    assert seen["kept"] == {"page": True, "closed": 0, "playing": True, "focus": "theme"}
    assert seen["moved"] <= 2
    assert seen["newVideoPlays"] == 160 and seen["playButton"] == 0
    assert seen["errorsWhileOpen"] == []


def test_the_buttons_publish_their_requests(seen: dict[str, Any]) -> None:
    assert seen["requests"] == [
        "pause",
        "resume",
        "skip story_0",
        "unskip story_0",
        "first story_0",
        "rerender story_0:shot_01 --only",
        "stop --now",
    ]
    numbers = [text.partition(":")[0] for text in seen["asked"].values()]
    assert numbers == [f"request {number}" for number in range(1, 8)], "each result is shown"
    assert seen["dialogsLeft"] == 0, "Escape asks for nothing"


def test_it_is_accessible_and_leaves_the_machine_alone(seen: dict[str, Any]) -> None:
    serious = [found for found in seen["violations"] if found["impact"] in ("serious", "critical")]
    assert serious == [] and seen["foreign"] == []
    assert seen["overflow"] <= 0


def test_it_goes_on_when_the_server_comes_back(seen: dict[str, Any]) -> None:
    assert seen["stillTheSame"] is True
    assert seen["hidden page reads nothing"] is True


def test_the_token_leaves_the_address_and_without_it_there_are_no_buttons(seen: dict[str, Any]) -> None:
    assert "token" not in seen["addressAfter"]
    assert seen["buttonsWithoutToken"] == 0 and "with its token" in seen["wordsWithoutToken"]


def test_the_list_of_runs_keeps_the_token_for_their_pages(seen: dict[str, Any]) -> None:
    assert "token" not in seen["listAfter"] and seen["buttonsOfListed"] > 0
