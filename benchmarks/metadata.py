"""How many operations does a job ask of the file system of its run folder, per shot, per replica and per second?

    python -m benchmarks.metadata
    python -m benchmarks.metadata --replicas 2 --shots 20 --measured 1      # quick

One real replica works in a folder that looks as if ``--replicas`` of them did: it holds their heartbeats and their
leases, and while the clock of the replica moves on, the others beat, commit shots and claim others. The replica is the
project's own code from ``render_batch`` down (queue, leases, requests, stop switch, coordinator, saving); its renderer
draws small pictures, and its clock is simulated: a shot takes ``--shot-seconds`` and ``--steps`` steps. What it asks of
the folder is counted (``benchmarks.counting``) and multiplied by the number of replicas.

"start": operations of one replica until it looks for its first shot, in a new folder. "shot": of one shot, from its
claim to its commit, with history, checkpoints, files and record. "busy/min": of a replica in a minute while it renders:
heartbeats, looks for stop files and requests, checks of its lease. "wait/min": of a replica that waits for a shot, in a
minute. Stories have ten shots that need each other, so a job of 300 shots keeps 30 replicas busy, and the others wait.
"job/s" is all that in a second, for the whole job while as many as possible render. The last columns split a busy
replica's operations of ten minutes by kind.

Not counted: reading and writing the contents of open files, event files (one append every few seconds per rank), and
the MP4 library, which opens two files for each shot.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.counting import KINDS, Operations, counting
from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.other_replicas import Others
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.diffusion.denoise import DenoiseState
from storymem_dist.dispatch import coordinator, ending, opening, plan
from storymem_dist.dispatch.coordinator import Coordinator
from storymem_dist.dispatch.leases import HEARTBEATS_PER_LEASE, LeaseFolder
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_story
from storymem_dist.dispatch.protocol import End, RenderedShot, ShotHistory, ShotJob
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.dispatch.requests import QueueRequests
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import Replica
from storymem_dist.dispatch.tail import ElasticTail
from storymem_dist.render.batch import render_batch
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import FakeRenderer, make_part, make_story


def main() -> None:
    """Measure, print and write."""
    parser = make_parser("metadata", __doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 8, 64, 1024])
    parser.add_argument("--shots", type=int, nargs="+", default=[300, 100_000])
    parser.add_argument("--ranks", type=int, default=8, help="ranks of a replica")
    parser.add_argument("--shot-seconds", type=float, default=180.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--measured", type=int, default=4, help="shots that count, after the first of a story")
    arguments = parser.parse_args()
    rows = []
    for num_shots in arguments.shots:
        for num_replicas in arguments.replicas:
            job = Job(
                num_replicas=num_replicas,
                num_shots=num_shots,
                num_ranks=arguments.ranks,
                shot_seconds=arguments.shot_seconds,
                num_steps=arguments.steps,
            )
            rows.append(measure(job, arguments.measured).row())
            print_table(rows[-1:])
    print()
    print_table(rows)
    write_json(arguments.json, "metadata", {"rows": rows}, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is simulated."""

    num_replicas: int
    num_shots: int
    num_ranks: int = 8
    story_length: int = 10
    shot_seconds: float = 180.0
    num_steps: int = 40
    wait_seconds: float = 600.0

    @property
    def num_busy(self) -> int:
        """Replicas that have a shot: stories are chains."""
        return min(self.num_replicas, -(-self.num_shots // self.story_length))


@dataclass(kw_only=True)
class Cost:
    """Operations of one replica by kind: until it begins, per shot, and per minute."""

    job: Job
    start: Counter[str] = field(default_factory=Counter)
    shots: list[Counter[str]] = field(default_factory=list)
    rendering: list[Counter[str]] = field(default_factory=list)
    waiting: Counter[str] = field(default_factory=Counter)

    @property
    def per_shot(self) -> float:
        """Operations of a shot, without those that the time takes."""
        return sum(one.total() for one in self.shots) / max(1, len(self.shots))

    @property
    def busy_per_minute(self) -> float:
        """Operations of a minute of rendering."""
        return sum(one.total() for one in self.rendering) / max(1, len(self.rendering)) * 60.0 / self.job.shot_seconds

    @property
    def waiting_per_minute(self) -> float:
        """Operations of a minute of waiting."""
        return self.waiting.total() * 60.0 / self.job.wait_seconds

    @property
    def per_second(self) -> float:
        """Operations of the whole job in a second."""
        busy = self.per_shot / self.job.shot_seconds + self.busy_per_minute / 60.0
        return self.job.num_busy * busy + (self.job.num_replicas - self.job.num_busy) * self.waiting_per_minute / 60.0

    def row(self) -> dict[str, object]:
        """The cost as a row of a table."""
        kinds = sum(self.shots, Counter[str]()) + sum(self.rendering, Counter[str]())
        ten_minutes = 600.0 / self.job.shot_seconds / max(1, len(self.shots))
        return {
            "shots": self.job.num_shots,
            "replicas": self.job.num_replicas,
            "busy": self.job.num_busy,
            "start": self.start.total(),
            "shot": round(self.per_shot),
            "busy/min": round(self.busy_per_minute, 1),
            "wait/min": round(self.waiting_per_minute, 1),
            "job/s": round(self.per_second, 1),
            **{kind: round(kinds[kind] * ten_minutes) for kind in KINDS},
        }


def measure(job: Job, num_measured: int) -> Cost:
    """Let one replica render ``num_measured`` shots, and wait for one where others would."""
    cost = Cost(job=job)
    with tempfile.TemporaryDirectory() as folder, counting(Path(folder)) as operations:
        world = World(job, Path(folder) / "run", operations)
        world.measure_rendering(cost, num_measured)
        if job.num_busy < job.num_replicas:
            world.measure_waiting(cost)
    return cost


class World:
    """A run folder, the simulated time, and all replicas but one, as far as the folder shows them."""

    def __init__(self, job: Job, root: Path, operations: Operations) -> None:
        self.job = job
        self.operations = operations
        self.now = 1000.0
        self.settings = DispatchSettings(overlap_saving=False)
        self.run = RunFolder(root)
        num_stories = -(-job.num_shots // job.story_length)
        stories = [make_story(f"story_{n:05d}", job.story_length) for n in range(num_stories)]
        self.part: BatchPart = make_part(root, stories, num_inference_steps=job.num_steps)
        self._planned: dict[str, tuple[PlannedShot, ...]] = {}
        self._leases: list[LeaseFolder] = []
        self._switches: list[StopSwitch] = []
        self._next_beat = 0.0
        with operations.paused():
            self.run.open()
            self._others = Others(self)

    def plan_once(self, part_index: int, part: BatchPart, story: Story, *given: Any) -> tuple[PlannedShot, ...]:
        """The shots of a story; all replicas plan the same."""
        if story.story_id not in self._planned:
            self._planned[story.story_id] = plan_story(part_index, part, story, {})
        return self._planned[story.story_id]

    def clock(self) -> float:
        """Seconds of the simulated time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass: threads of this replica look and beat, and the others go on."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            for switch in self._switches:
                switch._look()
            if self.now >= self._next_beat:
                self._next_beat = self.now + self.settings.lease_seconds / HEARTBEATS_PER_LEASE
                for leases in self._leases:
                    leases._beat()
        with self.operations.paused():
            self._others.go_on()

    def measure_rendering(self, cost: Cost, num_measured: int) -> None:
        """Let the replica render shots; the first one shows what the start costs."""
        renderer = _Renderer(world=self, num_steps=self.job.num_steps, left=num_measured + 1)
        with self._simulated() as stop:
            renderer.stop = stop
            render_batch(
                parts=[self.part],
                renderer=renderer,
                settings=self.settings,
                replica=Replica(index=0, count=self.job.num_replicas, job_id="job"),
                stop=stop,
            )
        cost.start = renderer.between[0]
        cost.shots = renderer.between[2:]
        cost.rendering = renderer.during[1:-1] if num_measured > 1 else renderer.during[:1]

    def measure_waiting(self, cost: Cost) -> None:
        """Let a replica look for a shot where the others have all."""
        with self.operations.paused():
            self._others.take_all()
        with self._simulated() as stop:
            waiting = Coordinator(
                parts=[self.part],
                settings=self.settings,
                replica=Replica(index=self.job.num_replicas - 1, count=self.job.num_replicas, job_id="job"),
                stop=stop,
                check_contents=False,
            )
            waiting.open()
            until = self.now + self.job.wait_seconds
            self.operations.take()
            with patch.object(self, "advance", self._until(until, stop)):
                assert isinstance(waiting.next_assignment(None), End)
            cost.waiting = self.operations.take()
            waiting.close()

    def _until(self, until: float, stop: StopSwitch) -> Callable[[float], None]:
        advance = self.advance

        def go_on(seconds: float) -> None:
            advance(seconds)
            if self.now >= until:
                stop.request("measured")

        return go_on

    @contextmanager
    def _simulated(self) -> Iterator[StopSwitch]:
        """The clock of this world in all that the replica uses; yields the stop switch of its leader."""
        files = [self.run.stop_file]
        self._switches = [StopSwitch(files, clock=self.clock) for _ in range(self.job.num_ranks)]
        self._leases = []
        for switch in self._switches:
            switch.start_watching()
        for switch in self._switches[1:]:
            switch.look_no_more()  # as on all ranks but the leader

        def lease_folder(**options: Any) -> LeaseFolder:
            leases = _Leases(**options, clock=self.clock)
            self._leases.append(leases)
            return leases

        def sleep(seconds: float) -> None:
            self.advance(seconds)

        with ExitStack() as changes:
            changes.enter_context(patch.object(opening, "LeaseFolder", lease_folder))
            changes.enter_context(patch.object(opening, "ShotQueue", partial(ShotQueue, clock=self.clock)))
            changes.enter_context(patch.object(opening, "QueueRequests", partial(QueueRequests, clock=self.clock)))
            tail = partial(ElasticTail, clock=self.clock, sleep=sleep)
            changes.enter_context(patch.object(coordinator, "ElasticTail", tail))
            changes.enter_context(patch.object(plan, "plan_story", self.plan_once))
            changes.enter_context(patch.object(ending, "_PEERS_SECONDS", 0.0))
            changes.enter_context(patch.object(coordinator, "time", SimpleNamespace(monotonic=self.clock)))
            yield self._switches[0]


class _Leases(LeaseFolder):
    """Beats when the simulated time says so, without a thread of its own."""

    def _keep_beating(self) -> None:
        pass


@dataclass
class _Renderer(FakeRenderer):
    """Draws, lets simulated time pass, and splits what is counted into that of shots and that of the time."""

    world: World = None  # type: ignore[assignment]
    left: int = 1
    stop: StopSwitch | None = None
    between: list[Counter[str]] = field(default_factory=list)
    during: list[Counter[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before_step = self._pass_time

    def _pass_time(self, job: ShotJob, step: int) -> None:
        self.world.advance(self.world.job.shot_seconds / self.num_steps)

    def render(
        self, job: ShotJob, history: ShotHistory, *, on_checkpoint: Callable[[DenoiseState], None], **rest: Any
    ) -> RenderedShot:
        """Render; a checkpoint is part of the shot."""
        operations = self.world.operations
        self.between.append(operations.take())
        self.left -= 1
        if self.left < 0 and self.stop is not None:
            self.stop.request("measured")
        of_shot, of_time = Counter[str](), Counter[str]()

        def save(state: DenoiseState) -> None:
            of_time.update(operations.take())
            on_checkpoint(state)
            of_shot.update(operations.take())

        try:
            return super().render(job, history, on_checkpoint=save, **rest)
        finally:
            of_time.update(operations.take())
            self.during.append(of_time)
            operations.counts.update(of_shot)


if __name__ == "__main__":
    main()
