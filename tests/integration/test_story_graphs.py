"""Whatever the graph of a story, and whoever renders which shot and dies at it: the result is that of one replica."""

import os
import signal
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.summary import Replica
from storymem_dist.errors import ShotError
from storymem_dist.events import ShotSkipped, ShotStarted
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import REFERENCES, ShotReference, Story
from tests.helpers.batches import fail_at, render
from tests.helpers.fake_renderer import Events, FakeRenderer, finished_files, make_part
from tests.helpers.story_graphs import shot_of, stories, story_of
from tests.helpers.workers import begun, exit_code, fork_worker, quick_folder

QUICK = DispatchSettings(poll_seconds=0.01, lease_seconds=20.0, checkpoint_every_steps=1, max_attempts=100)


def start_replica(root: Path, story: Story, rule: str, replica: Replica, dies_at: int | None) -> int:
    """Fork one replica; it is killed before its denoising step number ``dies_at``."""
    steps = [0]

    def before_step(job: ShotJob, step: int) -> None:
        steps[0] += 1
        if steps[0] == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        renderer = FakeRenderer(before_step=before_step, log=root.parent / "log")
        part = make_part(root, [story], recall=rule)
        return render_batch(parts=[part], renderer=renderer, settings=QUICK, replica=replica).exit_code

    return fork_worker(work)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.data(),
    st.sampled_from(["window", "anchored", "entities"]),
    st.lists(st.one_of(st.none(), st.integers(1, 12)), min_size=1, max_size=4),
)
def test_replicas_that_die_make_what_one_replica_makes_in_order(
    data: st.DataObject, rule: str, deaths: list[int | None]
) -> None:
    with quick_folder() as folder:
        clip = folder / "given.mp4"
        clip.write_bytes(b"a clip that is not read here")
        story = data.draw(stories(max_shots=6, clip=clip))
        render(folder / "whole", [story], part={"recall": rule})
        root, count = folder / "run", len(deaths)
        replicas = [Replica(index=index, count=count, job_id="job") for index in range(count)]
        workers = [
            start_replica(root, story, rule, replica, dies_at)
            for replica, dies_at in zip(replicas, deaths, strict=True)
        ]
        codes = [exit_code(pid) for pid in workers]
        assert set(codes) <= {0, -signal.SIGKILL}
        if 0 not in codes:
            assert exit_code(start_replica(root, story, rule, replicas[0], None)) == 0
        assert finished_files(root) == finished_files(folder / "whole")
        num_lost = 2 * codes.count(-signal.SIGKILL)  # the running shot and the one being saved
        assert len(begun(folder / "log")) <= len(story.shots) + num_lost


BRANCHES = story_of(
    "s",
    shot_of(0),
    shot_of(1, recall=(0,)),
    shot_of(2, recall=(0,)),
    shot_of(3, recall=(1,)),
    shot_of(4, recall=(2,)),
    shot_of(5, cut=False, recall=(0,)),
)


def test_a_failed_shot_blocks_those_that_need_it_and_the_rest_of_the_story_is_rendered(tmp_path: Path) -> None:
    events = Events()
    failing = FakeRenderer(before_step=fail_at("s:shot_02", lambda: ShotError("no")))
    summary = render(tmp_path / "run", [BRANCHES], renderer=failing, events=events)
    assert (summary.state, summary.num_rendered, summary.num_failed, summary.num_blocked) == ("failed", 4, 1, 1)
    assert not (tmp_path / "run/stories/s/story.mp4").exists()
    kinds = [type(event).__name__ for event in events.seen]
    assert kinds.count("StoryFinished") == 1
    assert kinds.index("StoryFinished") > max(at for at, kind in enumerate(kinds) if kind == "ShotFinished")
    again = render(tmp_path / "run", [BRANCHES], retry_failed=True)
    assert (again.state, again.num_rendered) == ("done", 2)
    assert (tmp_path / "run/stories/s/story.mp4").exists()


def test_a_shot_that_two_failures_block_is_announced_once(tmp_path: Path) -> None:
    story = story_of("s", shot_of(0, recall=()), shot_of(1, recall=()), shot_of(2, recall=(0,)), shot_of(3))
    events = Events()

    def before_step(job: ShotJob, step: int) -> None:
        if job.index < 2:
            raise ShotError("no")

    for _ in range(2):  # the second job finds both failures
        summary = render(tmp_path / "run", [story], renderer=FakeRenderer(before_step=before_step), events=events)
        assert (summary.num_failed, summary.num_blocked) == (2, 2)
        skipped = [event for event in events.seen if isinstance(event, ShotSkipped)]
        blocked = [event.shot_id for event in skipped if event.reason == "predecessor failed"]
        assert sorted(blocked) == ["shot_03", "shot_04"]
        events.seen.clear()


def test_the_start_of_a_shot_counts_the_pictures_that_its_memory_has(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"a picture that is not read here")
    sink = (ShotReference(path=picture, is_sink=True),)
    shots = (shot_of(0), shot_of(1, references=sink), shot_of(2, recall=(0,)), shot_of(3, recall=(REFERENCES,)))
    story, events = story_of("s", *shots, reference_images=(picture,)), Events()
    render(tmp_path / "run", [story], events=events)
    num_memory = {event.shot_id: event.num_memory for event in events.seen if isinstance(event, ShotStarted)}
    assert num_memory == {"shot_01": 1, "shot_02": 4, "shot_03": 2, "shot_04": 2}


def test_an_edited_shot_is_rendered_again_with_those_that_need_it_and_no_other(tmp_path: Path) -> None:
    render(tmp_path / "run", [BRANCHES])
    shots = list(BRANCHES.shots)
    shots[2] = shot_of(2, "another prompt", recall=(0,))
    edited = story_of("s", *shots)
    renderer = FakeRenderer()
    render(tmp_path / "run", [edited], renderer=renderer)
    assert sorted(renderer.rendered) == ["s:shot_03", "s:shot_05", "s:shot_06"]


def test_a_forced_rerender_renders_the_shot_and_those_that_need_it(tmp_path: Path) -> None:
    render(tmp_path / "run", [BRANCHES])
    renderer = FakeRenderer()
    render(tmp_path / "run", [BRANCHES], renderer=renderer, rerender=["s:2"])
    assert sorted(renderer.rendered) == ["s:shot_02", "s:shot_04"]
