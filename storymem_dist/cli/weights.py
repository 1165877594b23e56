"""``storymem-weights``: download, verify, inspect and prepare weights from a terminal.

Turns arguments into calls and results into tables; ``weights`` does the work. A user's mistake becomes one line on
standard error and an exit code.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from storymem_dist.cli.arguments import a_path
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE
from storymem_dist.resources import PACKAGE_FOLDER
from storymem_dist.story.modes import CONTINUATIONS, MI2V, T2V
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.rich_console import SafeConsole
from storymem_dist.terminal.streams import print_error, print_line, print_lines
from storymem_dist.terminal.text import printable
from storymem_dist.weights.checkpoints import IN_DIMS, dit_shapes, open_checkpoint
from storymem_dist.weights.hub import Hub, Source, check_space, download, plan_download, read_state, verify_hashes
from storymem_dist.weights.inspection import Facts, inspect_weights, kind_of
from storymem_dist.weights.lora import SCALE_RULES, LoraSettings, ScaledLora, lora_settings, open_loras, storymem_lora
from storymem_dist.weights.prepare import prepare_checkpoint
from storymem_dist.weights.prepared import STORED_DTYPES, check_files
from storymem_dist.weights.single_files import CheckpointFiles
from storymem_dist.weights.web_file import WebFiles

DEFAULT_NAMES = ("t2v", "i2v", "storymem")
"""The minimum that a renderer needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One entry of ``storymem_dist/weights/published.yaml``.

    ``files`` are patterns of the paths that are fetched (none: all), ``also`` names of entries that come with it.
    ``address``: that of a file which lies on no hub, with ``{repo}``, ``{revision}`` and ``{path}`` in it.
    """

    repo: str
    revision: str
    folder: str
    num_bytes: int | None
    purpose: str
    files: Sequence[str] = ()
    also: Sequence[str] = ()
    address: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``storymem-weights``."""
    with program("storymem-weights"):
        args = _parser().parse_args(arguments)
        try:
            args.run(args)
        except StoryMemError as error:
            print_error(f"storymem-weights: error: {error}")
            sys.exit(error.exit_code)
        except OSError as error:
            print_error(f"storymem-weights: error: {error}")
            sys.exit(StoryMemError.exit_code)


def published_weights(path: Path | None = None) -> dict[str, Published]:
    """Return the download list, by name. Raises ``ConfigError`` when an entry lacks a key or has an unknown one."""
    path = path or PACKAGE_FOLDER / "weights" / "published.yaml"
    values = yaml.safe_load(path.read_text())
    try:
        return {name: Published(**entry) for name, entry in values.items()}
    except (TypeError, AttributeError) as error:
        allowed = ", ".join(one.name for one in fields(Published))
        raise ConfigError(f"{path}: {error}; the keys of an entry are: {allowed}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="storymem-weights", description="Get, check and prepare weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fetch = commands.add_parser("download", help="fetch published weights; continues an interrupted download")
    fetch.add_argument("names", nargs="*", metavar="NAME", help=f"what to fetch (default: {' '.join(DEFAULT_NAMES)})")
    fetch.add_argument("--to", type=a_path, default=Path("weights"), help="folder for all of them (default: weights)")
    fetch.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="only these files, e.g. '*_noise_model/*'")
    fetch.add_argument("--dry-run", action="store_true", help="print what would be fetched, and check that it fits")
    fetch.add_argument("--endpoint", help="a mirror's URL (default: HF_ENDPOINT, else huggingface.co)")
    fetch.add_argument("--revision", help="a branch, tag or commit instead of the pinned one")
    fetch.add_argument("--workers", type=int, default=4, help="files at a time (default: 4)")
    fetch.set_defaults(run=_download)

    verify = commands.add_parser("verify", help="check files, sizes, index and keys")
    verify.add_argument("paths", nargs="+", type=a_path, metavar="PATH")
    verify.add_argument("--hashes", action="store_true", help="read every file and compare its hash (minutes)")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser("inspect", help="print what a file or folder is")
    inspect.add_argument("path", type=a_path)
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)

    prepare = commands.add_parser("prepare", help="merge LoRAs and cast once, for fast starts")
    prepare.add_argument("checkpoint", type=a_path, help="a base model's folder")
    prepare.add_argument("output", type=a_path, help="the new folder")
    prepare.add_argument("--storymem-lora", type=a_path, help="folder of the StoryMem LoRAs (I2V base model only)")
    prepare.add_argument(
        "--storymem-scale-rule", choices=SCALE_RULES, default="rslora", help="rule of that LoRA (default: rslora)"
    )
    prepare.add_argument("--continuation", choices=CONTINUATIONS, default=MI2V, help="default: mi2v")
    prepare.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[,KEY=VALUE]",
        help="a further LoRA; keys: scale_rule, strength, alpha, expert, unmatched; may be repeated",
    )
    prepare.add_argument("--kind", choices=tuple(IN_DIMS), help="which base model, if the folder holds both")
    for name in CheckpointFiles.names():
        what = "one expert's file" if name in EXPERTS else f"the {name.replace('_', ' ')}"
        prepare.add_argument(f"--{name.replace('_', '-')}", type=a_path, help=f"{what}, instead of the folder's")
    prepare.add_argument("--dtype", choices=STORED_DTYPES, default="bfloat16", help="default: bfloat16")
    prepare.set_defaults(run=_prepare)
    return parser


def _download(args: argparse.Namespace) -> None:
    console, known, hub = SafeConsole(markup=False), published_weights(), Hub(args.endpoint)
    asked = args.names or DEFAULT_NAMES
    for name in asked:
        if name not in known:
            raise ConfigError(f"download {name}: unknown; known are: {', '.join(known)}")
    plans, sources = {}, dict[str, Source]()
    for name in dict.fromkeys(one for wanted in asked for one in (wanted, *known[wanted].also)):
        entry = known[name]
        revision = args.revision if args.revision and name in asked else entry.revision
        root = args.to / entry.folder
        sources[name] = WebFiles(entry.address, entry.files) if entry.address else hub
        plans[name] = plan_download(
            sources[name],
            entry.repo,
            revision,
            root,
            files=entry.files,
            only=args.only if name in asked else (),
            expected_bytes=entry.num_bytes if revision == entry.revision else None,
        )
    table = Table("name", "repository", "commit", "files left", "to fetch", "folder", title=hub.endpoint)
    for name, plan in plans.items():
        gigabytes = f"{plan.num_bytes_to_fetch / 1e9:.2f} GB"
        files, root = str(len(plan.files)), printable(plan.root)
        table.add_row(name, plan.state.repo, plan.state.commit[:12], files, gigabytes, root)
    console.print(table)
    for plan in plans.values():
        check_space(plan)
    if args.dry_run:
        return
    for name, plan in plans.items():
        with _bytes_bar(f"download {name}", console) as (on_total, on_done):
            on_total(plan.num_bytes_to_fetch)
            download(sources[name], plan, num_workers=args.workers, on_bytes=on_done)
        if name in ("t2v", "i2v") and not args.only:
            open_checkpoint(plan.root, name)
        print_line(f"{name}: complete and checked in {plan.root}")


def _verify(args: argparse.Namespace) -> None:
    for path in args.paths:
        facts = inspect_weights(path)
        print_line(f"{path}: {facts['what']}: files, sizes, index and keys are right")
        if not args.hashes or path.is_file():
            continue
        state = read_state(path)
        if facts.get("layout") == "prepared":
            manifest = open_checkpoint(path, kind_of(path)).prepared
            assert manifest is not None
            check_files(path, manifest, hashes=True)
            print_line(f"{path}: {len(manifest.files)} hashes are right")
        elif state is None:
            raise ConfigError(
                f"{path}: no hashes are known; only folders that storymem-weights downloaded or prepared have them"
            )
        else:
            absent = verify_hashes(path, state, lambda file: print_line(f"  {file.path}"))
            print_line(f"{path}: {len(state.files) - len(absent)} hashes are right, {len(absent)} files are missing")


def _inspect(args: argparse.Namespace) -> None:
    facts = inspect_weights(args.path)
    if args.json:
        print_lines(json.dumps(facts, indent=2).splitlines())
        return
    table = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None)
    for key, value in _rows(facts):
        table.add_row(printable(key), "\n".join(map(printable, value.split("\n"))))
    SafeConsole(soft_wrap=True, markup=False).print(table)


def _prepare(args: argparse.Namespace) -> None:
    console = SafeConsole(soft_wrap=True)
    files = CheckpointFiles(**{name: getattr(args, name) for name in CheckpointFiles.names()})
    kind = args.kind or kind_of(files.high_noise or args.checkpoint)
    checkpoint = open_checkpoint(args.checkpoint, kind, files)
    further, shapes = [_lora_settings(text) for text in args.lora], dit_shapes(checkpoint.dit_config)
    loras: dict[str, list[ScaledLora]] = {expert: open_loras(further, expert, shapes) for expert in EXPERTS}
    folder = None
    if args.storymem_lora is not None:
        if kind == T2V:
            raise ConfigError("--storymem-lora: the StoryMem LoRA belongs to the I2V base model; this one is T2V")
        storymem = storymem_lora(args.storymem_lora, args.continuation, scale_rule=args.storymem_scale_rule)
        folder = storymem[HIGH_NOISE].file.path.resolve().parent.name
        loras = {expert: [storymem[expert], *loras[expert]] for expert in EXPERTS}
    for expert in EXPERTS:
        for lora in loras[expert]:
            print_line(f"{expert}: {lora.summary()}")
    with _bytes_bar("prepare", console) as (on_total, on_done):
        totals: dict[str, int] = {}

        def progress(expert: str, done: int, total: int) -> None:
            if expert not in totals:
                totals[expert] = 0
                on_total(total)
            on_done(done - totals[expert])
            totals[expert] = done

        manifest = prepare_checkpoint(
            checkpoint, loras, args.output, dtype=args.dtype, storymem_folder=folder, progress=progress
        )
    num_bytes = sum(facts["num_bytes"] for facts in manifest.files.values())
    print_line(
        f"{args.output}: {num_bytes / 1e9:.2f} GB as {manifest.dtype}, {manifest.storymem_lora or 'no StoryMem LoRA'} "
        f"merged; render with model.{kind}_checkpoint={args.output}"
    )


def _lora_settings(text: str) -> LoraSettings:
    """Parse ``PATH[,KEY=VALUE...]``; the path may hold commas. Raises ``ConfigError`` for what is not allowed."""
    path, *options = [text] if Path(text).exists() else re.split(r",(?=\w+=)", text)
    return lora_settings({"path": path, **dict(option.split("=", 1) for option in options)}, f"--lora {text}")


@contextmanager
def _bytes_bar(what: str, console: SafeConsole) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Show a progress bar; yield a function that adds bytes to its total and one that adds bytes done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=0)

        def add_to_total(count: int) -> None:
            progress.update(task, total=(progress.tasks[task].total or 0) + count)

        yield add_to_total, lambda count: progress.advance(task, count)


def _rows(facts: Facts, indent: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}", ""
            yield from _rows(dict(value), f"{indent}  ")
        elif isinstance(value, list):
            yield f"{indent}{key}", "\n".join(value) or "none"
        else:
            yield f"{indent}{key}", str(value)


if __name__ == "__main__":
    main()
