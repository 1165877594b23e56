"""``storymem-plan``: memory and time of a job on given hardware, before anything is rendered. Needs no GPU.

Takes the overrides of ``storymem-render`` and writes nothing into run folders. ``storymem-plan calibrate`` measures
this machine for later plans.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from storymem_dist.cli.arguments import a_path
from storymem_dist.config.points import Point, compose_point
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.errors import ConfigError, ExtraNotInstalled, StoryboardError, StoryMemError, WeightsNotFound
from storymem_dist.files import write_bytes
from storymem_dist.launch.forecast import hardware_of
from storymem_dist.memory.scorers import HPSV3_BYTES
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.links import link_rate
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.calibration import Constants, load_constants
from storymem_dist.planner.hardware import Hardware, complete
from storymem_dist.planner.job import PlanJob, sketch_stories
from storymem_dist.planner.measuring import calibrate
from storymem_dist.planner.page import plan_page
from storymem_dist.planner.plan import Plan
from storymem_dist.planner.words import (
    MEMORY_HEADS,
    TIME_HEADS,
    as_json,
    memory_rows,
    rejected_lines,
    shown_options,
    summary,
    time_row,
)
from storymem_dist.render.check import check_job
from storymem_dist.render.choice import plan_with
from storymem_dist.render.inputs import choose_stories
from storymem_dist.render.planning import plan_job, untouched_part
from storymem_dist.render.prompts import shots_left
from storymem_dist.story.loading import load_storyboards
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.rich_console import SafeConsole
from storymem_dist.terminal.streams import print_error, print_line, print_lines
from storymem_dist.terminal.text import printable

_SHOWN, _SHOWN_REJECTED = 8, 6
_PLAIN_WIDTH = 400  # a file or a pipe has no width
_COMPARED_UP_TO = 5000  # shots of a job for which the elastic tail is tried as well

CALIBRATE = "calibrate"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``storymem-plan``."""
    with program("storymem-plan"):
        sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="storymem-plan",
        description="Plan a job: which layouts fit, how long it takes, what it costs. Needs no GPU.",
        epilog="Overrides are those of storymem-render, for example: "
        "storymem-plan stories=examples hardware=h100_80g hardware.nodes=2. "
        "`storymem-plan calibrate` measures this machine, a few seconds long, for later plans; started by torchrun, it "
        "measures the links between its ranks, too.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the job to plan, or: calibrate")
    parser.add_argument("--all", action="store_true", help="show every layout, not only the first ones")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=_a_path_or_dash,
        help="write the whole plan as JSON; - prints it instead of tables",
    )
    parser.add_argument("--html", metavar="FILE", type=a_path, help="write the plan as one HTML page")
    args = parser.parse_intermixed_args(arguments)
    try:
        if args.overrides[:1] == [CALIBRATE]:
            return _calibrate(args.overrides[1:])
        point = compose_point(args.overrides)
        plan, notes = _plan(point)
        if isinstance(args.json, Path):
            _write(args.json, json.dumps(as_json(plan), indent=1))
        if args.html is not None:
            _write(args.html, plan_page(plan))
    except StoryMemError as error:
        print_error(f"storymem-plan: error: {error}")
        return error.exit_code
    if args.json == "-":
        print_lines(json.dumps(as_json(plan), indent=1).splitlines())
    else:
        _print(plan, notes, everything=args.all)
    return 0 if plan.best is not None else ConfigError.exit_code


def _a_path_or_dash(text: str) -> Path | str:
    return text if text == "-" else a_path(text)


def _calibrate(overrides: Sequence[str]) -> int:
    if overrides:
        raise ConfigError(f"calibrate takes no overrides, but got {' '.join(overrides)}; it measures this machine")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with start_session(ParallelSettings(cfg=1, ring=1, ulysses=ranks, weights="replicated")) as session:
        rate = link_rate(session.mesh.sequence, session.device)
        found = session.leader_decides(lambda: calibrate(session.device, link_rate=rate))
        if session.rank == 0:
            print_line(str(found))
    return 0


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # a new file would replace a device or a pipe
        raise ConfigError(f"{path} cannot be written: it is a folder, a device or a pipe; give another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode(errors="backslashreplace"), durable=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; give another file") from None


# -- the plan ----------------------------------------------------------------------------------------------------------


def _plan(point: Point) -> tuple[Plan, list[str]]:
    """The plan of a job, and what a reader should know of how it came about."""
    settings = point.settings
    hardware = hardware_of(settings) or complete(settings.hardware)
    notes: list[str] = []
    elsewhere = replace(settings, launch=replace(settings.launch, mode="slurm"))  # this machine's memory says nothing
    try:
        job = _checked_job(replace(point, settings=elsewhere), notes)
    except (WeightsNotFound, ExtraNotInstalled) as error:
        missing = str(error).splitlines()[0].rstrip(".:")
        notes.append(f"sizes are those of Wan2.2-A14B, and nothing counts as rendered yet: {missing}")
        job = _sketched_job(point, notes)
    constants = load_constants(hardware)
    plan = plan_with(job, hardware, settings.parallel, constants)
    if plan.best is None and hardware.memory_bytes is None:
        notes.append("this machine has no GPU; name what the job will run on, such as hardware=h100_80g")
    if hint := _elastic_hint(job, hardware, settings.parallel, constants, plan):
        notes.append(hint)
    return plan, notes


def _checked_job(point: Point, notes: list[str]) -> PlanJob:
    checked = check_job([point])
    for batch in checked.batches:
        notes += [f"refused: {one.message}" for one in batch.rejected]
        notes += [f"warning: {one}" for one in batch.all_warnings]
    rerender = point.settings.dispatch.rerender
    part = untouched_part(point, checked.batches[0], checked.weights, rerender)
    return plan_job([point], checked, shots_left([part]))


def _sketched_job(point: Point, notes: list[str]) -> PlanJob:
    """The job from storyboards and sizes of Wan2.2-A14B alone."""
    settings = point.settings
    batch = choose_stories(load_storyboards(settings.stories.paths()), settings.stories)
    if not batch.stories:
        raise StoryboardError("no storyboard can be planned: " + "; ".join(one.message for one in batch.rejected))
    notes += [f"refused: {one.message}" for one in batch.rejected]
    sampler, memory = settings.sampler, settings.memory
    cost = CostModel(
        num_frames=sampler.num_frames,
        height=sampler.height,
        width=sampler.width,
        num_inference_steps=sampler.num_inference_steps,
        passes_per_step=sampler.passes_per_step,
        max_keyframes=memory.max_keyframes,
    )
    return PlanJob(
        stories=sketch_stories(batch.stories, sampler, memory, cost),
        sampler=sampler,
        model=settings.model,
        dit_config=WAN22_A14B.i2v,
        memory=memory,
        dispatch=settings.dispatch,
        scorer_bytes=HPSV3_BYTES if memory.quality == "hpsv3" else 0,
    )


def _elastic_hint(
    job: PlanJob, hardware: Hardware, parallel: ParallelSettings, constants: Constants, plan: Plan
) -> str:
    """What an elastic tail would change, where it is off and there is time to find out."""
    best = plan.best
    if best is None or job.dispatch.elastic_tail != "off" or job.num_shots > _COMPARED_UP_TO:
        return ""
    elastic = replace(job, dispatch=replace(job.dispatch, elastic_tail="auto"))
    other = plan_with(elastic, hardware, parallel, constants).best
    if other is None or not other.elastic or other.makespan_seconds > 0.99 * best.makespan_seconds:
        return ""
    saved = 1.0 - other.makespan_seconds / best.makespan_seconds
    return f"dispatch.elastic_tail=auto would end the job {100 * saved:.0f} % sooner"


# -- output ------------------------------------------------------------------------------------------------------------


def _print(plan: Plan, notes: Sequence[str], *, everything: bool) -> None:
    many = len(plan.options)
    options = list(plan.options) if everything else shown_options(plan, fitting=_SHOWN, others=_SHOWN_REJECTED)
    price = plan.hardware.price_per_gpu_hour
    fitting = [option for option in options if option.fits]
    if fitting:
        heads = [*TIME_HEADS, *(["cost"] if price is not None else [])]
        _print_table("time", heads, [time_row(option, price) for option in fitting])
    _print_table("memory of a rank, GiB", MEMORY_HEADS, [row for option in options for row in memory_rows(option)])
    print_lines(printable(line) for line in rejected_lines(options))
    if len(options) < many:
        print_line(f"{len(options)} of {many} options are shown; --all shows the others")
    print_line()
    print_lines(printable(line) for line in [*summary(plan), *notes])


def _print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = SafeConsole(highlight=False)
    if not console.is_terminal:
        console = SafeConsole(highlight=False, width=_PLAIN_WIDTH, no_color=True)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


if __name__ == "__main__":
    main()
