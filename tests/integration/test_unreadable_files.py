"""A file of the run folder that cannot be read is no damaged file: nothing is set aside, removed or rendered again."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from storymem_dist import files
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.errors import ShotError, StoryMemError
from tests.helpers.batches import render
from tests.helpers.fake_renderer import FakeRenderer, finished_files
from tests.helpers.workers import quick_folder

NUMBERS = (errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE)


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


def make_unreadable(monkeypatch: pytest.MonkeyPatch, part: str, number: int) -> None:
    """Let all files with ``part`` in their path fail when they are opened."""
    open_regular = files.open_regular

    def fail(path: Path) -> BinaryIO:
        if part in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return open_regular(path)

    monkeypatch.setattr(files, "open_regular", fail)


def kept(root: Path) -> dict[str, bytes]:
    """Everything that a job must not lose."""
    paths = [path for name in ("stories", "failures", "checkpoints") for path in (root / name).rglob("*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}


def stop_in_the_middle(root: Path) -> None:
    """One story has a failed shot, the other a finished one and a checkpoint in the next."""
    stop = StopSwitch()

    def before_step(job: ShotJob, step: int) -> None:
        if job.story_id == "city" and job.index == 1:
            raise ShotError("no")
        if job.story_id == "ocean" and (job.index, step) == (2, 1):
            stop.request("test")

    assert render(root, renderer=FakeRenderer(before_step=before_step), stop=stop).state == "stopped"


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("part", ["/records/", "keyframe_", "tail_", "clip.mp4", "/checkpoints/", "/failures/"])
def test_what_cannot_be_read_ends_the_job_and_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch, part: str, number: int
) -> None:
    stop_in_the_middle(root)
    before = kept(root)
    assert any(part in f"/{path}" for path in before)
    make_unreadable(monkeypatch, part, number)
    with pytest.raises(StoryMemError, match=os.strerror(number)) as raised:
        render(root)
    assert raised.value.exit_code == 5
    assert kept(root) == before
    monkeypatch.undo()
    assert render(root, retry_failed=True).num_resumed == 1
    render(root.with_name("whole"))
    assert finished_files(root) == finished_files(root.with_name("whole"))


@pytest.mark.parametrize("part", ["story.json", "story.mp4"])
def test_a_story_video_that_cannot_be_read_is_not_set_aside(
    root: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    render(root)
    before = kept(root)
    make_unreadable(monkeypatch, part, errno.EIO)
    with pytest.raises(StoryMemError, match="Input/output error"):
        render(root)
    assert kept(root) == before
