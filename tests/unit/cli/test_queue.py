import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import storymem_dist.events as ev
from storymem_dist.cli.queue import main
from storymem_dist.dispatch.leases import LeaseFolder, Owner
from storymem_dist.observe.queue.known import known_stories, read_requests
from storymem_dist.observe.queue.view import read_queue
from tests.helpers.fake_run import FakeRun, whole_run
from tests.helpers.queue_command import Said, asked, copy_of, killed_run, listed, states, storyboard


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return killed_run(tmp_path_factory.mktemp("runs") / "night")


@pytest.fixture
def run(rendered: FakeRun, tmp_path: Path) -> FakeRun:
    return copy_of(rendered, tmp_path / "night")


# -- the list ----------------------------------------------------------------------------------------------------------


def test_a_resting_run_is_listed_with_state_place_shots_and_an_unknown_time(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert states(capsys, run.root) == [
        ("story_1", "waiting", 1),
        ("story_2", "waiting", 2),
        ("story_3", "waiting", 3),
        ("story_0", "finished", None),
    ]
    said = Said(capsys, run.root)
    assert said.code == 0
    assert "4 of 12 shots done, time left: unknown" in said.out and "no job is running" in said.out
    assert [line.split()[:4] for line in said.out.splitlines() if "story_1" in line] == [
        ["1", "story_1", "waiting", "1/3"]
    ]


def test_what_runs_is_known_by_its_heartbeat_and_gives_the_time_left(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    leases = LeaseFolder(folder=run.folder.leases_folder, owner=Owner.this_process("job 7"), lease_seconds=60.0)
    leases.start()
    try:
        with run.replica(0, at=time.time()) as replica:
            run.shot(replica, 1, 1, stop_after_step=1)
        view = read_queue(run.root)
    finally:
        leases.close()
    assert [(one.job, one.replica, one.is_working) for one in view.replicas] == [("job 7", 0, True)]
    running, waiting, last, done = view.stories
    assert (running.story_id, running.state, running.place, running.shots_done) == ("story_1", "running", 1, 1)
    assert running.seconds_left is not None and waiting.seconds_left is not None
    assert 0 < running.seconds_left < waiting.seconds_left < (last.seconds_left or 0) == view.seconds_left
    assert done.seconds_left is None
    assert read_queue(run.root).stories[0].state == "waiting", "its process has gone"


@pytest.mark.parametrize(
    ("age", "changes", "is_running"),
    [
        (10.0, {"boot_id": "another machine"}, True),
        (1000.0, {"boot_id": "another machine"}, False),
        (10.0, {"pid": 2**22 + 1}, False),
        (10.0, {"replica": "x"}, False),
        (10.0, {"state": "waiting"}, True),
    ],
)
def test_a_heartbeat_of_another_machine_counts_by_its_age(
    run: FakeRun, age: float, changes: dict[str, Any], is_running: bool
) -> None:
    owner = Owner.this_process("job 7")
    leases = LeaseFolder(folder=run.folder.leases_folder, owner=owner, lease_seconds=60.0)
    leases.start()
    (path,) = run.folder.leases_folder.glob("*.alive")
    values = {**json.loads(path.read_text()), **changes}
    leases.close()
    path.write_text(json.dumps(values))
    os.utime(path, (time.time() - age, time.time() - age))
    (run.folder.leases_folder / "broken.alive").write_text("{")
    assert bool(read_queue(run.root).replicas) is is_running


def test_a_folder_without_events_is_listed_from_its_records(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    for path in run.folder.events_folder.iterdir():
        path.unlink()
    found = {one["story_id"]: one for one in listed(capsys, run.root)["stories"]}
    assert {name: (one["state"], one["shots_done"], one["shots_total"]) for name, one in found.items()} == {
        "story_0": ("finished", 3, 3),
        "story_1": ("waiting", 1, 3),
        "story_2": ("waiting", 0, 3),
        "story_3": ("waiting", 0, 3),
    }
    assert Said(capsys, run.root, "skip", "story_2").code == 0
    assert Said(capsys, run.root, "rerender", "story_0:2").code == 0
    assert asked(run.root) == ["skip story_2", "rerender story_0:shot_02"]


def test_a_new_run_folder_without_a_story_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun(tmp_path / "night", num_stories=0)
    assert "0 of 0 shots done" in Said(capsys, run.root).out
    assert "it has none yet" in Said(capsys, run.root, "skip", "x").err


def test_a_failed_story_says_why_and_stories_come_by_priority(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(tmp_path / "night", num_stories=0)
    with run.replica(0) as replica:
        notify = replica.observers.notify
        for name, priority in (("a", 5), ("b", -5), ("c", 0)):
            notify(ev.StoryStarted(story_id=name, num_shots=2, priority=priority))
        notify(ev.ShotFailed(story_id="a", shot_id="shot_01", reason="x"))
        notify(ev.ShotSkipped(story_id="a", shot_id="shot_02", reason="predecessor failed"))
        notify(ev.StoryFinished(story_id="a", outcome="failed", message="shot_01 failed"))
    (b, c, a) = listed(capsys, run.root)["stories"]
    assert [(one["story_id"], one["priority"]) for one in (b, c, a)] == [("b", -5), ("c", 0), ("a", 5)]
    assert (a["state"], a["message"], a["place"]) == ("failed", "shot_01 failed", None)


@pytest.mark.parametrize("arguments", [[], ["pause"], ["skip", "a"], ["add", "x.json"], ["rerender", "a:1"], ["stop"]])
def test_a_folder_of_something_else_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "storymem_run.json").write_text('{"format": 2, "run_id": "x"}')
    for name, why in (("", "has no storymem_run.json"), ("none", "has no"), ("file", "marker"), ("newer", "format 2")):
        before = sorted(tmp_path.rglob("*"))
        said = Said(capsys, tmp_path / name, *arguments)
        assert said.code == 5 and why in said.err and said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


# -- changes -----------------------------------------------------------------------------------------------------------


def test_a_pause_holds_the_queue_until_it_is_resumed_and_asking_twice_changes_nothing(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(capsys, run.root, "pause")
    assert said.code == 0 and "no other shot begins" in said.out and "the next one applies it" in said.out
    again = Said(capsys, run.root, "pause")
    assert again.code == 0 and "paused already, by" in again.out and "(request 1)" in again.out
    assert [state for _, state, _ in states(capsys, run.root)] == ["paused"] * 3 + ["finished"]
    shown = Said(capsys, run.root).out
    assert "paused by" in shown and "not yet applied: pause" in shown
    assert Said(capsys, run.root, "resume").code == 0
    assert "not paused" in Said(capsys, run.root, "resume").out
    assert asked(run.root) == ["pause", "resume"]
    assert [state for _, state, _ in states(capsys, run.root)] == ["waiting"] * 3 + ["finished"]


def test_stories_are_skipped_taken_back_and_put_first_in_the_order_given(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Said(capsys, run.root, "skip", "story_1", "story_2").code == 0
    assert "skipped already, by" in Said(capsys, run.root, "skip", "story_1").out
    assert states(capsys, run.root)[:1] == [("story_3", "waiting", 1)]
    assert Said(capsys, run.root, "unskip", "story_1").code == 0
    assert "not skipped" in Said(capsys, run.root, "unskip", "story_1").out
    assert Said(capsys, run.root, "first", "story_3", "story_2").code == 0
    assert "first already" in Said(capsys, run.root, "first", "story_3").out
    assert [name for name, _, place in states(capsys, run.root) if place] == ["story_3", "story_2", "story_1"]
    for action in ("skip", "first"):
        assert "is finished" in Said(capsys, run.root, action, "story_0").out
    assert asked(run.root)[2:] == ["unskip story_1", "first story_2", "first story_3"]


@pytest.mark.parametrize(
    ("names", "only", "expected"),
    [
        (["story_0:2"], False, ["rerender story_0:shot_02"]),
        (
            ["story_0:shot_03", "story_1", "story_0:1"],
            True,
            ["rerender story_0:shot_03,shot_01 --only", "rerender story_1 --only"],
        ),
        (["story_0:1", "story_0"], False, ["rerender story_0"]),
    ],
)
def test_shots_are_rendered_again_one_request_a_story(
    run: FakeRun, capsys: pytest.CaptureFixture[str], names: list[str], only: bool, expected: list[str]
) -> None:
    assert Said(capsys, run.root, "rerender", *names, *(["--only"] if only else [])).code == 0
    assert asked(run.root) == expected
    assert states(capsys, run.root)[0][1] == "waiting"


def test_a_shot_is_found_by_its_own_name_in_a_storyboard_and_in_an_added_story(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = [
        {
            "scene_num": 1,
            "shots": [{"prompt": "a", "name": "the reef: dawn", "cut": True}, {"prompt": "b", "cut": True}],
        }
    ]
    board = storyboard(tmp_path / "reef.json", scenes=scenes)
    assert Said(capsys, run.root, "add", board).code == 0
    queue = read_requests(run.root)[1]
    run.folder.write_storyboard(queue.added["reef"])
    with run.replica(0) as replica:
        replica.observers.notify(ev.StoryStarted(story_id="reef", num_shots=2))
        replica.observers.notify(ev.ShotFinished(story_id="reef", shot_id="shot_01"))
    assert Said(capsys, run.root, "rerender", "reef:the reef: dawn").code == 0
    assert asked(run.root)[-1] == "rerender reef:shot_01"
    (run.root / "requests" / "000" / "000001.json").write_text("{}")  # as if a job had been given the storyboard
    assert Said(capsys, run.root, "rerender", "reef:the reef: dawn", "--only").code == 0
    assert asked(run.root)[-1] == "rerender reef:shot_01 --only"


def test_nothing_is_rendered_again_of_a_story_that_has_no_clip(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(capsys, run.root, "rerender", "story_2:1")
    assert said.code == 0 and "nothing of story_2 is rendered yet" in said.out and asked(run.root) == []
    said = Said(capsys, run.root, "rerender", "story_2:1", "--seed", "7")
    assert said.code == 0 and "story_2:shot_01 with seed 7" in said.out, "a seed is something new"
    assert asked(run.root) == ["rerender story_2:shot_01 --seed 7"]
    assert Said(capsys, run.root, "rerender", "story_2:1", "--seed", "-1").code == 2


def test_a_stop_is_for_the_jobs_that_run_now(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, run.root, "stop", "--now")
    assert said.code == 0 and "no job shows a sign of life" in said.out and "after its step" in said.out
    assert "not yet applied" not in Said(capsys, run.root).out, "no later job applies it"
    leases = LeaseFolder(folder=run.folder.leases_folder, owner=Owner.this_process("job 7"), lease_seconds=60.0)
    leases.start()
    assert "every job here stops when its running shots are done" in Said(capsys, run.root, "stop").out
    leases.close()
    assert asked(run.root) == ["stop --now", "stop"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["skip", "story_2", "stroy_1"], "no story 'stroy_1' in this run folder; did you mean story_1"),
        (["first", ""], "no story '' in this run folder"),
        (["rerender", "story_0:9"], "story_0 has no shot 'shot_09'; "),
        (["rerender", "story_0:1", "story_0:reef"], "story_0 has no shot 'reef'; it has shot_01, shot_02, shot_03"),
        (["rerender", "story_0:"], "'story_0:' names no shot; write STORY or STORY:SHOT"),
        (["rerender", ":1"], "':1' names no shot"),
        (["rerender", "nobody:1"], "no story 'nobody'"),
        (["unskip", "../night"], "no story '../night'"),
    ],
)
def test_a_name_that_nothing_has_is_answered_with_those_that_are_near_and_nothing_is_asked(
    run: FakeRun, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    said = Said(capsys, run.root, *arguments)
    assert said.code == 2 and why in said.err and not said.out and asked(run.root) == []


@pytest.mark.parametrize(
    "arguments", [["skip"], ["add"], ["rerender"], ["dance"], ["pause", "x"], ["add", "a", "--seed", "x"]]
)
def test_a_wrong_command_is_refused_with_its_usage(
    run: FakeRun, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(run.root), *arguments])
    assert end.value.code == 2 and "usage: storymem-queue" in capsys.readouterr().err


def test_it_starts_without_torch(run: FakeRun) -> None:
    code = (
        "import sys\nfrom storymem_dist.cli.queue import main\n"
        f"assert main([{str(run.root)!r}]) == 0\nassert main([{str(run.root)!r}, 'skip', 'story_2']) == 0\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules and 'av' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_known_stories_come_from_events_folders_and_requests(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "night", num_stories=1, num_shots=2, num_replicas=1)
    with run.replica(0) as replica:
        replica.observers.notify(ev.StoryStarted(story_id="announced", num_shots=3))
    (run.root / "stories" / "empty").mkdir()
    assert known_stories(run.root) == {
        "announced": ("shot_01", "shot_02", "shot_03"),
        "empty": (),
        "story_0": ("shot_01", "shot_02"),
    }
