"""When a replica renders a shot together with idle ones: decisions on a real queue, and batches of four threads."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from storymem_dist.dispatch.gathering import Gathering, Merge
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.merging import Team
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import plan_part
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.dispatch.tail import ElasticTail, TeamRules
from storymem_dist.errors import ShotError
from storymem_dist.events import ReplicaHelped, ShotStarted
from storymem_dist.render.batch import render_batch
from storymem_dist.render.crew import Crew
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import Events, FakeRenderer, make_part, make_story
from tests.helpers.workers import quick_folder

SPEEDUPS = {2: 1.9, 4: 3.6}


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "run"


@pytest.fixture
def store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from torch's stubs


class Node:
    """The replicas of a node that share a queue's folder; ``now`` is their clock."""

    def __init__(self, root: Path, store: Any, stories: Sequence[Story], of: int = 4, **settings: float) -> None:
        self.now = 0.0
        part = make_part(root, stories)
        part.run.open()
        leases = LeaseFolder(folder=root / "leases", owner=Owner.this_process("job"), lease_seconds=60.0)
        leases.folder.mkdir(exist_ok=True)
        planned = [shots for _, shots in plan_part(0, part) if isinstance(shots, tuple)]
        self.queue = ShotQueue(
            graph=ShotGraph(planned),
            runs=[part.run],
            leases=[leases],
            settings=DispatchSettings(poll_seconds=0.0, **settings),  # type: ignore[arg-type]
            job_id="job",
            num_replicas=of,
        )
        self.gatherings = [Gathering(store, replica=number, replicas=range(of)) for number in range(of)]
        self.tails = [self._tail(number, of) for number in range(of)]

    def _tail(self, number: int, of: int) -> ElasticTail:
        rules = TeamRules(gathering=self.gatherings[number], replica=number, replicas_per_node=of, speedups=SPEEDUPS)
        tail = ElasticTail(lambda: rules, poll_seconds=1.0, clock=lambda: self.now, sleep=lambda seconds: None)
        tail.open()
        return tail

    def be(self, state: str, *replicas: int, loaded: str = "t2v") -> None:
        for replica in replicas:
            self.gatherings[replica].look_for_work(loaded)
            if state == "idle":
                self.gatherings[replica].wait(0.001, loaded)
            elif state == "busy":
                self.gatherings[replica].be_busy()

    def claim(self, replica: int, loaded: str = "t2v") -> tuple[str, Merge | None] | None:
        """What a replica takes, and with whom; None: it waits."""
        tail = self.tails[replica]
        assert tail.look_for_work(loaded) is None
        claim = self.queue.claim(loaded, "", lambda shot: tail.instead(shot, self.queue))
        return None if claim is None else (claim.shot.story_id, tail.gather(claim, self.queue))


def test_the_last_shot_is_rendered_by_all_idle_replicas(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)])
    node.be("idle", 0, 1, 3)
    assert node.claim(2) == ("fox", Merge(team=Team(first=0, size=4), leader=2))


def test_a_replica_that_becomes_idle_while_another_looks_is_seen(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)], of=2)
    node.be("soon", 1)
    look = node.gatherings[0]._states

    def then_idle() -> dict[int, str]:
        states = look()
        node.be("idle", 1)
        return states

    node.gatherings[0]._states = then_idle  # type: ignore[method-assign]
    assert node.claim(0) is None, "it waits for the other one"
    assert node.claim(0) == ("fox", Merge(team=Team(first=0, size=2), leader=0))


def test_a_replica_waits_for_one_that_has_not_begun(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)], of=2)
    assert node.claim(0) is None
    node.be("idle", 1)
    assert node.claim(0) == ("fox", Merge(team=Team(first=0, size=2), leader=0))


def test_with_a_shot_for_each_replica_nobody_works_together(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story(name, 3) for name in ("a", "b", "c", "d")])
    node.be("idle", 1, 2, 3)
    assert node.claim(0) == ("a", None)


def test_two_equal_stories_share_the_replicas(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("a", 3), make_story("b", 3)])
    node.be("idle", 1, 2, 3)
    assert node.claim(0) == ("a", Merge(team=Team(first=0, size=2), leader=0))
    assert node.claim(2) == ("b", Merge(team=Team(first=2, size=2), leader=2))


def test_a_much_longer_story_comes_first_with_the_fastest_team(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("short", 1), make_story("long", 9)])
    node.be("idle", 1, 2, 3)
    assert node.claim(0) == ("long", Merge(team=Team(first=0, size=4), leader=0))


def test_a_busy_neighbour_makes_the_team_smaller(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)])
    node.be("idle", 1)
    node.be("busy", 2, 3)
    assert node.claim(0) == ("fox", Merge(team=Team(first=0, size=2), leader=0))


def test_a_replica_leaves_the_shot_to_a_faster_team_for_a_while(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)])
    node.be("idle", 2, 3)
    node.be("busy", 1)
    assert node.claim(0) is None
    node.now = 11.0
    assert node.claim(0) is None
    node.be("idle", 0)
    assert node.claim(2) == ("fox", Merge(team=Team(first=2, size=2), leader=2))


def test_a_replica_whose_peers_do_not_come_takes_the_shot_after_all(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)])
    node.be("idle", 1)
    node.be("soon", 2, 3)  # they wait for their saves
    assert node.claim(0) is None
    node.now = 13.0
    assert node.claim(0) == ("fox", Merge(team=Team(first=0, size=2), leader=0))


@pytest.mark.parametrize(("swap_seconds", "size"), [(1.0, 4), (8e4, None)])
def test_replicas_with_other_experts_are_called_only_where_loading_pays(
    root: Path, store: Any, swap_seconds: float, size: int | None
) -> None:
    node = Node(root, store, [make_story("fox", 3)], swap_seconds=swap_seconds)
    (first, second, _) = node.queue.graph.stories[0].shots
    node.queue.note_rendered(second, 100.0)
    node.be("idle", 1, 2, 3, loaded="m2v")
    claimed = node.claim(0)
    assert claimed is not None and first.kind == "t2v"
    assert (None if claimed[1] is None else claimed[1].team.size) == size


def test_all_load_together_what_nobody_has(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)], swap_seconds=8e4)
    node.queue.graph.set_state(node.queue.graph.stories[0].shots[0], ShotStatus.COMMITTED)
    node.be("idle", 1, 2, 3)
    assert node.claim(0) == ("fox", Merge(team=Team(first=0, size=4), leader=0))


def test_a_shot_on_which_a_process_died_is_rendered_by_one_replica(root: Path, store: Any) -> None:
    node = Node(root, store, [make_story("fox", 3)])
    node.be("idle", 1, 2, 3)
    tail = node.tails[0]
    tail.look_for_work("t2v")
    claim = node.queue.claim("t2v", "", lambda shot: tail.instead(shot, node.queue))
    assert claim is not None
    died = type(claim.lease)(key=claim.lease.key, generation=1, num_deaths=1)
    assert tail.gather(type(claim)(shot=claim.shot, lease=died, low_memory=False), node.queue) is None
    assert tail.gather(type(claim)(shot=claim.shot, lease=claim.lease, low_memory=True), node.queue) is None


# -- whole batches -----------------------------------------------------------------------------------------------------


class ThreadTeams:
    """Replicas that are threads. A crew decides in lock step: its leader computes, all get the outcome."""

    def __init__(self, store: Any, size: int) -> None:
        self.store, self.size = store, size
        self.barrier = threading.Barrier(size, timeout=30)
        self.outcome: tuple[Any, BaseException | None] = (None, None)

    def crews(self, number: int, parts: Any, renderer: FakeRenderer) -> Any:
        teams = self

        class Crews:
            def rules(self) -> TeamRules:
                gathering = Gathering(teams.store, replica=number, replicas=range(teams.size))
                speedups = {teams.size: float(teams.size)}
                return TeamRules(gathering=gathering, replica=number, replicas_per_node=teams.size, speedups=speedups)

            @contextmanager
            def crew(self, merge: Merge) -> Iterator[Crew]:
                yield Crew(parts=parts, renderer=renderer, leader_decides=teams.decides(number == merge.leader))

        return Crews()

    def decides(self, is_leader: bool) -> Callable[[Callable[[], Any]], Any]:
        def leader_decides(fn: Callable[[], Any]) -> Any:
            if is_leader:
                try:
                    self.outcome = (fn(), None)
                except BaseException as error:
                    self.outcome = (None, error)
            self.barrier.wait()
            value, error = self.outcome
            self.barrier.wait()
            if error is not None:
                raise error
            return value

        return leader_decides


@pytest.mark.parametrize("trouble", ["none", "a shot fails"])
def test_replicas_come_together_for_a_chain_and_part_again(root: Path, store: Any, trouble: str) -> None:
    teams, summaries, events = ThreadTeams(store, 4), dict[int, BatchSummary](), [Events() for _ in range(4)]
    stories = [make_story("fox", 4), make_story("owl", 1), make_story("elk", 2)]

    def before_step(job: ShotJob, step: int) -> None:
        if trouble != "none" and (job.story_id, job.index, step) == ("fox", 2, 1):
            raise ShotError("latents are not finite")

    renderers = [FakeRenderer(before_step=before_step, step_seconds=0.01) for _ in range(4)]

    def run(number: int) -> None:
        parts = [make_part(root, stories, observers=events[number])]
        summaries[number] = render_batch(
            parts=parts,
            renderer=renderers[number],
            settings=DispatchSettings(poll_seconds=0.25),
            replica=Replica(index=number, count=4, job_id="job"),
            crews=teams.crews(number, parts, renderers[number]),
        )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(summaries) == 4
    assert {summary.state for summary in summaries.values()} == {"done" if trouble == "none" else "failed"}
    assert sum(summary.num_rendered for summary in summaries.values()) == (7 if trouble == "none" else 5)
    started = [event for of in events for event in of.of(ShotStarted)]
    helped = [event for of in events for event in of.of(ReplicaHelped)]
    together = [event for event in started if isinstance(event, ShotStarted) and event.replicas]
    assert together and all(event.replicas == (0, 1, 2, 3) for event in together)
    assert len(helped) == 3 * len(together)
    assert len(started) == (7 if trouble == "none" else 6), "each shot begins once"
