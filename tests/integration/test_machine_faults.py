"""A full or broken disk ends the job with exit code 5; no shot is blamed, and the same command completes the same."""

import errno
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storymem_dist.artifacts import run_folder, shot_folder
from storymem_dist.diffusion import denoise
from storymem_dist.dispatch import story_video
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.errors import MachineError
from tests.helpers.batches import render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files
from tests.helpers.small_job import media_bytes, records, render_small, write_storyboard
from tests.helpers.workers import quick_folder

FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/night/file")
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ENOENT)


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


def fails(error: OSError) -> Callable[..., None]:
    """A function that raises, in place of one that writes."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def assert_nobody_is_blamed(root: Path) -> None:
    assert not list((root / "failures").iterdir())
    assert not list((root / "leases").iterdir()), "an attempt would be counted"


def assert_the_same_command_completes(root: Path, **settings: object) -> None:
    assert render(root, **settings).state == "done"  # type: ignore[arg-type]
    render(root.with_name("whole"))
    assert finished_files(root) == finished_files(root.with_name("whole"))


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("overlap", [True, False], ids=["saved in the background", "in turn"])
def test_a_clip_that_cannot_be_written_ends_the_job_and_blames_no_shot(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, overlap: bool
) -> None:
    write_clip = shot_folder.write_clip

    def write(path: Path, *arguments: object) -> None:
        if "ocean/shot_02" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        write_clip(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shot_folder, "write_clip", write)
    events = Events()
    with pytest.raises(MachineError, match=f"ocean/shot_02.*{os.strerror(number)}.*same command") as raised:
        render(root, events=events, overlap_saving=overlap)
    assert raised.value.exit_code == 5
    assert_nobody_is_blamed(root)
    assert not list((root / "stories/ocean/shot_02/attempts").iterdir()), "the half-saved attempt is removed"
    monkeypatch.undo()
    assert_the_same_command_completes(root, max_attempts=1)


WRITERS = {
    "checkpoint": (denoise, "write_bytes"),
    "record": (shot_folder, "write_bytes"),
    "publication": (shot_folder, "publish_exclusively"),
    "storyboard and stop.json": (run_folder, "write_bytes"),
    "story.mp4": (story_video, "concat_clips"),
    "story.json": (story_video, "write_bytes"),
    "views": (shot_folder, "link_or_replace"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_cannot_be_written_ends_the_job_and_the_same_command_completes(
    root: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def before_step(job: ShotJob, step: int) -> None:
        if (job.index, step) == (1, 0):
            monkeypatch.setattr(*WRITERS[writer], fails(FULL))

    with pytest.raises(MachineError, match="No space left on device; free space there, then"):
        render(root, renderer=FakeRenderer(before_step=before_step), checkpoint_every_steps=1)
    assert_nobody_is_blamed(root)
    monkeypatch.undo()
    assert_the_same_command_completes(root, max_attempts=1)


def test_a_lease_that_cannot_be_made_ends_the_job(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def before_step(job: ShotJob, step: int) -> None:
        monkeypatch.setattr(LeaseFolder, "try_claim", fails(FULL))

    with pytest.raises(MachineError, match="No space left"):
        render(root, renderer=FakeRenderer(before_step=before_step))
    monkeypatch.undo()
    assert_nobody_is_blamed(root)
    assert_the_same_command_completes(root)


def test_a_shot_that_fails_while_the_disk_is_full_is_not_marked_and_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error inside the renderer that a library made of a full disk."""

    def before_step(job: ShotJob, step: int) -> None:
        if job.story_id == "ocean" and job.index == 1:
            raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(MachineError, match="No space left"):
        render(root, renderer=FakeRenderer(before_step=before_step))
    assert_nobody_is_blamed(root)
    assert_the_same_command_completes(root, max_attempts=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("free_kib", [0, 8, 24, 40])
def test_a_job_on_a_real_full_disk_ends_with_5_and_completes_with_room(
    small_disk: Path, tmp_path: Path, free_kib: int
) -> None:
    stories, run = write_storyboard(tmp_path / "fox.json", [[True, False]]), small_disk / "run"
    assert render_small(stories, tmp_path / "whole") == 0
    assert render_small(stories, run, "stories.max_shots=1") == 0
    statistics = os.statvfs(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(max(0, statistics.f_bavail * statistics.f_frsize - free_kib * 1024)))
    with pytest.raises(MachineError, match="free space there"):
        render_small(stories, run, "dispatch.max_attempts=1")
    assert not list((run / "failures").iterdir()) and not list((run / "leases").glob("*.lease"))
    ballast.unlink()
    assert render_small(stories, run, "dispatch.max_attempts=1") == 0
    assert media_bytes(run) == media_bytes(tmp_path / "whole")
    assert records(run) == records(tmp_path / "whole")


@pytest.mark.parametrize("limit", [100, 1_000, 4_000, 12_000])
def test_a_limit_on_file_sizes_is_a_fault_of_the_machine_wherever_it_strikes(tmp_path: Path, limit: int) -> None:
    stories, run = write_storyboard(tmp_path / "owl.json", [[True, False]]), tmp_path / "run"
    assert render_small(stories, tmp_path / "whole") == 0  # and the weights are made
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(MachineError, match="ulimit -f"):
            render_small(stories, run, "dispatch.checkpoint_every_steps=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((run / "failures").glob("*.json")) and not list((run / "leases").glob("*.lease"))
    assert render_small(stories, run, "dispatch.max_attempts=1") == 0
    assert json.loads((run / "stop.json").read_text())["state"] == "done"
    assert media_bytes(run) == media_bytes(tmp_path / "whole")
