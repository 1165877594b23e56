"""How well ready shots are shared out, and what a claim costs.

    python benchmarks/dispatch.py                      # both tables, a few minutes
    python benchmarks/dispatch.py --json dispatch.json

**Makespan.** The planner's own choice (``choose_shot``) drives simulated replicas over the 30 stories of the benchmark
(300 shots, 7 to 12 a story) and over 3,000 stories. A shot takes what the cost model says for its number of memory
keyframes, at 326.9 s for a clip without memory (one H100); saving it takes ``--save-ratio`` of such a clip's time. The
default is for one GPU and 40 steps at 832x480: 2.8 s (``benchmarks/outside_denoise.py``); on eight GPUs it is 0.07.

"apart": a replica saves a shot, then begins the next one (``dispatch.overlap_saving=false``). "beside": it renders
another story's shot while it saves one; it waits where ``choose_shot`` says so, and with its second rendered shot until
the first is saved. A shot can be followed by the next of its story only when it is saved, in both.

Efficiency is the bound over the makespan, and the bound is what no order of shots can beat even with saves beside: the
longest of all rendering shared by the replicas and one save after it, all saves shared by the replicas (one at a time
in each), and the longest story with its saves. For comparison, whole stories handed to the next free replica, longest
first, saves apart. With swaps: saves beside, and each replica loses ``--swap-seconds`` whenever it loads other experts,
its first ones included.

**Claims.** The real queue, with leases in memory: every claim, commit and scan of a job of 30,000 shots, in processor
time of this thread, so that waiting for the file system does not count.
"""

import argparse
import heapq
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import print_table, write_json

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.graph import ShotGraph, ShotState, choose_shot
from storymem_dist.dispatch.leases import Lease
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_story
from storymem_dist.dispatch.queue import ShotQueue, lease_key
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.story.schema import Scene, Shot, Story

# 30 stories, 300 shots, 7 to 12 a story, as ST-Bench has.
SHOT_COUNTS = [7] * 3 + [8] * 4 + [9] * 5 + [10] * 4 + [11] * 6 + [12] * 8
H100_SECONDS_PER_CLIP = 326.9


def main() -> None:
    """Simulate, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8, 12, 16, 20, 24, 28, 32, 256])
    parser.add_argument("--large-replicas", type=int, default=1024, help="replicas for 3,000 stories; 0 leaves it out")
    parser.add_argument("--swap-seconds", type=float, default=60.0)
    parser.add_argument(
        "--save-ratio", type=float, default=0.0086, help="time of a save over that of the shortest clip"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    cases = [(30, replicas) for replicas in arguments.replicas]
    if arguments.large_replicas:
        cases.append((3000, arguments.large_replicas))
    save_seconds = arguments.save_ratio * H100_SECONDS_PER_CLIP
    rows = [_compare(*case, arguments.swap_seconds, save_seconds) for case in cases]
    print_table(rows)
    claims = measure_claims(3000)
    print()
    print_table([claims])
    write_json(arguments.json, {"makespan": rows, "claims": claims}, torch.device("cpu"))


# -- makespan ----------------------------------------------------------------------------------------------------------


def _compare(num_stories: int, num_replicas: int, swap_seconds: float, save_seconds: float) -> dict[str, object]:
    chains = make_chains(num_stories)
    seconds = H100_SECONDS_PER_CLIP / CostModel().shot_tflop(0)
    work = [seconds * sum(shot.cost for shot in chain) for chain in chains]
    lengths = [length + save_seconds * len(chain) for length, chain in zip(work, chains, strict=True)]
    all_saves = save_seconds * sum(map(len, chains))
    bound = max(sum(work) / num_replicas + save_seconds, all_saves / num_replicas, max(lengths))

    def run(*, swap_seconds: float, overlap: bool) -> tuple[float, int]:
        return simulate(
            chains, num_replicas, seconds, swap_seconds=swap_seconds, save_seconds=save_seconds, overlap=overlap
        )

    apart, _ = run(swap_seconds=0.0, overlap=False)
    beside, _ = run(swap_seconds=0.0, overlap=True)
    swapped, loads = run(swap_seconds=swap_seconds, overlap=True)
    whole = story_level(lengths, num_replicas)
    return {
        "stories": num_stories,
        "replicas": num_replicas,
        "bound h": round(bound / 3600, 3),
        "apart h": round(apart / 3600, 3),
        "apart efficiency": round(bound / apart, 3),
        "beside h": round(beside / 3600, 3),
        "beside efficiency": round(bound / beside, 3),
        "with swaps h": round(swapped / 3600, 3),
        "loads per replica": round(loads / num_replicas, 2),
        "stories h": round(whole / 3600, 3),
        "stories efficiency": round(bound / whole, 3),
    }


def make_chains(num_stories: int) -> list[tuple[PlannedShot, ...]]:
    """Chains of the benchmark's lengths, over and over, planned as a job would plan them."""
    part = make_part(Path("unused"))
    return [plan_story(0, part, make_story(n, SHOT_COUNTS[n % len(SHOT_COUNTS)]), {}) for n in range(num_stories)]


def make_part(root: Path) -> BatchPart:
    """A batch part with the A14B's cost model."""
    return BatchPart(
        run=RunFolder(root),
        stories=[],
        sampler=SamplerSettings(),
        inputs={"t2v": {}, "m2v": {}},
        video=VideoSettings(),
        cost=CostModel(),
    )


def make_story(number: int, num_shots: int) -> Story:
    """A story of ``num_shots`` cuts."""
    shots = tuple(
        Shot(index=index, index_in_scene=index, scene_num=1, prompt=f"story {number} shot {index}", cut=True)
        for index in range(num_shots)
    )
    scenes = (Scene(scene_num=1, shots=shots),)
    return Story(story_id=f"story_{number:04d}", name="", overview="", scenes=scenes)


def simulate(
    chains: Sequence[Sequence[PlannedShot]],
    num_replicas: int,
    seconds_per_tflop: float,
    *,
    swap_seconds: float,
    save_seconds: float,
    overlap: bool,
) -> tuple[float, int]:
    """Return the makespan in seconds and how often experts were loaded."""
    graph = ShotGraph(chains)
    loaded: list[str | None] = [None] * num_replicas
    saving: list[PlannedShot | None] = [None] * num_replicas
    save_ends = [0.0] * num_replicas
    idle = list(range(num_replicas))
    events: list[tuple[float, int, bool, PlannedShot]] = []  # when, by whom, whether its save is still to come, what
    now, loads = 0.0, 0

    def expected_wait(kind: str) -> float:
        ends = [end + to_save * save_seconds for end, _, to_save, shot in events if graph.kind_after(shot) == kind]
        return min(ends, default=float("inf")) - now

    while True:
        waiting: list[int] = []
        refused: set[str | None] = set()  # nothing gets ready while these replicas choose: one answer serves all alike
        for replica in idle:
            is_saving = saving[replica] is not None
            if not is_saving and loaded[replica] in refused:
                waiting.append(replica)
                continue
            shot = choose_shot(
                graph,
                loaded[replica],
                num_replicas=num_replicas,
                expected_wait=expected_wait,
                swap_seconds=swap_seconds,
                saving=saving[replica],
            )
            if shot is None:
                waiting.append(replica)
                refused |= set() if is_saving else {loaded[replica]}
                continue
            graph.set_state(shot, ShotState.LEASED)
            swap = swap_seconds if loaded[replica] != shot.kind else 0.0
            loads += loaded[replica] != shot.kind
            loaded[replica] = shot.kind
            end = now + swap + shot.cost * seconds_per_tflop
            end = max(end, save_ends[replica]) if overlap else end + save_seconds
            heapq.heappush(events, (end, replica, overlap, shot))
        if not events:
            return now, loads
        now, replica, to_save, shot = heapq.heappop(events)
        idle = waiting
        if to_save:
            saving[replica], save_ends[replica] = shot, now + save_seconds
            heapq.heappush(events, (save_ends[replica], replica, False, shot))
        else:
            saving[replica] = None
            graph.set_state(shot, ShotState.COMMITTED)
        if to_save == overlap:  # it has done all it does before the next one
            idle = [*waiting, replica]


def story_level(lengths: Sequence[float], num_replicas: int) -> float:
    """Makespan when whole stories go to the next free replica, longest first."""
    free = [0.0] * num_replicas
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(free, free[0] + length)
    return max(free)


# -- claims ------------------------------------------------------------------------------------------------------------


@dataclass
class LeasesInMemory:
    """Stands in for a lease folder, so that the queue's own cost is measured and not the file system's."""

    num_alive: int = 1024
    held: set[str] = field(default_factory=set)

    def scan(self) -> dict[str, int]:
        """All keys."""
        return dict.fromkeys(self.held, 0)

    def try_claim(self, key: str, known_generation: int | None) -> Lease | None:
        """Take a free key."""
        if key in self.held:
            return None
        self.held.add(key)
        return Lease(key=key, generation=0)

    def release(self, lease: Lease) -> None:
        """Give it back."""
        self.held.discard(lease.key)

    def holder_is_dead(self, key: str, generation: int) -> bool:
        """Nobody dies here."""
        return False


def measure_claims(num_stories: int, num_others: int = 1023) -> dict[str, object]:
    """Claim and commit every shot of a large job in one queue, with ``num_others`` shots always held by others."""
    chains = make_chains(num_stories)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        run.open()
        clock = time.perf_counter
        leases = LeasesInMemory()
        began = clock()
        graph = ShotGraph(chains)
        queue = ShotQueue(
            graph=graph, runs=[run], leases=[leases], settings=DispatchSettings(), job_id="benchmark", clock=clock
        )
        built = clock() - began
        leases.held |= {lease_key(chain[0]) for chain in chains[:num_others]}
        claims, scans, loaded = [], [], None
        started = clock()
        while True:
            began = time.thread_time()
            if queue.scan():
                scans.append(time.thread_time() - began)
            began = time.thread_time()
            claim = queue.claim(loaded)
            claims.append(time.thread_time() - began)
            if claim is None:
                break
            loaded = claim.shot.kind
            queue.release(claim, ShotState.COMMITTED)
        elapsed = clock() - started
    assert graph.count(ShotState.COMMITTED) == sum(len(chain) for chain in chains[num_others:])
    return {
        "shots": sum(map(len, chains)),
        "build s": round(built, 3),
        "claims": len(claims),
        "claim median ms": round(1e3 * statistics.median(claims), 3),
        "claim p99 ms": round(1e3 * statistics.quantiles(claims, n=100)[98], 3),
        "claim max ms": round(1e3 * max(claims), 3),
        "scan median ms": round(1e3 * statistics.median(scans), 2),
        "scans per s": round(len(scans) / elapsed, 2),
    }


if __name__ == "__main__":
    main()
