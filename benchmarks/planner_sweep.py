"""Is the layout that ``parallel=auto`` chooses the fastest one of all?

    python -m benchmarks.planner_sweep                                  # 2 and 4 gloo ranks, every layout, 3 rounds
    python -m benchmarks.planner_sweep --ranks 2 --rounds 1             # quick

Renders the same stories of the tiny model with every choice of axes and weights that the ranks can form, and with
``auto``, each as a job of its own under torchrun. Seconds are those between the start of the first shot and the end of
the last one, the best of all rounds; every round renders with all layouts, one after the other. ``auto`` should take at
most 1.1 times as long as the best one.
Ranks of one machine share its cores, so what is measured is a machine with slow links and few cores, not a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import make_parser, print_table, write_json
from storymem_dist.models.wan.presets import TINY
from storymem_dist.parallel.layout import layouts_for

QUIET = (
    "model=tiny",
    "memory.quality=none",
    "tracking.console.mode=off",
    "tracking.wandb.mode=off",
    "tracking.report=false",
    "tracking.system_interval_seconds=0",
    "parallel.device=cpu",
    "dispatch.poll_seconds=0.1",
)
AUTO = ("parallel=auto",)


def main() -> None:
    """Entry point."""
    args = _parse()
    rows = []
    for num_ranks in args.ranks:
        seconds, chosen = _measured(args, num_ranks)
        best = min(value for name, value in seconds.items() if name != "auto")
        for name, value in sorted(seconds.items(), key=lambda item: item[1]):
            rows.append(
                {"ranks": num_ranks, "layout": name, "seconds": round(value, 2), "/ best": round(value / best, 2)}
            )
        rows.append({"ranks": num_ranks, "layout": f"auto chose {chosen}", "seconds": "", "/ best": ""})
    print_table(rows)
    write_json(args.json, "planner_sweep", {"rows": rows}, torch.device("cpu"))


def _parse() -> argparse.Namespace:
    parser = make_parser("planner_sweep", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stories", type=int, default=3)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=3, default=[17, 96, 160], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    return parser.parse_args()


def _measured(args: argparse.Namespace, num_ranks: int) -> tuple[dict[str, float], str]:
    """Seconds of every layout and of ``auto``, and what ``auto`` chose."""
    seconds: dict[str, float] = {}
    chosen = ""
    with tempfile.TemporaryDirectory(prefix="planner-sweep-") as name:
        root = Path(name)
        _write_stories(root / "stories", args.stories, args.shots)
        for number in range(args.rounds):
            for layout, overrides in {**_layouts(num_ranks), "auto": AUTO}.items():
                run = root / f"{number}-{layout.replace(' ', '-')}"
                _render(root / "stories", run, args, num_ranks, overrides)
                events = _events(run)
                began = min(one["wall_time"] for one in events if one["event"] == "ShotStarted")
                taken = max(one["wall_time"] for one in events if one["event"] == "ShotFinished") - began
                seconds[layout] = min(taken, seconds.get(layout, taken))
                for one in events:
                    if one["event"] == "LayoutChosen":
                        chosen = f"{one['layout']}, weights {one['weights']} (predicted {one['total_seconds']:.2f} s)"
                print(f"{num_ranks} ranks, round {number + 1}, {layout}: {taken:.2f} s", file=sys.stderr, flush=True)
    return seconds, chosen


def _layouts(num_ranks: int) -> dict[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {}
    for axes in layouts_for(num_ranks, num_heads=TINY.t2v.num_heads):
        cfg, ring, ulysses = axes.axes
        for weights in ("replicated", "fsdp") if axes.ranks_per_replica > 1 else ("replicated",):
            given = [f"parallel.cfg={cfg}", f"parallel.ring={ring}", f"parallel.ulysses={ulysses}"]
            found[f"cfg {cfg} ring {ring} ulysses {ulysses} {weights}"] = [*given, f"parallel.weights={weights}"]
    return found


def _render(stories: Path, run: Path, args: argparse.Namespace, num_ranks: int, overrides: Sequence[str]) -> None:
    frames, height, width = args.size
    given = [f"stories.path='{stories}'", f"output='{run}'", f"sampler.num_inference_steps={args.steps}"]
    given += [f"sampler.num_frames={frames}", f"sampler.height={height}", f"sampler.width={width}"]
    start = ["launch=torchrun", f"launch.processes_per_node={num_ranks}"]
    subprocess.run(
        [sys.executable, "-m", "storymem_dist", *QUIET, *given, *start, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def _events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in run.glob("events/*.jsonl") for line in path.read_text().splitlines() if line]


def _write_stories(folder: Path, num_stories: int, num_shots: int) -> None:
    folder.mkdir()
    for number in range(num_stories):
        prompts = [f"story {number}, shot {index}" for index in range(num_shots)]
        scene = {"scene_num": 1, "video_prompts": prompts, "cut": [True] * num_shots}
        story = {"story_name": f"s{number}", "story_overview": "", "scenes": [scene]}
        (folder / f"s{number}.json").write_text(json.dumps(story))


if __name__ == "__main__":
    main()
