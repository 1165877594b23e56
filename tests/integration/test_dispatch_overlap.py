"""A shot is saved while one of another story is rendered. Threads are ordered by events, never by time."""

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import storymem_dist.events as ev
from storymem_dist.artifacts import shot_folder
from storymem_dist.artifacts.shot_folder import ShotFolder
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.saving import BackgroundSave
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.errors import CheckpointError
from tests.helpers.batches import STORIES, render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files, make_story
from tests.helpers.workers import quick_folder, wait_until

FIRST, SECOND = "city:shot_01", "ocean:shot_01"  # the order in which one replica renders STORIES


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


def name_of(event: Any) -> str:
    return f"{event.story_id}:{event.shot_id}"


def begun_and_ended(events: Events) -> list[str]:
    kinds = (ev.ShotStarted, ev.ShotFinished, ev.ShotFailed)
    return [f"{type(e).__name__} {name_of(e)}" for e in events.seen if isinstance(e, kinds)]


def while_saving(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], None]) -> None:
    """Call ``act`` in the middle of saving one shot, before its first image is written."""
    write_png, done = shot_folder.write_png, []

    def write(path: Path, image: Tensor) -> None:
        if f"/stories/{name.replace(':', '/')}/" in str(path) and not done:
            done.append(True)
            act()
        write_png(path, image)

    monkeypatch.setattr(shot_folder, "write_png", write)


def wait_for(event: threading.Event) -> None:
    assert event.wait(20), "what was waited for did not happen"


def test_the_next_storys_shot_is_rendered_while_one_is_being_saved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_middle = threading.Event()

    def before_step(job: ShotJob, step: int) -> None:
        if (job.story_id, step) == ("ocean", 2):
            in_the_middle.set()

    while_saving(monkeypatch, FIRST, lambda: wait_for(in_the_middle))
    events = Events()
    summary = render(root, events=events, renderer=FakeRenderer(before_step=before_step))
    assert (summary.state, summary.num_rendered) == ("done", 6)
    assert begun_and_ended(events)[:3] == [f"ShotStarted {FIRST}", f"ShotStarted {SECOND}", f"ShotFinished {FIRST}"]
    monkeypatch.undo()
    render(root / "apart", overlap_saving=False)
    assert finished_files(root) == finished_files(root / "apart")
    assert not list((root / "leases").iterdir())


@pytest.mark.parametrize(("stories", "overlap"), [([make_story("city", 4)], True), (STORIES, False)])
def test_a_shot_follows_the_end_of_the_one_before_in_one_story_and_without_overlap(
    root: Path, stories: list[Any], overlap: bool
) -> None:
    events = Events()
    render(root, stories, events=events, overlap_saving=overlap)
    lines = begun_and_ended(events)
    assert lines[::2] == [line.replace("ShotFinished", "ShotStarted") for line in lines[1::2]]
    assert not events.of(ev.ReplicaWaited), "its own save is no wait for others"


def test_one_save_is_in_flight_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stories = [make_story(f"story_{number}", 3) for number in range(4)]
    save_attempt, saving, most = ShotFolder.save_attempt, set[str](), []

    def save(folder: ShotFolder, *arguments: Any) -> Any:
        saving.add(str(folder.folder))
        most.append(len(saving))
        in_flight = sum(len(list(path.glob("attempts/*"))) for path in root.glob("stories/*/shot_??"))
        assert in_flight <= sum(1 for _ in root.glob("stories/*/*/records/*.json")) + 1
        stored = save_attempt(folder, *arguments)
        saving.discard(str(folder.folder))
        return stored

    monkeypatch.setattr(ShotFolder, "save_attempt", save)
    assert render(root, stories).state == "done"
    assert most == [1] * 12


def test_a_shot_that_cannot_be_saved_fails_alone_while_another_is_rendered(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering = threading.Event()

    def full() -> None:
        wait_for(rendering)
        raise OSError(errno.EINVAL, "Invalid argument")

    while_saving(monkeypatch, FIRST, full)
    events = Events()
    renderer = FakeRenderer(before_step=lambda job, step: rendering.set() if job.story_id == "ocean" else None)
    summary = render(root, events=events, renderer=renderer)
    assert (summary.state, summary.num_rendered, summary.num_failed, summary.num_blocked) == ("failed", 4, 1, 1)
    assert "cannot be saved" in summary.failures[0].reason and "Invalid argument" in summary.failures[0].reason
    assert begun_and_ended(events)[:3] == [f"ShotStarted {FIRST}", f"ShotStarted {SECOND}", f"ShotFailed {FIRST}"]
    assert not list((root / "stories/city/shot_01/attempts").iterdir())
    monkeypatch.undo()
    assert render(root, retry_failed=True).state == "done"
    render(root / "whole")
    assert finished_files(root) == finished_files(root / "whole")


def test_an_error_of_this_program_while_saving_is_not_blamed_on_the_running_shot(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering = threading.Event()

    def fail() -> None:
        wait_for(rendering)
        raise CheckpointError("a fault that has nothing to do with this shot or the other")

    while_saving(monkeypatch, FIRST, fail)
    events = Events()
    renderer = FakeRenderer(
        step_seconds=0.05, before_step=lambda job, step: rendering.set() if job.story_id == "ocean" else None
    )
    with pytest.raises(CheckpointError, match="nothing to do"):
        render(root, events=events, renderer=renderer)
    assert not list((root / "failures").iterdir()) and not events.of(ev.ShotFailed)
    assert not list((root / "leases").iterdir())
    monkeypatch.undo()
    assert render(root).state == "done"


@pytest.mark.parametrize("late", [False, True], ids=["between two steps", "when the next is handed in"])
def test_a_crash_while_saving_counts_as_a_death_of_that_shot_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """The shot that was rendered meanwhile is not to blame: its lease is released."""
    crash_now = threading.Event()

    def fail() -> None:
        wait_for(crash_now)
        raise RuntimeError("a fault of the encoder")

    def before_step(job: ShotJob, step: int) -> None:
        if job.story_id == "ocean" and step == (3 if late else 0):
            if late:
                threading.Timer(0.5, crash_now.set).start()  # after the last look, which is before this step
            else:
                crash_now.set()

    while_saving(monkeypatch, FIRST, fail)
    with pytest.raises(RuntimeError, match="encoder"):
        render(root, renderer=FakeRenderer(step_seconds=0.1, before_step=before_step))
    left = [path.name for path in (root / "leases").glob("*.lease")]
    assert [name.split(".")[:2] for name in left] == [FIRST.split(":")], left


def test_a_stop_waits_for_the_save_and_keeps_the_steps_of_the_running_shot(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, events = StopSwitch(), Events()

    def before_step(job: ShotJob, step: int) -> None:
        if (job.story_id, step) == ("ocean", 1):
            stop.request("SIGTERM")

    checkpoints = root / "checkpoints"
    while_saving(monkeypatch, FIRST, lambda: wait_until(lambda: bool(list(checkpoints.rglob("*.safetensors")))))
    summary = render(root, events=events, stop=stop, renderer=FakeRenderer(before_step=before_step))
    assert (summary.state, summary.num_rendered) == ("stopped", 1)
    assert begun_and_ended(events) == [f"ShotStarted {FIRST}", f"ShotStarted {SECOND}", f"ShotFinished {FIRST}"]
    assert not list((root / "leases").iterdir())
    monkeypatch.undo()
    renderer = FakeRenderer()
    assert render(root, renderer=renderer).state == "done"
    assert renderer.resumed == [(SECOND, 2)] and FIRST not in renderer.rendered
    render(root / "whole")
    assert finished_files(root) == finished_files(root / "whole")


@pytest.mark.parametrize("error", [CheckpointError("truncated"), RuntimeError("device-side assert")])
def test_a_rendered_shot_is_saved_although_the_replica_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The second shot is being saved while the experts for the third are loaded."""
    loading = threading.Event()

    class Breaking(FakeRenderer):
        def prepare(self, kind: str) -> None:
            if kind == "m2v":
                loading.set()
                raise error

    while_saving(monkeypatch, SECOND, lambda: wait_for(loading))
    events = Events()
    with pytest.raises(type(error)):
        render(root, renderer=Breaking(), events=events)
    assert begun_and_ended(events)[-1] == f"ShotFinished {SECOND}"
    monkeypatch.undo()
    renderer = FakeRenderer()
    assert render(root, renderer=renderer).state == "done"
    assert not {FIRST, SECOND} & set(renderer.rendered)


def test_an_interrupt_abandons_the_save_and_leaves_nothing_locked_or_half_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned, abandon = threading.Event(), BackgroundSave.abandon

    def abandon_and_signal(save: BackgroundSave) -> None:
        abandon(save)
        abandoned.set()

    def before_step(job: ShotJob, step: int) -> None:
        if job.story_id == "ocean":
            raise KeyboardInterrupt

    monkeypatch.setattr(BackgroundSave, "abandon", abandon_and_signal)
    while_saving(monkeypatch, FIRST, lambda: wait_for(abandoned))
    with pytest.raises(KeyboardInterrupt):
        render(root, renderer=FakeRenderer(before_step=before_step))
    assert not list((root / "leases").iterdir()) and not list(root.glob("stories/*/*/attempts/*"))
    monkeypatch.undo()
    renderer = FakeRenderer()
    assert render(root, renderer=renderer).state == "done"
    assert FIRST in renderer.rendered
    render(root / "whole")
    assert finished_files(root) == finished_files(root / "whole")


def test_a_story_video_is_made_while_the_next_shot_is_rendered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendering = threading.Event()
    while_saving(monkeypatch, FIRST, lambda: wait_for(rendering))
    events = Events()
    renderer = FakeRenderer(before_step=lambda job, step: rendering.set() if job.story_id == "ocean" else None)
    render(root, [make_story("city", 1), make_story("ocean", 1)], events=events, renderer=renderer)
    lines = [
        f"{type(event).__name__} {event.story_id}"
        for event in events.seen
        if isinstance(event, ev.ShotStarted | ev.StoryFinished)
    ]
    assert lines[:2] == ["ShotStarted city", "ShotStarted ocean"]
    assert sorted(lines[2:]) == ["StoryFinished city", "StoryFinished ocean"]
    assert all((root / f"stories/{name}/story.mp4").is_file() for name in ("city", "ocean"))
