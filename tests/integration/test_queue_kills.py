"""Random requests and kills on a run folder: every request is applied, and none twice.

Workers are forked processes with the fake renderer; they are killed with SIGKILL at random moments, and so are commands
that publish. Each sequence is made from its seed. What happens when depends on the machine, what is expected does not.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.requests import Request, RequestLog
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.events import RequestApplied
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import Events, FakeRenderer, make_part, make_story
from tests.helpers.workers import exit_code, fork_worker, has_ended, kill, quick_folder, start_worker

NUM_SEQUENCES = 200
FIRST = [make_story("a", 2), make_story("b", 1)]
LATER = {name: make_story(name, 1) for name in ("c", "d")}
SETTINGS = DispatchSettings(poll_seconds=0.01, lease_seconds=1.0, checkpoint_every_steps=1, max_attempts=1_000_000)


def random_request(draw: random.Random, to_add: list[Story]) -> Request:
    action = draw.choice(["add", "pause", "resume", "skip", "unskip", "first", "rerender", "rerender", "stop"])
    if action == "add":
        if not to_add:
            return Request(action="resume")
        story = to_add.pop()
        return Request(action="add", story_id=story.story_id, story=story)
    story_id = draw.choice(["a", "b", "c"])
    if action == "rerender":
        shots = draw.choice([(), ("shot_01",), ("shot_02",)]) if story_id == "a" else ()
        return Request(action=action, story_id=story_id, shots=shots, only=draw.random() < 0.3)
    if action == "stop":
        return Request(action=action, now=draw.random() < 0.5)
    return Request(action=action, story_id=story_id if action in ("skip", "unskip", "first") else "")


def publisher(root: Path, request: Request) -> Callable[[], int]:
    def publish() -> int:
        RequestLog(root).publish(request)
        return 0

    return publish


def published(root: Path) -> list[Request]:
    return RequestLog(root).read_new()


def disturb(root: Path, draw: random.Random) -> None:
    """Requests from processes of their own, some of which are killed, while one or two workers come and go."""
    to_add = list(LATER.values())
    workers: list[int] = []
    for _ in range(draw.randint(2, 5)):
        workers = [pid for pid in workers if not has_ended(pid) or exit_code(pid) is None]
        if len(workers) < 2 and draw.random() < 0.6:
            workers.append(start_worker(root, FIRST, step_seconds=0.002, settings=SETTINGS))
        request = random_request(draw, to_add)
        if draw.random() < 0.15:
            asking = fork_worker(publisher(root, request))
            time.sleep(draw.random() * 0.004)
            kill(asking)
            exit_code(asking)
        else:
            RequestLog(root).publish(request)
        if workers and draw.random() < 0.35:
            time.sleep(draw.random() * 0.02)
            victim = workers.pop(draw.randrange(len(workers)))
            kill(victim)
            exit_code(victim)
    for pid in workers:
        kill(pid)
        exit_code(pid)


def expected_generations(requests: list[Request]) -> Counter[str]:
    """How often each shot is to be rendered again, counted without the code under test."""
    counts: Counter[str] = Counter()
    for request in requests:
        if request.action == "rerender":
            all_shots = {"a": ("shot_01", "shot_02"), "b": ("shot_01",), "c": ("shot_01",)}[request.story_id]
            counts.update(f"{request.story_id}:{shot_id}" for shot_id in request.shots or all_shots)
    return counts


def check(root: Path, requests: list[Request]) -> None:
    """All requests are in the records: nothing is rendered too often or not often enough, and nothing is left over."""
    added = {request.story_id for request in requests if request.action == "add"}
    wanted = {"a:shot_01", "a:shot_02", "b:shot_01", *(f"{name}:shot_01" for name in added)}
    records = {}
    for path in root.glob("stories/*/shot_*.json"):
        record = ShotRecord.from_json(json.loads(path.read_text()))
        records[f"{record.story_id}:{record.shot_id}"] = record
        made = RunFolder(root).shot(record.story_id, record.shot_id).files_of(record) / record.clip
        assert path.with_suffix(".mp4").read_bytes() == made.read_bytes()
    assert records.keys() == wanted
    expected = expected_generations(requests)
    assert {name: record.inputs.get("forced_rerenders", 0) for name, record in records.items()} == {
        name: expected[name] for name in wanted
    }
    # A worker that was killed before its first heartbeat was written counts as alive for a lease time.
    left = {path.suffix for path in (root / "leases").iterdir()}
    assert ".lease" not in left or ".alive" in left


def run_sequence(root: Path, seed: int) -> None:
    draw = random.Random(seed)
    RunFolder(root).open()
    disturb(root, draw)
    for request in [Request(action="resume"), *(Request(action="unskip", story_id=name) for name in "abcd")]:
        RequestLog(root).publish(request)
    RequestLog(root).publish(Request(action="rerender", story_id="b"))
    num_before = len(published(root))
    while_running = [Request(action="rerender", story_id="a", shots=("shot_02",)), Request(action="pause")]
    while_running.append(Request(action="resume"))

    def ask(*_: object) -> None:
        while while_running:
            RequestLog(root).publish(while_running.pop(0))

    events = Events()
    summary = render_batch(
        parts=[make_part(root, FIRST, observers=events)],
        renderer=FakeRenderer(before_step=ask),
        settings=SETTINGS,
    )
    assert summary.state == "done", summary
    applied = [(event.number, event.at_start) for event in events.of(RequestApplied)]
    assert applied == [(number, number <= num_before) for number in range(1, num_before + 4)]
    check(root, published(root))


@pytest.mark.parametrize("first", range(0, NUM_SEQUENCES, 50))
def test_no_request_is_lost_or_applied_twice(first: int) -> None:
    for seed in range(first, first + 50):
        with quick_folder() as folder:
            try:
                run_sequence(folder / "run", seed)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
