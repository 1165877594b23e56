import json
import os
import threading
from pathlib import Path

import pytest

from storymem_dist.artifacts.run_folder import MARKER, FailureRecord, RunFolder
from storymem_dist.artifacts.shot_names import shot_ids
from storymem_dist.errors import RunFolderError
from tests.helpers.fake_renderer import make_story


def make_failure(**changes: object) -> FailureRecord:
    values = {
        "story_id": "ocean.v2",
        "shot_id": "shot_03",
        "fingerprint": "ab" * 32,
        "reason": "latents are not finite",
        "error_type": "ShotError",
        "is_final": True,
        "low_memory": False,
        "job_id": "job",
    }
    return FailureRecord(**(values | changes))  # type: ignore[arg-type]


def test_creating_the_object_touches_nothing_and_opening_twice_gives_the_same_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    assert not run.root.exists()
    assert run.open() == RunFolder(run.root).open() == run.run_id()
    assert json.loads((run.root / MARKER).read_text())["format"] == 1


def test_many_processes_that_open_one_folder_at_once_agree_on_its_id(tmp_path: Path) -> None:
    ids: list[str] = []
    barrier = threading.Barrier(12)

    def open_run() -> None:
        barrier.wait()
        ids.append(RunFolder(tmp_path / "run").open())

    threads = [threading.Thread(target=open_run) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 12 and len(set(ids)) == 1
    assert not list((tmp_path / "run").glob(".*"))


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(RunFolderError, match=r"not empty and not a run folder .*thesis\.txt.*give a new or empty"):
        RunFolder(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_empty_folders_of_a_job_that_lost_its_own_are_taken_over(tmp_path: Path) -> None:
    """A job whose folder somebody removes may make some folders before it notices; the same command must work again."""
    run = RunFolder(tmp_path / "run")
    (run.story_folder("fox") / "shot_01" / "attempts").mkdir(parents=True)
    run.open()
    (tmp_path / "other" / "a" / "b").mkdir(parents=True)
    (tmp_path / "other" / "a" / "b" / "notes.txt").touch()
    with pytest.raises(RunFolderError, match="not empty and not a run folder"):
        RunFolder(tmp_path / "other").open()
    (tmp_path / "other" / "a" / "b" / "notes.txt").unlink()
    (tmp_path / "other" / "/".join("a" * 100)).mkdir(parents=True)
    with pytest.raises(RunFolderError, match="not empty and not a run folder"):
        RunFolder(tmp_path / "other").open()


def test_a_folder_may_hold_what_launchers_put_there_first(tmp_path: Path) -> None:
    for name in ("logs", ".hydra"):
        (tmp_path / name).mkdir()
    (tmp_path / "STOP").touch()
    RunFolder(tmp_path).open()


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"format": 2, "run_id": "x"}', "format 2"), ("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "format")],
)
def test_a_marker_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        RunFolder(tmp_path).open()


def test_a_file_or_a_missing_folder_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be used as a run folder"):
        RunFolder(tmp_path / "file").open()
    with pytest.raises(RunFolderError, match="is not a run folder"):
        RunFolder(tmp_path / "absent").run_id()


def test_a_file_system_without_hard_links_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(RunFolderError, match=r"Operation not permitted.*hard links"):
        RunFolder(tmp_path / "run").open()


def test_a_seed_is_drawn_once_per_name_and_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open()
    assert run.known_seed("all_stories") is None and not (tmp_path / "seeds").exists()
    seed = run.drawn_seed("all_stories")
    assert 0 <= seed < 2**31
    assert run.known_seed("all_stories") == seed
    assert RunFolder(tmp_path).drawn_seed("all_stories") == seed
    others = {run.drawn_seed(f"story_{number}") for number in range(4)}
    assert len(others | {seed}) == 5


def test_a_forced_rerender_counts_once_per_request(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open()
    assert run.rerender_generations() == {}
    for request in ("monday", "monday", "tuesday", "monday", "tuesday"):
        run.rerender([("ocean.v2", "shot_03")], request)
    run.rerender([("ocean", "shot_01")], "monday")
    assert run.rerender_generations() == {("ocean.v2", "shot_03"): 2, ("ocean", "shot_01"): 1}


def test_failure_marks_are_written_replaced_and_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open()
    failure = make_failure()
    key = (failure.story_id, failure.shot_id, failure.fingerprint)
    assert run.read_failure(*key) is None
    run.write_failure(failure)
    run.write_failure(make_failure(reason="worse"))
    assert run.read_failure(*key) == make_failure(reason="worse")
    assert run.read_failure(failure.story_id, failure.shot_id, "cd" * 32) is None
    (run.failures_folder / run.failure_name(*key)).write_text("{")
    assert run.read_failure(*key) is None, "a damaged mark must not block a shot for ever"
    run.write_failure(failure)
    run.remove_failure(*key)
    run.remove_failure(*key)
    assert run.read_failure(*key) is None


def test_a_storyboard_snapshot_is_written_when_it_changes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open()
    path = run.story_folder("ocean") / "storyboard.json"
    run.write_storyboard(make_story("ocean", 2, reference_images=(Path("/a/b.png"),)))
    first = path.stat().st_ino
    assert json.loads(path.read_text())["reference_images"] == ["/a/b.png"]
    run.write_storyboard(make_story("ocean", 2, reference_images=(Path("/a/b.png"),)))
    assert path.stat().st_ino == first
    run.write_storyboard(make_story("ocean", 3))
    assert len(json.loads(path.read_text())["scenes"][0]["shots"]) == 3


def test_the_end_is_written_with_its_details_and_can_be_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open()
    run.write_outcome("stopped", reason="SIGTERM", job_id="7")
    stop = json.loads((tmp_path / "stop.json").read_text())
    assert (stop["state"], stop["reason"], stop["job_id"]) == ("stopped", "SIGTERM", "7")
    run.remove_outcome()
    run.remove_outcome()
    assert not (tmp_path / "stop.json").exists()


def test_shots_to_render_again_are_found_by_id_number_or_name_or_refused() -> None:
    known = [("ocean", {"shot_01": "", "shot_02": "the reef"}), ("a:b", {"shot_01": "2"})]
    assert shot_ids(["ocean:the reef", "a:b:2"], known) == [("ocean", "shot_02"), ("a:b", "shot_01")]
    assert shot_ids(["ocean:shot_02", "ocean:1", "a:b:1"], known) == [
        ("ocean", "shot_02"),
        ("ocean", "shot_01"),
        ("a:b", "shot_01"),
    ]
    with pytest.raises(RunFolderError, match="no story 'sea'; there are: a:b, ocean"):
        shot_ids(["sea:1"], known)
    with pytest.raises(RunFolderError, match="no shot '3'; it has shot_01, shot_02"):
        shot_ids(["ocean:3"], known)


def test_a_folder_with_the_name_of_the_outcome_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open()
    (run.root / "stop.json").mkdir()
    with pytest.raises(RunFolderError, match=r"stop\.json cannot be removed"):
        run.remove_outcome()


@pytest.mark.parametrize("name", ["events", "leases", "failures", "stories"])
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.open()
    (run.root / name).rmdir()
    (run.root / name).write_text("{}")
    with pytest.raises(RunFolderError, match=f"run/{name}: File exists"):
        run.open()
