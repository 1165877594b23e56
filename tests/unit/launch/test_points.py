from pathlib import Path

import pytest

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.errors import WeightsNotFound
from storymem_dist.launch.points import (
    folder_name,
    forget_error,
    keep_error,
    point_folder,
    points_table,
    read_point,
    read_points,
)
from storymem_dist.launch.sweep import group_points
from tests.helpers.small_job import small_point


@pytest.mark.parametrize("name", ["sampler.num_inference_steps=20", "memory.max_keyframes=6,sampler.seed=-1"])
def test_a_plain_name_is_the_folder(name: str) -> None:
    assert folder_name(name) == name


@pytest.mark.parametrize("name", ["stories.path=a/b.json", "x=[1, 2]", "../x=1", "x=" + "a" * 300, ".hidden=1"])
def test_a_name_that_is_unsafe_as_a_folder_is_replaced_and_stays_distinct(name: str) -> None:
    folder = folder_name(name)
    assert "/" not in folder and " " not in folder and not folder.startswith(".") and len(folder) < 140
    assert folder != folder_name(name + "x")


def test_a_refused_point_keeps_its_reason_until_it_begins_again(tmp_path: Path) -> None:
    keep_error(tmp_path, "a=1", WeightsNotFound("no weights"))
    [point] = read_points(tmp_path)
    assert (point.state, point.exit_code, point.message) == ("refused", 4, "no weights")
    RunFolder(point_folder(tmp_path, "a=1")).open()  # a run folder may hold the note
    forget_error(tmp_path, "a=1")
    assert read_point(point_folder(tmp_path, "a=1")).state == "running"


def test_the_table_distinguishes_done_failed_and_stopped(tmp_path: Path) -> None:
    for name, state, num_failed in (("a=1", "done", 0), ("a=2", "failed", 1), ("a=3", "stopped", 0)):
        run = RunFolder(tmp_path / name)
        run.open()
        run.write_outcome(state, reason="", num_stories=2, num_stories_done=1, num_failed=num_failed)
    (tmp_path / "multirun.yaml").write_text("")
    points = read_points(tmp_path)
    assert [(point.state, point.exit_code, point.stories) for point in points] == [
        ("done", 0, "1/2"),
        ("failed", 6, "1/2"),
        ("stopped", 0, "1/2"),
    ]
    lines = points_table(points).splitlines()
    assert len(lines) == 4 and lines[2].split() == ["a=2", "failed", "1/2", "0", "1"]


def test_points_join_when_they_share_weights_and_layout() -> None:
    base, more_steps = small_point(), small_point("sampler.num_inference_steps=9", "memory.max_keyframes=4")
    other_lora, other_layout = small_point("sampler.continuation=mm2v"), small_point("parallel.cfg=2")
    jobs = group_points([base, other_lora, more_steps, other_layout], lambda point: True)
    assert jobs == [[base, more_steps], [other_lora], [other_layout]]


def test_points_that_cannot_begin_are_left_out() -> None:
    good, bad = small_point(), small_point("sampler.seed=1")
    assert group_points([good, bad], lambda point: point is good) == [[good]]


def test_a_separate_sweep_joins_nothing() -> None:
    points = [small_point("sweep=separate"), small_point("sweep=separate", "sampler.seed=1")]
    assert group_points(points, lambda point: True) == [[points[0]], [points[1]]]
