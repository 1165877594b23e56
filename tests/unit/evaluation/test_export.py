"""The clips of a run under other programs' names: the same files, in order, and a manifest that says where from."""

import errno
import json
from pathlib import Path
from unittest.mock import patch

import pytest

from storymem_dist.artifacts.video import count_frames
from storymem_dist.errors import RunFolderError
from storymem_dist.evaluation import export
from storymem_dist.evaluation.export import MANIFEST, export_run
from tests.helpers.fake_run import FakeRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """One story of four shots in two scenes, of which the second shot of each continues the first."""
    run = FakeRun(tmp_path_factory.mktemp("run") / "first", num_stories=1)
    with run.replica() as replica:
        for shot in range(4):
            run.shot(replica, 0, shot)
        run.finish_story(replica, 0)
        run.finish(replica)
    return run


NAMES = {
    "storymem": ["01_01.mp4", "01_02.mp4", "02_01.mp4", "02_02.mp4"],
    "entitybench": ["001_001.mp4", "001_002.mp4", "002_001.mp4", "002_002.mp4"],
}


@pytest.mark.parametrize("layout", NAMES)
def test_clips_are_links_under_the_names_of_the_layout(run: FakeRun, tmp_path: Path, layout: str) -> None:
    done = export_run(run.root, tmp_path / "out", layout)
    assert (done.num_files, done.num_copied, done.left_out) == (4, 0, [])
    folder = tmp_path / "out" / "story_0"
    assert sorted(path.name for path in folder.iterdir()) == NAMES[layout]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["layout"], manifest["run_id"]) == (layout, run.run_id)
    for number, entry in enumerate(manifest["files"], start=1):
        assert entry["shot"] == f"shot_{number:02d}" and entry["linked"]
        assert entry["file"] == f"story_0/{NAMES[layout][number - 1]}"
        assert (tmp_path / "out" / entry["file"]).samefile(run.root / entry["clip"])
    joined = sum(count_frames(path) for path in folder.iterdir())
    assert joined == count_frames(run.root / "stories/story_0/story.mp4"), "no frame is there twice"


def test_another_file_system_gets_copies(run: FakeRun, tmp_path: Path) -> None:
    with patch.object(export, "link_or_replace", side_effect=OSError(errno.EXDEV, "cross-device link")):
        done = export_run(run.root, tmp_path / "out", "storymem")
    assert done.num_copied == 4
    copied = tmp_path / "out" / "story_0" / "01_02.mp4"
    source = run.root / "stories/story_0/shot_02.mp4"
    assert copied.read_bytes() == source.read_bytes() and not copied.samefile(source)
    full = OSError(errno.ENOSPC, "no space left on device")
    with patch.object(export, "link_or_replace", side_effect=full), pytest.raises(RunFolderError, match="no space"):
        export_run(run.root, tmp_path / "full", "storymem")
    assert not json.loads((tmp_path / "full" / MANIFEST).read_text())["is_whole"]
    assert export_run(run.root, tmp_path / "full", "storymem").num_files == 4, "one that broke off can be repeated"
    assert json.loads((tmp_path / "full" / MANIFEST).read_text())["is_whole"]


def test_an_export_can_be_repeated_and_replaces_only_its_own_files(run: FakeRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(run.root, out, "entitybench")
    (out / "notes.txt").write_text("mine")
    export_run(run.root, out, "storymem")
    assert sorted(path.name for path in (out / "story_0").iterdir()) == NAMES["storymem"]
    assert (out / "notes.txt").read_text() == "mine"
    other = FakeRun(tmp_path / "other", num_stories=1)
    (out / "story_0").rename(out / "story_9")
    manifest = (out / MANIFEST).read_text()
    (out / MANIFEST).unlink()
    (out / MANIFEST).write_text(manifest.replace("story_0/0", "story_9/0"))
    with other.replica() as replica:
        other.shot(replica, 0, 0)
    export_run(other.root, out, "storymem")
    assert not (out / "story_9").exists(), "an empty folder would be read as a story without clips"
    assert [path.name for path in (out / "story_0").iterdir()] == ["01_01.mp4"]


def test_a_folder_of_something_else_is_refused(run: FakeRun, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty and not an earlier export"):
        export_run(run.root, tmp_path, "storymem")
    with pytest.raises(RunFolderError, match="is not a folder"):
        export_run(run.root, tmp_path / "a.txt", "storymem")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        export_run(tmp_path, tmp_path / "out", "storymem")


def test_what_is_missing_is_named_and_the_rest_is_exported(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", num_stories=1)
    with run.replica() as replica:
        for shot in range(3):
            run.shot(replica, 0, shot)
    clip = next((run.root / "stories/story_0/shot_02/attempts").iterdir()) / "clip.mp4"
    clip.unlink()
    clip.write_bytes(b"changed")
    done = export_run(run.root, tmp_path / "out", "storymem")
    assert done.num_files == 2 and sorted(p.name for p in (tmp_path / "out/story_0").iterdir()) == [
        "01_01.mp4",
        "02_01.mp4",
    ]
    assert any("contents have changed" in sentence for sentence in done.left_out)
    assert "story_0: 2 of 4 shots are there" in done.left_out


def test_scenes_with_one_number_are_counted(run: FakeRun) -> None:
    from dataclasses import replace

    from storymem_dist.evaluation.clips import find_clips
    from storymem_dist.observe.run.files import RunFiles

    (story,), _ = find_clips(RunFiles(run.root))
    same = [replace(shot, record=replace(shot.record, scene_num=7)) for shot in story.shots]
    assert export._places(replace(story, shots=same)) == [(1, 1), (1, 2), (2, 1), (2, 2)]
