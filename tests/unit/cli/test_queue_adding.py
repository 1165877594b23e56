import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import storymem_dist.events as ev
from storymem_dist.artifacts.requests import Request, RequestLog
from storymem_dist.cli.queue import main
from storymem_dist.observe.queue.known import read_requests
from tests.helpers.fake_run import FakeRun
from tests.helpers.queue_command import BOARD, Said, asked, copy_of, killed_run, listed, states, storyboard


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return killed_run(tmp_path_factory.mktemp("runs") / "night")


@pytest.fixture
def run(rendered: FakeRun, tmp_path: Path) -> FakeRun:
    return copy_of(rendered, tmp_path / "night")


# -- adding ------------------------------------------------------------------------------------------------------------


def test_good_storyboards_are_added_and_bad_ones_refused_each_with_its_reason(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boards = tmp_path / "boards"
    boards.mkdir()
    storyboard(boards / "good.json")
    storyboard(boards / "bad.json", scenes=[{"scene_num": 1, "video_prompts": ["a"], "cut": [True, True]}])
    storyboard(boards / "picture.json", reference_images=["no.png"])
    storyboard(boards / "Story_1.json")  # of a folder that the run has, for a disk without capital letters
    said = Said(capsys, run.root, "add", boards, tmp_path / "nothing*.json")
    assert said.code == 3
    assert "added good: 2 shots, place 4" in said.out and "the next one applies it" in said.out
    assert len(said.err.splitlines()) == 4
    for why in ("video_prompts has 1", "no.png does not exist", "'Story_1' is taken", "nothing*.json"):
        assert why in said.err
    assert asked(run.root) == ["add good"]
    assert ("good", "added", 4) in states(capsys, run.root)


def test_a_list_sets_id_priority_and_seed_and_the_command_sets_them_over_it(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storyboard(tmp_path / "x.json", seed=1)
    rows: list[Any] = [{"path": "x.json", "id": "one", "priority": -3, "seed": 7}, {**BOARD, "id": "two"}]
    rows[1]["story_name"] = "two"
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Said(capsys, run.root, "add", tmp_path / "list.jsonl").code == 0
    assert Said(capsys, run.root, "add", tmp_path / "list.jsonl", "--id", "n/x", "--seed", 9, "--priority", 4).code == 0
    assert Said(capsys, run.root, "add", tmp_path / "x.json", "--first").code == 0
    added = read_requests(run.root)[1].added
    assert {name: (story.priority, story.seed) for name, story in added.items()} == {
        "one": (-3, 7),
        "two": (0, None),
        "n_x-1": (4, 9),
        "n_x-2": (4, 9),
        "x": (0, 1),
    }
    order = [name for name, _, place in states(capsys, run.root) if place]
    assert order == ["x", "one", "story_1", "story_2", "story_3", "two", "n_x-1", "n_x-2"]
    assert Said(capsys, run.root, "add", tmp_path / "x.json").code == 3, "its id is taken by an added story"


@pytest.mark.parametrize("option", [["--priority", "99999999"], ["--seed", "-1"], ["--id", " "]])
def test_an_option_out_of_range_adds_nothing(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    said = Said(capsys, run.root, "add", storyboard(tmp_path / "x.json"), *option)
    assert said.code == 2 and option[0] in said.err and asked(run.root) == []


def test_a_story_that_no_request_can_hold_is_refused(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storymem_dist.artifacts.requests.MAX_REQUEST_BYTES", 300)
    said = Said(capsys, run.root, "add", storyboard(tmp_path / "x.json"))
    assert said.code == 3 and "a request has at most 300 bytes" in said.err and asked(run.root) == []


def test_an_added_story_that_cannot_be_read_any_more_is_listed_with_its_reason(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = storyboard(tmp_path / "x.json", reference_images=[str(run.root / "stories/story_0/keyframes")])
    picture = next((run.root / "stories").rglob("*.png"))
    copy = tmp_path / "a.png"
    copy.write_bytes(picture.read_bytes())
    assert Said(capsys, run.root, "add", storyboard(board, reference_images=["a.png"])).code == 0
    copy.unlink()
    said = Said(capsys, run.root)
    assert said.code == 0 and "without effect: request 1 (add x)" in said.out and "a.png does not exist" in said.out


# -- several at once, and a folder that cannot be written --------------------------------------------------------------


def test_of_two_requests_in_one_moment_the_later_one_says_so(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = storyboard(tmp_path / "x.json")
    publish = RequestLog.publish
    for arguments, why in (
        (["pause"], "somebody else asked the same, by mia@login2"),
        (["skip", "story_2"], "somebody else asked the same, by mia@login2"),
        (["add", str(board)], "the story id x was taken, by mia@login2"),
    ):

        def both(log: RequestLog, request: Request) -> Request:
            other = Request(action=request.action, who="mia@login2", story_id=request.story_id, story=request.story)
            publish(RequestLog(run.root), other)
            return publish(log, request)

        monkeypatch.setattr(RequestLog, "publish", both)
        said = Said(capsys, run.root, *arguments)
        monkeypatch.setattr(RequestLog, "publish", publish)
        assert why in said.out + said.err and said.code == (3 if arguments[0] == "add" else 0)


def test_commands_at_the_same_time_lose_no_request(run: FakeRun) -> None:
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            os._exit(main([str(run.root), "rerender", f"story_0:{number % 3 + 1}"]))
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    found = RequestLog(run.root).read_new()
    assert [request.number for request in found] == list(range(1, 7))
    assert sorted(request.shots for request in found) == sorted([("shot_01",), ("shot_02",), ("shot_03",)] * 2)


@pytest.mark.parametrize(
    ("number", "why"),
    [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only"), (errno.EACCES, "Permission denied")],
)
@pytest.mark.parametrize("arguments", [["pause"], ["add", "x.json"]])
def test_a_folder_that_cannot_be_written_is_one_sentence_with_a_cure(
    run: FakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    why: str,
    arguments: list[str],
) -> None:
    def refuse(*_: object, **how: object) -> bool:
        raise OSError(number, os.strerror(number), "requests/000/000001.json")

    storyboard(tmp_path / "x.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("storymem_dist.artifacts.requests.create_exclusively", refuse)
    said = Said(capsys, run.root, *arguments)
    assert said.code == 5 and why in said.err and "then give the same command again" in said.err
    assert said.err.count("\n") == 1 and "no shot is marked" not in said.err


@pytest.mark.parametrize("link", ["requests", "requests/000", "requests/000/000001.json"])
def test_a_link_that_leads_out_of_the_run_folder_is_neither_read_nor_written(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str
) -> None:
    outside = tmp_path / "outside"
    (outside / "000").mkdir(parents=True)
    request = outside / "000" / "000001.json"
    request.write_text('{"action": "pause", "who": "a secret"}')
    place = run.root / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tmp_path.joinpath("outside", *link.split("/")[1:]))
    said = Said(capsys, run.root, "stop")
    if link.endswith(".json"):
        assert said.code == 0, "the request after it"
    else:
        assert said.code == 5 and "is a link that leads out of" in said.err and said.err.count("\n") == 1
    assert "a secret" not in Said(capsys, run.root).out and sorted(outside.rglob("*.json")) == [request]


# -- hostile names -----------------------------------------------------------------------------------------------------


def test_two_hundred_hostile_names_do_no_harm(run: FakeRun, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    draw = random.Random(21)
    pieces = ["../", "/", "story_0", ":", "\x1b[31m", "\n", "\r", "\u202e", "\udcff", "\0", "é", "-", "shot_01"]
    pieces += ["9" * 30, " ", "%s", "{}", "[b]"]
    before = sorted(path for path in run.root.rglob("*") if "requests" not in path.parts)
    board = storyboard(tmp_path / "x.json")
    for _ in range(200):
        name = "".join(draw.choices(pieces, k=draw.randint(1, 6)))
        action = draw.choice(["skip", "first", "rerender", "unskip", "id"])
        if action == "id":
            said = Said(capsys, run.root, "add", board, f"--id={name}")
            assert said.code in (0, 2, 3), name
        elif name.startswith("-"):
            continue
        else:
            said = Said(capsys, run.root, action, name)
            assert said.code in (0, 2), name
        for stream in (said.out, said.err):
            assert "\x1b" not in stream and "\u202e" not in stream and "\r" not in stream
            assert len(stream.splitlines()) <= 3
    assert sorted(path for path in run.root.rglob("*") if "requests" not in path.parts) == before
    outside = {path.name for path in tmp_path.iterdir()}
    assert outside == {"night", "x.json"}
    shown = Said(capsys, run.root)
    assert shown.code == 0 and "\x1b" not in shown.out
    assert listed(capsys, run.root)["stories"]


def test_texts_of_other_people_are_escaped_in_the_list(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    log = RequestLog(run.root)
    log.publish(Request(action="pause", who="\x1b[2Jlea\nroot: all is well", when=1.0))
    log.publish(Request(action="skip", story_id="story_2", who="mia\r\u202e", when=2.0))
    with run.replica(0) as replica:
        replica.observers.notify(ev.StoryStarted(story_id="evil\x1b[31m\nx", num_shots=2))
    said = Said(capsys, run.root)
    assert said.code == 0 and "\x1b" not in said.out and "\u202e" not in said.out
    assert not any(line.startswith("root: all is well") for line in said.out.splitlines())
