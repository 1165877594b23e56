"""A problem of one shot affects that shot alone: failures, memory, crashes."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storymem_dist.artifacts import shot_folder
from storymem_dist.dispatch.summary import Replica
from storymem_dist.errors import CheckpointError, ShotError
from storymem_dist.events import ShotFailed, ShotSkipped, StoryFinished
from tests.helpers.batches import fail_at, render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files
from tests.helpers.workers import quick_folder


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


def test_a_failed_shot_blocks_its_successors_and_nothing_else(root: Path) -> None:
    renderer = FakeRenderer(before_step=fail_at("ocean:shot_02", lambda: ShotError("latents are not finite")))
    events = Events()
    summary = render(root, renderer=renderer, events=events)
    assert (summary.state, summary.exit_code, summary.num_rendered) == ("failed", 6, 3)
    assert (summary.num_failed, summary.num_blocked, summary.num_stories_done) == (1, 2, 1)
    assert (summary.failures[0].shot_id, summary.failures[0].reason) == ("shot_02", "latents are not finite")
    assert json.loads((root / "stop.json").read_text())["state"] == "failed"
    assert [(event.shot_id, event.will_retry) for event in events.of(ShotFailed)] == [("shot_02", False)]
    assert [(event.shot_id, event.reason) for event in events.of(ShotSkipped)] == [
        ("shot_03", "predecessor failed"),
        ("shot_04", "predecessor failed"),
    ]
    assert {event.story_id: event.outcome for event in events.of(StoryFinished)} == {
        "ocean": "failed",
        "city": "finished",
    }
    mark = json.loads(next((root / "failures").iterdir()).read_text())
    assert "latents are not finite" in mark["reason"] and "Traceback" in mark["details"]


def test_a_failure_stays_until_retry_failed(root: Path) -> None:
    failing = FakeRenderer(before_step=fail_at("ocean:shot_02", lambda: ShotError("no")))
    render(root, renderer=failing)
    renderer, events = FakeRenderer(), Events()
    summary = render(root, renderer=renderer, events=events)
    assert (summary.state, renderer.rendered) == ("failed", [])
    assert ("shot_02", "failed before") in [(event.shot_id, event.reason) for event in events.of(ShotSkipped)]
    assert render(root, retry_failed=True).state == "done"
    assert not list((root / "failures").iterdir())
    render(root / "fresh")
    assert finished_files(root) == finished_files(root / "fresh")


def test_a_failure_is_retried_once_per_job(root: Path) -> None:
    failing = FakeRenderer(before_step=fail_at("ocean:shot_01", lambda: ShotError("no")))
    render(root, renderer=failing, replica=Replica(job_id="one"))
    for _ in range(2):
        render(root, renderer=failing, replica=Replica(job_id="two"), retry_failed=True)
    assert failing.rendered.count("ocean:shot_01") == 2


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")


def test_out_of_memory_is_retried_in_place_with_less(root: Path) -> None:
    renderer = FakeRenderer(before_step=fail_at("ocean:shot_02", out_of_memory, times=1))
    events = Events()
    summary = render(root, renderer=renderer, events=events)
    assert (summary.state, summary.num_rendered, renderer.low_memory) == ("done", 6, ["ocean:shot_02"])
    failed = events.of(ShotFailed)[0]
    assert failed.will_retry and failed.reason == "CUDA out of memory. Tried to allocate 2 GiB."
    assert not list((root / "failures").iterdir())


def test_out_of_memory_twice_is_a_failure_of_that_shot(root: Path) -> None:
    renderer = FakeRenderer(before_step=fail_at("ocean:shot_02", out_of_memory))
    summary = render(root, renderer=renderer)
    assert (summary.state, summary.num_rendered, renderer.rendered.count("ocean:shot_02")) == ("failed", 3, 2)
    assert "out of memory" in summary.failures[0].reason


def test_out_of_memory_in_a_wide_replica_is_noted_for_after_the_restart(root: Path) -> None:
    wide = FakeRenderer(before_step=fail_at("ocean:shot_02", out_of_memory), retries_in_place=False)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            render(root, renderer=wide, replica=Replica(job_id="job"))
        # the test is one process: remove the lease of the "dead" one, as a death would let others do
        for lease in (root / "leases").glob("*.lease"):
            lease.unlink()
    assert wide.low_memory == ["ocean:shot_02"], "the second time with less memory"
    summary = render(root, renderer=wide, replica=Replica(job_id="job"))
    assert (summary.state, summary.num_failed) == ("failed", 1), "then never again"


def test_weights_that_cannot_be_loaded_end_the_job_and_blame_no_shot(root: Path) -> None:
    class Broken(FakeRenderer):
        def prepare(self, kind: str) -> None:
            raise CheckpointError("truncated: model-00001.safetensors")

    with pytest.raises(CheckpointError, match="truncated"):
        render(root, renderer=Broken())
    assert list((root / "leases").iterdir()) == [] and list((root / "failures").iterdir()) == []
    assert render(root).state == "done"


def test_a_clip_that_no_machine_can_write_fails_its_shot_and_the_others_continue(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png = shot_folder.write_png

    def refuse(path: Path, image: torch.Tensor) -> None:
        if "ocean/shot_02" in str(path):
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        write_png(path, image)

    monkeypatch.setattr(shot_folder, "write_png", refuse)
    summary = render(root)
    assert (summary.state, summary.num_rendered, summary.num_failed, summary.num_blocked) == ("failed", 3, 1, 2)
    assert "cannot be saved" in summary.failures[0].reason and "Invalid argument" in summary.failures[0].reason
    assert not list((root / "stories/ocean/shot_02/attempts").iterdir()), "the half-saved attempt is removed"
    monkeypatch.undo()
    assert render(root, retry_failed=True).state == "done"
