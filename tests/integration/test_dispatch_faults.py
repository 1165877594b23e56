"""A commit is killed before each of its file operations in turn; resuming must always give the undisturbed result."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storymem_dist.dispatch.coordinator import Coordinator
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import FakeRenderer, finished_files, make_part, make_story
from tests.helpers.faults import die_at
from tests.helpers.workers import exit_code, quick_folder, start_worker

SETTINGS = DispatchSettings(poll_seconds=0.01, lease_seconds=1.0, checkpoint_every_steps=2)
ONE_STORY = [make_story("ocean", 2)]  # its shots are saved one after the other
TWO_STORIES = [make_story("ocean", 1), make_story("city", 1)]  # one shot is saved while the other is rendered
MOST_OPERATIONS = 300


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.mark.parametrize("stories", [ONE_STORY, TWO_STORIES], ids=["one story", "two stories"])
@pytest.mark.parametrize("torn", [False, True], ids=["killed", "torn"])
def test_killed_before_any_file_operation_a_run_resumes_to_the_same_files(
    folder: Path, torn: bool, stories: list[Story]
) -> None:
    render_batch(parts=[make_part(folder / "whole", stories)], renderer=FakeRenderer(), settings=SETTINGS)
    whole = finished_files(folder / "whole")
    for number in range(1, MOST_OPERATIONS):
        root = folder / f"run{number}"
        worker = start_worker(
            root, stories, settings=SETTINGS, before=lambda root=root, n=number: _die_in_commit(n, root, torn)
        )
        code = exit_code(worker)
        summary = render_batch(parts=[make_part(root, stories)], renderer=FakeRenderer(), settings=SETTINGS)
        where = f"killed at operation {number}"
        assert summary.state == "done", where
        assert finished_files(root) == whole, where
        for story in stories:
            for shot in story.shots:
                assert len(list((root / "stories" / story.story_id / shot.shot_id / "attempts").iterdir())) == 1, where
        assert not list(root.rglob(".*")), where
        assert not list((root / "leases").iterdir()), where
        if code == 0:
            break
    assert code == 0, "every run was killed: raise MOST_OPERATIONS"
    assert number > (12 if torn else 60), f"only {number} operations were tried: the trap does not work"


def _die_in_commit(number: int, root: Path, torn: bool) -> None:
    """Arm the trap from the moment the first shot is handed in until the batch ends."""
    armed: list[bool] = []
    handed_in = Coordinator.shot_rendered

    def shot_rendered(coordinator: Coordinator, rendered: object) -> None:
        armed.append(True)
        handed_in(coordinator, rendered)  # type: ignore[arg-type]

    Coordinator.shot_rendered = shot_rendered  # type: ignore[method-assign]
    die_at(number, root, torn=torn, armed=lambda: bool(armed))
