"""What does the planner say of known workloads, and how near to the bound is its dispatch?

    python -m benchmarks.planner_workloads
    python -m benchmarks.planner_workloads --only cards --devices h100_80g --gpus 32 64     # quick
    python -m benchmarks.planner_workloads --only consumer
    python -m benchmarks.planner_workloads --only entities

**cards**: 30 stories (300 shots, 7 to 12 a story, as ST-Bench has), 81 frames of 832x480 and 40 steps, on 1 to 64
devices of each kind, eight on a node. The bound is the least time that any fitting layout could take if shots could be
cut as one likes (``dispatch.merging.least_makespan``): all work divided by the devices, and the time that long stories
need, with what wider groups lose. Efficiency is the bound divided by the makespan of the best layout, with
``dispatch.elastic_tail`` off and auto. Loading is left out, since it says nothing about the order of shots.

**consumer**: 400 stories of six shots, on one node of eight RTX 5090 without NVLink.

**entities**: 140 stories with EntityBench's structure (``benchmarks.shot_workloads``), on 8, 64 and 512 H100, by rule
of the memory. "binds": whether the work of all shots or the longest story decides.

All times are predictions; nothing is rendered. Runs on one core.
"""

import time
from dataclasses import replace

import torch

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.shot_workloads import entitybench_stories, make_chains, make_story, planned
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.hardware import GIB
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.settings import AUTO, ParallelSettings
from storymem_dist.planner.hardware import Hardware, known_hardware, known_names
from storymem_dist.planner.memory import PARTS
from storymem_dist.planner.plan import Plan, PlanJob, make_plan
from storymem_dist.planner.words import layout_of
from storymem_dist.weights.settings import ModelSettings

PARTS_OF_BENCHMARK = ("cards", "consumer", "entities")
FREE = ParallelSettings(cfg=AUTO, ring=AUTO, ulysses=AUTO, weights=AUTO)
_PER_NODE = 8
_NO_LOADING = 1e5  # GB/s
_DAY = 24 * 3600.0


def main() -> None:
    """Plan, print and write."""
    parser = make_parser("planner_workloads", __doc__)
    parser.add_argument("--only", choices=PARTS_OF_BENCHMARK, nargs="+", default=PARTS_OF_BENCHMARK)
    parser.add_argument("--devices", nargs="+", default=known_names(), help="for cards: entries of conf/hardware")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8, 16, 24, 32, 64], help="for cards")
    arguments = parser.parse_args()
    tables: dict[str, object] = {}
    if "cards" in arguments.only:
        stories = make_chains(30)
        rows = [card(device, number, stories) for device in arguments.devices for number in arguments.gpus]
        tables["cards"] = _printed(rows)
    if "consumer" in arguments.only:
        tables["consumer"] = _printed(consumer())
    if "entities" in arguments.only:
        rules = ("window", "entities", "anchored")
        tables["entities"] = _printed([entities(number, rule) for rule in rules for number in (8, 64, 512)])
    write_json(arguments.json, "planner_workloads", tables, torch.device("cpu"))


def _printed(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    print_table(rows)
    print()
    return rows


def hardware_of(device: str, num_gpus: int) -> Hardware:
    """``num_gpus`` devices, eight on a node."""
    per_node = min(_PER_NODE, num_gpus)
    return replace(known_hardware(device), nodes=num_gpus // per_node, gpus_per_node=per_node)


def plan_of(
    stories: list[tuple[PlannedShot, ...]],
    hardware: Hardware,
    *,
    elastic_tail: str = "off",
    memory: MemorySettings | None = None,
    parallel: ParallelSettings = FREE,
) -> Plan:
    """The plan of A14B at 81 frames of 832x480 in 40 steps."""
    job = PlanJob(
        stories=stories,
        sampler=SamplerSettings(),
        model=ModelSettings(),
        dit_config=WAN22_A14B.i2v,
        memory=memory or MemorySettings(),
        dispatch=DispatchSettings(elastic_tail=elastic_tail),
    )
    return make_plan(job, hardware, parallel)


def card(device: str, num_gpus: int, stories: list[tuple[PlannedShot, ...]]) -> dict[str, object]:
    """30 stories on ``num_gpus`` of one kind: makespan and bound, with and without an elastic tail."""
    hardware = replace(hardware_of(device, num_gpus), read_gb_per_s=_NO_LOADING)
    whole = replace(FREE, ring=1, weights="replicated")  # the others are never better here, and the table takes minutes
    off, auto = (plan_of(stories, hardware, elastic_tail=one, parallel=whole) for one in ("off", "auto"))
    assert off.best is not None and auto.best is not None, f"{device}: {off.reasons}"
    bound = min(option.bound_seconds for option in auto.options if option.fits)
    return {
        "hardware": device,
        "GPUs": num_gpus,
        "bound h": round(bound / 3600, 3),
        "off h": round(off.best.makespan_seconds / 3600, 3),
        "off": round(bound / off.best.makespan_seconds, 3),
        "layout, off": layout_of(off.best),
        "auto h": round(auto.best.makespan_seconds / 3600, 3),
        "auto": round(bound / auto.best.makespan_seconds, 3),
        "layout, auto": layout_of(auto.best),
    }


def consumer() -> list[dict[str, object]]:
    """400 stories of six shots on eight RTX 5090: the best layouts, in days, and the memory of a rank."""
    stories = planned([make_story(number, 6) for number in range(400)])
    plan = plan_of(stories, hardware_of("rtx5090_32g", 8))
    rows = []
    for option in [one for one in plan.options if one.fits][:6]:
        memory = option.worst.memory
        rows.append(
            {
                "layout": layout_of(option),
                "step s": round(option.phases[-1].step_seconds, 2),
                "shot s": round(option.phases[-1].shot_seconds),
                "days": round(option.makespan_seconds / _DAY, 2),
                "simulated": option.simulated,
                "clips per GPU-hour": round(option.clips_per_gpu_hour, 3),
                **{f"{part} GiB": round(getattr(memory, part) / GIB, 1) for part in PARTS},
                "host GiB a node": round(memory.on_host * plan.hardware.gpus_per_node / GIB),
            }
        )
    return rows


def entities(num_gpus: int, rule: str) -> dict[str, object]:
    """EntityBench's structure on ``num_gpus`` H100 by rule of the memory."""
    memory = MemorySettings(recall=rule)
    stories = planned(entitybench_stories(), memory)
    began = time.process_time()
    plan = plan_of(stories, hardware_of("h100_80g", num_gpus), memory=memory)
    seconds = time.process_time() - began
    best = plan.best
    assert best is not None, plan.reasons
    return {
        "memory": rule,
        "GPUs": num_gpus,
        "shots": plan.num_shots,
        "layout": layout_of(best),
        "hours": round(best.makespan_seconds / 3600, 2),
        "bound h": round(best.bound_seconds / 3600, 2),
        "idle": round(best.idle_share, 3),
        "clips per GPU-hour": round(best.clips_per_gpu_hour, 2),
        "binds": plan.reasons[0].split(":")[0],
        "planned in s": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
