"""Weights & Biases from the outside: a run fed offline, read back from its own files, equals the event files."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import storymem_dist.events as ev
from storymem_dist.artifacts.scores import RunScores, write_scores
from storymem_dist.errors import RunFolderError
from storymem_dist.files import hold_lock
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.observe.wandb.folder import own_folder, supersede_offline_runs
from storymem_dist.observe.wandb.process import WandbProcess, feed_by_hand
from tests.helpers.commands import run_in_fork
from tests.helpers.fake_run import START_TIME, FakeRun
from tests.helpers.wandb_file import WandbRun, memory_rows_of_events, read_segments

ROOT = Path(__file__).parents[2]


def feed(run_folder: Path, environment: Mapping[str, str] | None = None, exit_code: int = 0, **settings: Any) -> None:
    """What ``python -m storymem_dist.observe.wandb.process RUN`` does."""
    command = [
        sys.executable,
        "-m",
        "storymem_dist.observe.wandb.process",
        str(run_folder),
        "--settings",
        json.dumps(settings),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == exit_code, done.stderr


def two_replicas(root: Path) -> FakeRun:
    """Two stories of three shots on two replicas, more keyframes than the window holds, a failure, a reference."""
    run = FakeRun(root, num_stories=2, num_shots=4, max_keyframes=3, reused_steps=(4,))
    for number in range(2):
        with run.replica(number, num_replicas=2) as replica:
            run.load_weights(replica)
            asked = ev.RequestApplied(number=1, action="stop", who="lea", asked_at=replica.clock.now, message="it ends")
            replica.clock.pass_(2.0)
            replica.observers.notify(asked)
            for shot in range(3):
                run.shot(replica, number, shot)
            if number == 1:
                run.shot(replica, 1, 3, fail="CUDA out of memory")
                replica.observers.notify(
                    ev.SystemSampled(rank=1, host="node1", host_memory_gib=3.5, cpu_ratio=0.9, gpu_memory_gib=28.1)
                )
            else:
                run.shot(replica, 0, 3)
                run.finish_story(replica, 0)
            run.finish(replica)
    return run


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeRun, WandbRun]:
    run = two_replicas(tmp_path_factory.mktemp("wandb") / "night")
    write_scores(run.root, RunScores(run_id=run.run_id, written=0.0, values={"consistency_top10": 0.5337}, stories={}))
    feed(run.root, mode="offline", project="films", group="sweep-3", tags=["tiny"], num_shot_videos=5)
    (segment,) = read_segments(run.root / "wandb")
    return run, segment


def events_of(run: FakeRun, cls: type[ev.Event]) -> list[Any]:
    return [stamped.event for stamped in read_journal(run.root / "events") if isinstance(stamped.event, cls)]


def test_the_summary_has_the_scores(fed: tuple[FakeRun, WandbRun]) -> None:
    assert fed[1].summary["score/consistency_top10"] == 0.5337


def test_the_run_has_the_folders_id_and_the_names_of_the_settings(fed: tuple[FakeRun, WandbRun]) -> None:
    run, segment = fed
    assert segment.run_id == run.run_id
    assert (segment.project, segment.group, segment.tags) == ("films", "sweep-3", ["tiny"])
    assert segment.config["sampler"] == {"num_inference_steps": 4}
    assert segment.config["versions"]["torch"] == "2.13.0"
    assert segment.config["num_replicas"] == 2
    assert segment.finished


def test_every_memory_decision_is_in_the_table_and_equals_the_event_files(fed: tuple[FakeRun, WandbRun]) -> None:
    run, segment = fed
    columns, rows = segment.table("memory_frames")
    assert columns[1:-1] == [
        *("story", "shot", "verdict", "source_shot", "source_frame", "slot", "position"),
        *("similarity", "bank_similarity", "against", "quality", "why"),
    ]
    assert sorted((row[1:-1] for row in rows), key=repr) == memory_rows_of_events(run.root)
    assert {row[3] for row in rows} == {"recalled", "evicted", "kept", "duplicate", "low_quality"}
    assert all(row[0] == "Image" for row in rows), "every frame has its thumbnail"


def test_step_series_have_their_axes_and_the_values_of_the_events(fed: tuple[FakeRun, WandbRun]) -> None:
    run, segment = fed
    steps = events_of(run, ev.StepFinished)
    assert segment.axes["step/*"] == "step/done" and segment.axes["shot/*"] == "shot/done"
    assert segment.axes["replica_1/*"] == "replica_1/steps_done"
    assert segment.series("step/done") == list(range(1, len(steps) + 1))
    assert sorted(segment.series("step/seconds")) == sorted(step.elapsed_seconds for step in steps)
    assert segment.series("replica_0/steps_done") == list(range(1, 17))
    assert segment.series("replica_1/steps_done") == list(range(1, 14))
    logged = zip(segment.series("step/shot"), segment.series("step/step"), segment.series("step/expert"), strict=True)
    assert sorted(logged) == sorted((f"{s.story_id}/{s.shot_id}", s.step, s.expert) for s in steps)
    history_rows = [row["_step"] for row in segment.history]
    assert history_rows == sorted(set(history_rows))


def test_shots_stories_failures_and_systems_of_all_replicas_are_there(fed: tuple[FakeRun, WandbRun]) -> None:
    run, segment = fed
    finished = events_of(run, ev.ShotFinished)
    logged = zip(segment.series("shot/name"), segment.series("shot/seconds"), strict=True)
    assert dict(logged) == {f"{event.story_id}/{event.shot_id}": event.elapsed_seconds for event in finished}
    assert segment.series("shot/stage_seconds/denoise") == pytest.approx(
        [
            event.stage_seconds["denoise"]
            for event in sorted(finished, key=lambda e: segment.series("shot/name").index(f"{e.story_id}/{e.shot_id}"))
        ]
    )
    assert segment.series("shot/memory/kept").count(2) == 3
    assert segment.series("shot/reused_steps") == [1] * 7 and segment.series("shot/reuse_ratio") == [0.25] * 7
    assert sum(segment.series("step/reused")) == sum(step.reused for step in events_of(run, ev.StepFinished)) == 7
    assert segment.series("system/node1/rank_1/gpu_memory_gib") == [28.1]
    assert segment.series("weights/replica_0/gb_per_second") == pytest.approx([1.9] * 4)
    columns, rows = segment.table("story/story_0")
    assert [row[columns.index("shot")] for row in rows] == [f"shot_{n:02d}" for n in range(1, 5)]
    assert "shot_01 #0" in rows[1][columns.index("recalled")]
    _, incomplete = segment.table("story/story_1")
    assert incomplete[3][5] == "failed: CUDA out of memory"
    _, failures = segment.table("failures")
    assert failures[0][1:] == ["story_1", "shot_04", "denoise", "CUDA out of memory", False]
    assert segment.summary["total/num_clips"] == 7 and segment.summary["total/num_failures"] == 1


def test_a_request_to_the_queue_is_one_row_with_its_time_to_effect(fed: tuple[FakeRun, WandbRun]) -> None:
    _, segment = fed
    assert segment.series("run/requests") == [1], "two replicas applied it"
    assert segment.series("run/request_seconds") == pytest.approx([2.0])
    columns, rows = segment.table("requests")
    assert [dict(zip(columns, row, strict=True))["effect"] for row in rows] == ["it ends"]
    assert rows[0][2:6] == ["stop", "", "", "lea"] and rows[0][6] == pytest.approx(2.0)


def test_videos_are_uploaded_up_to_the_limit_and_are_the_clips_themselves(fed: tuple[FakeRun, WandbRun]) -> None:
    run, segment = fed
    videos = segment.series("shot/video")
    assert len(videos) == 5
    clips = {path.read_bytes() for path in run.root.glob("stories/*/*/attempts/*/clip.mp4")}
    assert {(segment.folder / "files" / video["path"]).read_bytes() for video in videos} <= clips
    (story,) = segment.series("story/video")
    copied = segment.folder / "files" / story["path"]
    assert copied.read_bytes() == (run.root / "stories" / "story_0" / "story.mp4").read_bytes()


def test_everything_that_a_later_sync_needs_lies_in_the_run_folder(fed: tuple[FakeRun, WandbRun]) -> None:
    run, _ = fed
    staged = list((run.root / "wandb" / "data" / "artifacts" / "staging").iterdir())
    assert any(path.read_bytes()[:3] == b"\xff\xd8\xff" for path in staged), "thumbnails of tables are staged there"


def four_starts(tmp_path: Path) -> tuple[FakeRun, list[Callable[[], None]]]:
    """A run and its four starts: each ends inside a shot or at the end, as a job without network is resumed."""
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=3)

    def first() -> None:
        with run.replica(0) as replica:
            run.shot(replica, 0, 0)
            run.shot(replica, 0, 1, stop_after_step=2)

    def second() -> None:
        with run.replica(0, at=START_TIME + 100) as replica:
            run.shot(replica, 0, 1, resume_at=2)

    def third() -> None:
        with run.replica(0, at=START_TIME + 200) as replica:
            run.shot(replica, 0, 2, stop_after_step=3)

    def fourth() -> None:
        with run.replica(0, at=START_TIME + 300) as replica:
            run.shot(replica, 0, 2, resume_at=3)
            run.finish_story(replica, 0)
            run.finish(replica)

    return run, [first, second, third, fourth]


def check_it_holds_all(run: FakeRun, segment: WandbRun, num_steps: int, num_shots: int) -> None:
    """The one live offline run holds every row once, its media and its table."""
    assert segment.run_id == run.run_id and segment.finished
    assert [row["_step"] for row in segment.history] == list(range(len(segment.history)))
    assert segment.series("step/done") == list(range(1, num_steps + 1))
    assert segment.series("shot/done") == list(range(1, num_shots + 1))
    assert len(segment.table("memory_frames")[1]) == len(events_of(run, ev.MemoryDecided))
    videos = segment.series("shot/video")
    assert len(videos) == num_shots
    assert all((segment.folder / "files" / video["path"]).is_file() for video in videos)


def test_after_every_resume_without_network_one_folder_holds_the_whole_run(tmp_path: Path) -> None:
    run, starts = four_starts(tmp_path)
    for number, (start, num_steps, num_shots) in enumerate(zip(starts, (6, 8, 11, 12), (1, 2, 2, 3), strict=True)):
        start()
        feed(run.root, mode="offline")
        (segment,) = read_segments(run.root / "wandb")
        check_it_holds_all(run, segment, num_steps, num_shots)
        superseded = read_segments(run.root / "wandb" / "superseded")
        assert len(superseded) == number, "nothing is deleted"
        assert all(older.run_id == run.run_id for older in superseded)
    assert [len(older.series("shot/video")) for older in superseded] == [1, 2, 2]


def test_a_feed_that_was_killed_after_it_set_the_older_run_aside_loses_nothing(tmp_path: Path) -> None:
    run, starts = four_starts(tmp_path)
    starts[0]()
    feed(run.root, mode="offline")
    supersede_offline_runs(run.root, but="")  # and then it was killed
    assert read_segments(run.root / "wandb") == []
    starts[1]()
    feed(run.root, mode="offline")
    (segment,) = read_segments(run.root / "wandb")
    check_it_holds_all(run, segment, 8, 2)
    (older,) = read_segments(run.root / "wandb" / "superseded")
    assert older.series("step/done") == list(range(1, 7))


def test_the_command_feeds_a_run_again_and_names_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, starts = four_starts(tmp_path)
    for start in starts:
        start()
    run.folder.write_config("c0ffef", json.dumps({"tracking": {"wandb": {"project": "films", "tags": ["night"]}}}))
    feed(run.root, mode="offline")
    (before,) = read_segments(run.root / "wandb")
    done = run_in_fork([str(run.root), "--wandb", "offline"], module="storymem_dist.cli.report", seconds=120)
    assert done.returncode == 0, done.stderr
    (segment,) = read_segments(run.root / "wandb")
    assert segment.folder != before.folder and (segment.project, segment.tags) == ("films", ["night"])
    check_it_holds_all(run, segment, 12, 3)
    assert done.stdout == f"the run is kept offline; upload it with: wandb sync {segment.folder}\n"


@pytest.mark.parametrize(
    ("environment", "mode", "code", "words"),
    [
        ({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}, "online", 5, "cannot be reached"),
        ({"WANDB_API_KEY": "short"}, "online", 5, "cannot be reached"),
        ({"WANDB_BASE_URL": "nonsense"}, "offline", 2, "variable WANDB_BASE_URL='nonsense' is not accepted"),
        ({"WANDB_TAGS": ",,"}, "offline", 2, "variable WANDB_TAGS=',,' is not accepted"),
    ],
)
def test_the_command_says_why_the_server_has_no_run_and_keeps_what_there_is(
    environment: dict[str, str], mode: str, code: int, words: str, tmp_path: Path
) -> None:
    run, starts = four_starts(tmp_path)
    starts[0]()
    run.folder.write_config("c0ffef", json.dumps({"tracking": {"wandb": {"init_timeout_seconds": 2.0}}}))
    feed(run.root, mode="offline")
    away = {**os.environ, "NETRC": "/nonexistent", **environment}
    done = run_in_fork([str(run.root), "--wandb", mode], module="storymem_dist.cli.report", seconds=120, env=away)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr and "Traceback" not in done.stderr
    (segment,) = read_segments(run.root / "wandb")
    check_it_holds_all(run, segment, 6, 1)
    if mode == "online":
        assert f"upload it with: wandb sync {segment.folder}" in done.stderr


def test_the_command_says_when_the_run_is_being_fed(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    lock = hold_lock(own_folder(run.root) / "feed.lock")
    with pytest.raises(RunFolderError, match="is being fed to Weights & Biases by another process"):
        feed_by_hand(run.root, "offline")
    assert lock is not None
    lock.release()


def test_the_back_end_feeds_during_the_render_and_ends_with_it(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=2)
    feeder = WandbProcess(run.root, WandbSettings(mode="offline", poll_interval_seconds=0.1))
    with run.replica(0, back_ends=[feeder]) as replica:
        run.shot(replica, 0, 0)
        deadline = time.monotonic() + 60.0
        while not (run.root / "wandb" / "feed.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        run.shot(replica, 0, 1)
        run.finish(replica)
    (segment,) = read_segments(run.root / "wandb")
    assert segment.series("shot/done") == [1, 2] and segment.finished


def test_a_second_feeder_waits_until_the_first_one_has_ended(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0)
    settings = WandbSettings(mode="offline", poll_interval_seconds=0.1)
    one = WandbProcess(run.root, settings)
    deadline = time.monotonic() + 60.0
    while not (run.root / "wandb" / "feed.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    other = WandbProcess(run.root, settings)
    other.close()
    assert len(read_segments(run.root / "wandb")) == 1
    one.close()
    assert read_segments(run.root / "wandb")[0].finished


def test_without_the_service_the_run_is_kept_offline_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=1)
    with run.replica(0) as replica:
        run.shot(replica, 0, 0)
        run.finish(replica)
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    away["WANDB_SERVICE"] = "2-1-tcp-localhost-1"  # of a process that has ended
    feed(run.root, away, RunFolderError.exit_code, mode="online", init_timeout_seconds=2.0)
    (segment,) = read_segments(run.root / "wandb")
    assert segment.series("shot/done") == [1] and segment.finished
    (warning,) = events_of(run, ev.WarningIssued)
    assert warning.message.startswith("Weights & Biases cannot be reached, the run is kept offline: ")


def test_story_ids_that_are_no_names_of_files_are_fed_and_stay_inside(tmp_path: Path) -> None:
    run = two_replicas(tmp_path / "run")
    for path in (run.root / "events").glob("*.jsonl"):
        text = path.read_text().replace("story_0", "s" * 250).replace("story_1", "../../../../x y")
        path.write_text(text)
    before = sorted(tmp_path.iterdir())
    feed(run.root, mode="offline")
    (segment,) = read_segments(run.root / "wandb")
    assert segment.finished and segment.series("step/done") == list(range(1, 30))
    keys = [key for row in segment.history for key in row if key.startswith("story/")]
    assert all(len(key) < 64 and "../" not in key and "/.." not in key for key in keys) and len(set(keys)) >= 2
    assert sorted(tmp_path.iterdir()) == before
    assert events_of(run, ev.WarningIssued) == []
