"""How much time does sharing out the shots lose, in replicas that wait and in claims?

    python -m benchmarks.dispatch
    python -m benchmarks.dispatch --replicas 8 --large-replicas 0 --claim-stories 300      # quick
    python -m benchmarks.dispatch --graphs                                                 # only the third table
    python -m benchmarks.dispatch --first-shot 500                                         # only the fourth table

**Makespan.** The project's own choice (``choose_shot``) drives simulated replicas over 30 stories (300 shots, 7 to 12
per story, as ST-Bench has) and over 3,000 stories. The cost model gives the time of a shot for its number of memory
keyframes; a clip without memory takes 326.9 s (one H100). A save takes ``--save-ratio`` of that time. The default is
for one GPU and 40 steps at 832x480: 2.8 s (``benchmarks.outside_denoise``). On eight GPUs the ratio is 0.07.

"in turn": a replica saves a shot, then it begins the next shot (``dispatch.overlap_saving=false``). "overlapped": a
replica renders a shot of another story while it saves one. It waits where ``choose_shot`` asks for it. It also waits
when a second shot is rendered and the first is not saved yet. In both cases a shot must be saved before the next shot
of its story can begin.

Efficiency is the bound divided by the makespan. No order of shots can beat the bound, even with overlapped saves. The
bound is the longest of three times: all rendering divided by the replicas, plus one save; all saves divided by the
replicas; the longest story with its saves. "stories" is for comparison: the next free replica gets a whole story, the
longest story first, and saves in turn. "with swaps" has overlapped saves; each replica loses ``--swap-seconds`` each
time it loads other experts, also for its first experts.

**Claims.** The real queue runs with leases in memory: every claim, commit and scan of a job of 30,000 shots. The times
are processor time of this thread, so waiting for the file system does not count.

**Graphs** (``--graphs``). The same replicas over stories whose shots do not all need each other, by the rule of the
memory: one story of 12 cuts; 300 stories whose shots name what they recall; 140 stories with the structure of
EntityBench (arXiv 2605.15199), continuations kept. "longest paths" adds up, over all stories, the shots that can only
be rendered one after the other. "entities, first" leaves out the latest appearances (``memory.num_fixed=10``).

**First shot.** A real job of the tiny model in this process, with N stories of ten shots: seconds from its start (after
the imports) to its first shot, and the prompts that it encoded before. "all first" encodes every prompt before the
first shot, for comparison.
"""

import heapq
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.shot_workloads import entitybench_stories, make_chains, make_story, mixed_stories, planned
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.config.composing import register_schema, to_plain, to_settings
from storymem_dist.config.points import Point
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.leases import Lease, LeaseFolder
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.dispatch.scanning import lease_key
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.observe.run.values import levels
from storymem_dist.planner.simulation import simulate, work_of
from storymem_dist.planner.tail import Times
from storymem_dist.render import prompts as prompts_module
from storymem_dist.render.job import render_job
from storymem_dist.render.shot import StoryShotRenderer
from storymem_dist.resources import config_folder

H100_SECONDS_PER_CLIP = 326.9


def main() -> None:
    """Simulate, measure, print and write."""
    parser = make_parser("dispatch", __doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8, 12, 16, 20, 24, 28, 32, 256])
    parser.add_argument("--large-replicas", type=int, default=1024, help="replicas for 3,000 stories; 0 skips these")
    parser.add_argument("--swap-seconds", type=float, default=60.0)
    parser.add_argument(
        "--save-ratio", type=float, default=0.0086, help="time of a save divided by the time of the shortest clip"
    )
    parser.add_argument("--claim-stories", type=int, default=3000, help="stories of the job that claims are timed on")
    parser.add_argument("--graphs", action="store_true", help="only stories whose shots do not all need each other")
    parser.add_argument("--first-shot", type=int, default=0, metavar="N", help="only time the start of N stories")
    arguments = parser.parse_args()
    if arguments.first_shot:
        starts = [time_to_first_shot(arguments.first_shot, all_first=all_first) for all_first in (False, True)]
        print_table(starts)
        write_json(arguments.json, "dispatch", {"first shot": starts}, torch.device("cpu"))
        return

    save_seconds = arguments.save_ratio * H100_SECONDS_PER_CLIP
    if arguments.graphs:
        graphs = compare_graphs(arguments.swap_seconds, save_seconds)
        print_table(graphs)
        write_json(arguments.json, "dispatch", {"graphs": graphs}, torch.device("cpu"))
        return
    cases = [(30, replicas) for replicas in arguments.replicas]
    if arguments.large_replicas:
        cases.append((3000, arguments.large_replicas))
    rows = [_compare(*case, arguments.swap_seconds, save_seconds) for case in cases]
    print_table(rows)
    claims = measure_claims(arguments.claim_stories)
    print()
    print_table([claims])
    write_json(arguments.json, "dispatch", {"makespan": rows, "claims": claims}, torch.device("cpu"))


# -- graphs ------------------------------------------------------------------------------------------------------------

RULES = {
    "window": MemorySettings(),
    "entities": MemorySettings(recall="entities"),
    "entities, first": MemorySettings(recall="entities", num_fixed=10),
    "anchored": MemorySettings(recall="anchored"),
}


def compare_graphs(swap_seconds: float, save_seconds: float) -> list[dict[str, object]]:
    """Makespan and bound of stories whose shots do not all need each other, by rule of the memory and replicas."""
    one, mixed, cast = [make_story(0, 12)], mixed_stories(300), entitybench_stories()
    cases = [("one story of 12", one, rule, [1, 2, 4, 8]) for rule in ("window", "anchored")]
    cases.append(("300 mixed", mixed, "window", [8, 16, 32, 64]))
    cases += [("EntityBench's", cast, rule, [1, 2, 4, 8, 16, 32, 64]) for rule in RULES]
    rows = []
    seconds = H100_SECONDS_PER_CLIP / CostModel().shot_tflop(0)
    for name, stories, rule, counts in cases:
        shots = planned(stories, RULES[rule])
        for replicas in counts:
            bound = shortest_possible(shots, replicas, seconds, save_seconds)
            makespan, _ = share(shots, replicas, seconds, save_seconds, swap_seconds=0.0)
            swapped, loads = share(shots, replicas, seconds, save_seconds, swap_seconds=swap_seconds)
            rows.append(
                {
                    "stories": name,
                    "memory": rule,
                    "shots": sum(map(len, shots)),
                    "longest paths": sum(max(levels([shot.waits_for for shot in one])) + 1 for one in shots),
                    "replicas": replicas,
                    "bound h": round(bound / 3600, 3),
                    "makespan h": round(makespan / 3600, 3),
                    "efficiency": round(bound / makespan, 3),
                    "with swaps h": round(swapped / 3600, 3),
                    "loads per replica": round(loads / replicas, 2),
                }
            )
    return rows


# -- makespan ----------------------------------------------------------------------------------------------------------


def _compare(num_stories: int, num_replicas: int, swap_seconds: float, save_seconds: float) -> dict[str, object]:
    chains = make_chains(num_stories)
    seconds = H100_SECONDS_PER_CLIP / CostModel().shot_tflop(0)
    work = [seconds * sum(shot.cost for shot in chain) for chain in chains]
    lengths = [length + save_seconds * len(chain) for length, chain in zip(work, chains, strict=True)]
    bound = shortest_possible(chains, num_replicas, seconds, save_seconds)

    def run(*, swap_seconds: float, overlap: bool) -> tuple[float, int]:
        return share(chains, num_replicas, seconds, save_seconds, swap_seconds=swap_seconds, overlap=overlap)

    in_turn, _ = run(swap_seconds=0.0, overlap=False)
    overlapped, _ = run(swap_seconds=0.0, overlap=True)
    swapped, loads = run(swap_seconds=swap_seconds, overlap=True)
    whole = story_level(lengths, num_replicas)
    return {
        "stories": num_stories,
        "replicas": num_replicas,
        "bound h": round(bound / 3600, 3),
        "in turn h": round(in_turn / 3600, 3),
        "in turn efficiency": round(bound / in_turn, 3),
        "overlapped h": round(overlapped / 3600, 3),
        "overlapped efficiency": round(bound / overlapped, 3),
        "with swaps h": round(swapped / 3600, 3),
        "loads per replica": round(loads / num_replicas, 2),
        "stories h": round(whole / 3600, 3),
        "stories efficiency": round(bound / whole, 3),
    }


def share(
    stories: Sequence[Sequence[PlannedShot]],
    num_replicas: int,
    seconds_per_tflop: float,
    save_seconds: float,
    *,
    swap_seconds: float,
    overlap: bool = True,
) -> tuple[float, int]:
    """Return the makespan in seconds and the number of times that experts were loaded, by the planner's simulation."""
    found = simulate(
        stories,
        num_replicas,
        lambda shot: Times(render=seconds_per_tflop * shot.cost, save=save_seconds),
        swap_seconds=swap_seconds,
        overlap=overlap,
    )
    return found.makespan, found.num_loads


def shortest_possible(
    stories: Sequence[Sequence[PlannedShot]], num_replicas: int, seconds_per_tflop: float, save_seconds: float
) -> float:
    """Return a bound in seconds that no order of shots can beat."""
    one_each = [1] * len(stories)
    work = work_of(stories, one_each, lambda shot: Times(render=seconds_per_tflop * shot.cost, save=save_seconds))
    return work.shortest_possible(num_replicas)


def story_level(lengths: Sequence[float], num_replicas: int) -> float:
    """Makespan when the next free replica gets a whole story, the longest story first."""
    free = [0.0] * num_replicas
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(free, free[0] + length)
    return max(free)


# -- claims ------------------------------------------------------------------------------------------------------------


class LeasesInMemory(LeaseFolder):
    """Keeps leases in memory, so the benchmark measures the queue and not the file system."""

    def __init__(self, num_alive: int) -> None:
        super().__init__(folder=Path("unused"), owner=Owner.this_process(), lease_seconds=60.0)
        self.num_alive = num_alive
        self.held: set[str] = set()

    def scan(self) -> dict[str, int]:
        """All keys."""
        return dict.fromkeys(self.held, 0)

    def try_claim(self, key: str, known_generation: int | None = None) -> Lease | None:
        """Take a free key."""
        if key in self.held:
            return None
        self.held.add(key)
        return Lease(key=key, generation=0)

    def release(self, lease: Lease) -> None:
        """Free the key."""
        self.held.discard(lease.key)

    def holder_is_dead(self, key: str, generation: int) -> bool:
        """No holder dies here."""
        return False


def measure_claims(num_stories: int) -> dict[str, object]:
    """Claim and commit every shot of a large job in one queue; other replicas hold a shot each and keep it."""
    chains = make_chains(num_stories)
    num_others = min(1023, num_stories // 2)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        run.open()
        clock = time.perf_counter
        leases = LeasesInMemory(num_alive=num_others + 1)
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
            queue.release(claim, ShotStatus.COMMITTED)
        elapsed = clock() - started
    assert graph.count(ShotStatus.COMMITTED) == sum(len(chain) for chain in chains[num_others:])
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


# -- first shot --------------------------------------------------------------------------------------------------------


class _FirstShot(Exception):
    """The job has come to its first shot."""


def time_to_first_shot(num_stories: int, *, all_first: bool) -> dict[str, object]:
    """Start a job of ``num_stories`` stories of ten shots, and end it at its first shot."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as changes:
        root = Path(name)
        (root / "stories").mkdir()
        for number in range(num_stories):
            prompts = [f"story {number}, shot {index}" for index in range(10)]
            scene = {"scene_num": 1, "video_prompts": prompts, "cut": [True] * 10}
            story = {"story_name": f"s{number}", "story_overview": "", "scenes": [scene]}
            (root / "stories" / f"s{number:04d}.json").write_text(json.dumps(story))
        quiet = ["tracking.console.mode=off", "tracking.wandb.mode=off", "tracking.report=false", "parallel.device=cpu"]
        register_schema()
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            paths = [f"stories.path='{root / 'stories'}'", f"output='{root / 'run'}'"]
            config = compose("render", overrides=["model=tiny", "memory.quality=none", *quiet, *paths])
        changes.enter_context(patch.object(StoryShotRenderer, "_request", side_effect=_FirstShot))
        if all_first:
            changes.enter_context(patch.object(prompts_module, "FIRST_PER_RANK", 10 * num_stories))
        point = Point(settings=to_settings(config), plain=to_plain(config))
        began = time.monotonic()
        with suppress(_FirstShot):
            render_job([point])
        return {
            "stories": num_stories,
            "prompts": "all first" if all_first else "as needed",
            "to the first shot s": round(time.monotonic() - began, 1),
            "encoded before it": len(list((root / "run" / "cache" / "prompts").rglob("*.safetensors"))),
        }


if __name__ == "__main__":
    main()
