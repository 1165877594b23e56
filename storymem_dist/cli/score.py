"""``storymem-score``: scores run folders, and exports their clips for other programs.

Turns arguments into calls and scores into tables; ``evaluation`` does the work. A run that cannot be scored is one line
on standard error, and the others are scored.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from storymem_dist.artifacts.scores import SCORES_FILE, RunScores
from storymem_dist.cli.arguments import a_path
from storymem_dist.config.composing import compose_settings
from storymem_dist.config.schema import RenderConfig
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.evaluation.export import LAYOUTS, export_run
from storymem_dist.evaluation.tasks import Progress as Report
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.rich_console import SafeConsole
from storymem_dist.terminal.streams import print_error, print_line, print_lines

_SETTING = re.compile(r"(launch|evaluation)(\.\w+)*=")
_OVERRIDE = re.compile(r"[+~]{0,2}[\w/]+([.@]\w+)*=")
WANDB = ("auto", "online", "offline", "off")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``storymem-score``."""
    with program("storymem-score"):
        given = list(sys.argv[1:] if arguments is None else arguments)
        try:
            sys.exit(_export(given[1:]) if given[:1] == ["export"] else _score(given))
        except StoryMemError as error:
            print_error(f"storymem-score: error: {error}")
            sys.exit(error.exit_code)


def _score(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="storymem-score",
        description="Score run folders: ST-Bench's metrics, and measures that need no weights. Nothing is computed "
        "twice. `storymem-score export RUN OUT` puts the clips under the names that other programs read.",
        epilog="Settings: evaluation.viclip=FOLDER, evaluation.clip_l=FOLDER, evaluation.aesthetic=FOLDER, "
        "evaluation.device=auto|cpu|cuda; launch=torchrun starts one process per GPU of this node "
        "(launch.processes_per_node=N: that many).",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (output= of a render), or KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON instead of tables")
    parser.add_argument(
        "--wandb", choices=WANDB, default="auto", help="Weights & Biases runs get the scores: those fed before (auto)"
    )
    args = parser.parse_intermixed_args(arguments)
    overrides = [text for text in args.runs if _SETTING.match(text)]
    runs = [_run_folder(text) for text in args.runs if not _SETTING.match(text)]
    if not runs:
        parser.error("give a run folder")
    settings = compose_settings(overrides)
    num_processes = _num_processes(settings)

    from storymem_dist.evaluation.afterwards import show_scores
    from storymem_dist.evaluation.models import Models
    from storymem_dist.evaluation.ranks import RankProcesses, choose_device
    from storymem_dist.evaluation.scoring import score_run

    models = Models(settings.evaluation, choose_device(settings.evaluation))
    workers = RankProcesses(settings.evaluation, num_processes) if num_processes > 1 else None
    scored: list[tuple[Path, RunScores]] = []
    exit_code = 0
    for root in runs:
        try:
            with _bar(str(root)) as report:
                scores = score_run(root, models, workers=workers, progress=report)
        except StoryMemError as error:
            print_error(f"storymem-score: error: {error}")
            exit_code = exit_code or error.exit_code
            continue
        scored.append((root, scores))
        if fed := show_scores(root, report=False, wandb_mode=args.wandb, warn=_warn):
            print_error(f"storymem-score: Weights & Biases: {fed}")
    _print(scored, as_json=args.json)
    return exit_code


def _run_folder(text: str) -> Path:
    try:
        path = a_path(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(str(error)) from None
    if _OVERRIDE.match(text) and not os.path.lexists(path):
        raise ConfigError(f"{text}: no run folder has this name, and no setting: scoring has evaluation.* and launch.*")
    return path


def _num_processes(settings: RenderConfig) -> int:
    """Processes that ``launch`` asks for. Raises ``ConfigError`` for a launcher that scoring does not have."""
    import torch

    launch = settings.launch
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this process is one of the ranks that torchrun or accelerate started (WORLD_SIZE is set); start "
            "storymem-score directly, with launch=torchrun"
        )
    if launch.submits or launch.num_nodes > 1:
        what = f"launch={launch.mode}" if launch.submits else f"launch.num_nodes={launch.num_nodes}"
        raise ConfigError(f"{what}: scores are computed on one node; use launch=torchrun in a job of your own")
    if launch.mode == "inline":
        return 1
    on_gpus = settings.evaluation.device != "cpu" and torch.cuda.is_available()
    return launch.processes_per_node or (torch.cuda.device_count() if on_gpus else 1)


def _print(scored: Sequence[tuple[Path, RunScores]], *, as_json: bool) -> None:
    if as_json:
        print_lines(json.dumps({str(root): asdict(scores) for root, scores in scored}, indent=1).splitlines())
        return
    from storymem_dist.evaluation.table import notes, run_table, runs_table

    console = SafeConsole(highlight=False, markup=False)
    for root, scores in scored:
        console.print(run_table(root, scores))
        for note in notes(scores):
            console.print(note, soft_wrap=True)
        print_lines([str(root / SCORES_FILE), ""])
    if len(scored) > 1:
        console.print(runs_table(scored))


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    """Yield a function that shows the number of clips done on standard error; none on a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = SafeConsole(sys.stderr, markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"score {title}", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _warn(message: str) -> None:
    print_error(f"storymem-score: warning: {message}")


def _export(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="storymem-score export",
        description="Put the clips of a run into a folder under the names that another program reads: hard links, or "
        "copies on another file system. storymem_export.json says which file came from where.",
    )
    parser.add_argument("run", type=a_path, metavar="RUN", help="run folder")
    parser.add_argument("out", type=a_path, metavar="OUT", help="a new or empty folder, or an earlier export")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="storymem", help="default: storymem")
    args = parser.parse_args(arguments)
    done = export_run(args.run, args.out, args.layout)
    for sentence in done.left_out:
        _warn(sentence)
    copies = f", {done.num_copied} of them copies" if done.num_copied else ""
    print_line(f"{args.out}: {done.num_files} clips{copies}")
    return 0


if __name__ == "__main__":
    main()
