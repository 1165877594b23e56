"""Half-made files of dead processes are removed when no other process may be alive; those of a living one never are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storymem_dist.artifacts.run_folder import SMALL_FOLDERS, RunFolder
from storymem_dist.dispatch import cleanup
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import plan_story
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.scanning import lease_key
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import Replica
from storymem_dist.events import Event, JobFinished
from tests.helpers.batches import render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files, make_part, make_story
from tests.helpers.workers import exit_code, fork_worker, quick_folder

STORIES = [make_story("ocean", 2)]
HALF_MADE = [
    ".tmp-0123-stop.json",
    "leases/.tmp-0123-key.0.lease",
    "failures/.tmp-0123-ocean.json",
    *(f"{name}/.tmp-0123-x" for name in SMALL_FOLDERS),
    "stories/ocean/.tmp-0123-storyboard.json",
    "stories/ocean/keyframes/.tmp-0123-shot_01_0.png",
]


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


def leases_of(root: Path) -> LeaseFolder:
    return LeaseFolder(folder=root / "leases", owner=Owner.this_process("another job"), lease_seconds=60.0)


def write_half(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{")


def die(root: Path, names: list[str], held: str | None = None) -> None:
    """A process works in the folder and dies in the middle of writing, holding the lease ``held``."""

    def work() -> int:
        RunFolder(root).open()
        leases = leases_of(root)
        leases.start()
        if held is not None:
            assert leases.try_claim(held)
        write_half(root, names)
        os._exit(9)

    assert exit_code(fork_worker(work)) == 9


def left_in(root: Path) -> list[str]:
    """Every file that belongs to a process, dead or alive."""
    found = [path for path in root.rglob("*") if path.name.startswith(".tmp-") or path.parent.name == "leases"]
    return sorted(str(path.relative_to(root)) for path in found)


def render_next_to(root: Path, other: LeaseFolder, replica: Replica | None = None) -> None:
    """Render while the process of ``other`` is alive; it leaves just before this one does."""

    class Leaving(Events):
        def notify(self, event: Event) -> None:
            if isinstance(event, JobFinished):
                other.close()

    other.start()
    assert render(root, STORIES, events=Leaving(), replica=replica).state == "done"


def test_replicas_that_start_together_after_a_death_leave_nothing_half_made(root: Path) -> None:
    die(root, HALF_MADE)
    render_next_to(root, leases_of(root))
    assert left_in(root) == []


def test_the_first_process_after_a_death_cleans_up_at_once(root: Path) -> None:
    die(root, HALF_MADE)
    seen: list[str] = []

    def before_step(job: ShotJob, step: int) -> None:
        seen.extend(name for name in left_in(root) if name in HALF_MADE)

    render(root, STORIES, renderer=FakeRenderer(before_step=before_step))
    assert seen == [] == left_in(root)


def test_a_half_made_file_stays_while_any_other_process_may_be_alive(root: Path) -> None:
    other = leases_of(root)
    RunFolder(root).open()
    other.start()
    die(root, HALF_MADE[:1])
    write_half(root, HALF_MADE[-2:])
    render(root, STORIES)
    assert set(HALF_MADE[:1] + HALF_MADE[-2:]) <= set(left_in(root))
    other.close()
    render(root, STORIES)
    assert left_in(root) == []


def test_a_process_that_enters_during_the_last_clean_up_loses_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(root, [])
    entering = leases_of(root)
    half_made_files = cleanup._half_made_files

    def half_made_after_another_entered(*arguments: object) -> list[Path]:
        entering.start()
        write_half(root, HALF_MADE)
        return half_made_files(*arguments)

    monkeypatch.setattr(cleanup, "_half_made_files", half_made_after_another_entered)
    render_next_to(root, leases_of(root))
    assert set(HALF_MADE) <= set(left_in(root))
    entering.close()


def test_the_last_to_leave_looks_for_half_made_files_only_after_a_death(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []

    def look(*arguments: object) -> list[Path]:
        looked.append(True)
        return []

    monkeypatch.setattr(cleanup, "_half_made_files", look)
    RunFolder(root).open()
    render_next_to(root, leases_of(root))
    assert looked == []
    die(root, [])
    render_next_to(root, leases_of(root))
    assert looked == [True]


@pytest.mark.parametrize("has_company", [False, True])
def test_a_record_whose_writer_died_gets_its_views_before_the_lease_is_removed(root: Path, has_company: bool) -> None:
    render(root, STORIES)
    whole = finished_files(root)
    shots = plan_story(0, make_part(root, STORIES), STORIES[0], {})
    die(root, [], held=lease_key(shots[1]))
    (root / "stories/ocean/shot_02.mp4").unlink()
    replica = Replica(index=1, count=2)  # the story is of the other replica's share: this one does not check it
    if has_company:
        render_next_to(root, leases_of(root), replica)
    else:
        render(root, STORIES, replica=replica)
    assert finished_files(root) == whole
    assert left_in(root) == []


def test_leases_that_count_deaths_stay_in_stories_of_this_job_and_of_others(root: Path) -> None:
    shots = plan_story(0, make_part(root, STORIES), STORIES[0], {})
    RunFolder(root).open()
    die(root, [], held=lease_key(shots[0]))
    die(root, [], held="another.shot_01.0123456789abcdef")
    die(root, [], held="ocean.shot_01.0123456789abcdef")  # of an earlier version of the story: never claimed again
    stop = StopSwitch()
    stop.request("test")
    render(root, STORIES, stop=stop)
    assert left_in(root) == sorted(
        ["leases/another.shot_01.0123456789abcdef.0.lease", f"leases/{lease_key(shots[0])}.0.lease"]
    )
