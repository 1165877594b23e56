import json
from pathlib import Path

import pytest

from storymem_dist.artifacts import sharding
from storymem_dist.artifacts.run_folder import MARKER, RunFolder
from storymem_dist.errors import StoryboardError
from storymem_dist.observe.report.model import RunReader
from storymem_dist.observe.run.files import RunFiles
from tests.helpers.batches import STORIES, fail_at, render
from tests.helpers.fake_renderer import FakeRenderer


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stories are many."""
    monkeypatch.setattr(sharding, "MOST_STORIES", 1)


def test_a_folder_of_a_few_thousand_stories_is_as_it_was(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(4096)
    assert json.loads((run.root / MARKER).read_text())["format"] == 1
    assert run.story_folder("ocean") == run.root / "stories" / "ocean"
    run.open(100_000)  # of a later job
    assert run.story_folder("ocean") == run.root / "stories" / "ocean"


def test_a_folder_of_many_stories_spreads_them_over_folders_that_their_names_tell(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(100_000)
    folders = {run.story_folder(f"story_{number:06d}").parent for number in range(10_000)}
    assert len(folders) == 256
    assert RunFolder(run.root).story_folder("ocean") == run.story_folder("ocean")
    assert run.checkpoint("ocean", "shot_01", "f" * 64).parents[1].parent.parent == run.root / "checkpoints"
    run.open(1)  # a job of one story continues
    assert run.story_folder("ocean").parent != run.root / "stories"
    assert run.drawn_seed("story_ocean") == RunFolder(run.root).drawn_seed("story_ocean")


def test_a_version_that_knows_no_such_folders_refuses_them(tmp_path: Path) -> None:
    RunFolder(tmp_path).open(100_000)
    assert json.loads((tmp_path / MARKER).read_text())["format"] not in range(100)


@pytest.mark.usefixtures("few")
def test_a_run_of_many_stories_is_rendered_resumed_and_read_like_any_other(tmp_path: Path) -> None:
    render(tmp_path / "many", checkpoint_every_steps=1)
    files = {path.name for path in (tmp_path / "many" / "stories").glob("*/*/*.mp4")}
    assert files == {"story.mp4", *(f"shot_{number:02d}.mp4" for number in range(1, 5))}
    assert not list((tmp_path / "many" / "stories").glob("*/*.mp4"))
    again = FakeRenderer()
    summary = render(tmp_path / "many", renderer=again)
    assert (summary.state, again.rendered, summary.num_skipped) == ("done", [], 6)
    found = RunFiles(tmp_path / "many")
    assert found.story_ids() == sorted(story.story_id for story in STORIES)
    for story in found.stories():
        assert story.video is not None and (found.root / story.video).is_file()
        for record in story.records.values():
            paths = [found.clip_path(record), *found.keyframe_paths(record).values()]
            assert all((found.root / path).is_file() for path in paths)
    assert found.stories_changed_at() > 0
    view = RunReader(tmp_path / "many").refresh()
    assert {story.story_id: len(story.shots) for story in view.stories} == {"ocean": 4, "city": 2}


@pytest.mark.usefixtures("few")
def test_failures_of_a_run_of_many_stories_are_found_and_retried(tmp_path: Path) -> None:
    failing = FakeRenderer(before_step=fail_at("ocean:shot_02", lambda: StoryboardError("unlucky")))
    assert render(tmp_path, renderer=failing).num_failed == 1
    (mark,) = (tmp_path / "failures").glob("*/*.json")
    assert RunFolder(tmp_path).failure_names() == {mark.name}
    again = FakeRenderer()
    assert render(tmp_path, renderer=again).num_failed == 1 and not again.rendered
    assert render(tmp_path, retry_failed=True).state == "done"
    assert not RunFolder(tmp_path).failure_names()
