"""Checks a command without doing its work: would the program accept these arguments?

Every program has its own parser, and that parser is asked: Hydra composes overrides, argparse parsers stop when they
have parsed, torchrun and accelerate parse what is theirs, scripts must exist and be bash. A program that is not known
here is refused.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from unittest import mock

from accelerate.commands.launch import launch_command_parser
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser as hydra_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from torch.distributed.run import get_args_parser as torchrun_parser

from storymem_dist.artifacts.run_folder import STOP_FILE
from storymem_dist.cli.weights import published_weights
from storymem_dist.config.composing import compose_settings
from storymem_dist.config.overrides import prepare
from storymem_dist.errors import StoryMemError
from tests.unit.docs.markdown import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RENDER_MODULES = ("storymem_dist", "storymem_dist.cli", "storymem_dist.cli.render")
FOREIGN_PACKAGES = ("hpsv3==1.0.0",)
IMAGE = "storymem_dist"
KUBERNETES = ROOT / "storymem_dist" / "launch" / "kubernetes.py"


class Refused(Exception):
    """A command that would not work; the message says why."""


class _Parsed(BaseException):
    """Raised where a program has parsed its command line, before it does anything."""


def check(words: Sequence[str]) -> None:
    """Raise ``Refused`` unless the command would be accepted."""
    program, *arguments = _without_assignments(words)
    if program not in CHECKERS:
        raise Refused(f"{program}: teach this test how to check it (tests/unit/docs/programs.py)")
    CHECKERS[program](arguments)


def _without_assignments(words: Sequence[str]) -> list[str]:
    rest = list(words)
    while rest and re.fullmatch(r"[A-Z_]+=.*", rest[0]):
        del rest[0]
    return rest


def _require(condition: object, message: str) -> None:
    if not condition:
        raise Refused(message)


# -- this project's programs -------------------------------------------------------------------------------------------


def render(arguments: Sequence[str]) -> None:
    """Compose what ``storymem-render`` would render, every point of a multirun."""
    with _complaints():
        given = hydra_parser().parse_args(list(arguments))
    try:
        overrides = prepare([*(["-m"] if given.multirun else []), *given.overrides])[int(given.multirun) :]
        parsed = OverridesParser.create().parse_overrides(overrides)
    except (OverrideParseException, StoryMemError) as error:
        raise Refused(str(error)) from error
    points = [overrides]
    if given.multirun:
        points = [point for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for point in batch]
    for point in points:
        _compose(tuple(one for one in point if not one.startswith(("output=", "stories.path="))))


@cache
def _compose(overrides: tuple[str, ...]) -> None:
    """Compose overrides once, however many commands have them. (Any path is allowed: paths are left out.)"""
    try:
        compose_settings(overrides)
    except StoryMemError as error:
        raise Refused(str(error)) from error


def console_script(name: str) -> Callable[[Sequence[str]], None]:
    """A checker of one of the project's commands that use argparse."""
    module, _, function = PROJECT["scripts"][name].partition(":")

    def parse(arguments: Sequence[str]) -> None:
        with _parsing_only(name, arguments):
            getattr(importlib.import_module(module), function)()

    return parse


def doctor(arguments: Sequence[str]) -> None:
    """``storymem-doctor`` takes options of its own and overrides of ``storymem-render``."""
    console_script("storymem-doctor")(arguments)
    render([argument for argument in arguments if not argument.startswith("-")])


def plan(arguments: Sequence[str]) -> None:
    """``storymem-plan`` takes options of its own and overrides of ``storymem-render``, or ``calibrate``."""
    console_script("storymem-plan")(arguments)
    render([argument for argument in arguments if "=" in argument and not argument.startswith("-")])


def score(arguments: Sequence[str]) -> None:
    """``storymem-score`` takes run folders, options of its own and some overrides of ``storymem-render``."""
    console_script("storymem-score")(arguments)
    render([argument for argument in arguments if argument.startswith(("launch", "evaluation"))])


def python(arguments: Sequence[str]) -> None:
    """``python -m MODULE`` of this project, or one of its scripts."""
    if arguments[0] != "-m":
        return _require((ROOT / arguments[0]).is_file(), f"{arguments[0]}: no such file")
    return module(arguments[1], arguments[2:])


def module(name: str, arguments: Sequence[str]) -> None:
    """A module of this project that is run as a program."""
    if name in RENDER_MODULES:
        return render(arguments)
    ours = ("storymem_dist", "benchmarks", "tools")
    _require(name.split(".")[0] in ours, f"-m {name}: teach this test how to check it")
    with _parsing_only(name, arguments):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except ImportError as error:
            raise Refused(str(error)) from error
    return None


@contextlib.contextmanager
def _parsing_only(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """Run the body with a command line that it may parse, and nothing more."""
    parse_args, parse_intermixed = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args

    def parse_and_end(parser: argparse.ArgumentParser, *given: object, **named: object) -> None:
        parse_args(parser, *given, **named)
        raise _Parsed

    def parse_intermixed_and_end(parser: argparse.ArgumentParser, *given: object, **named: object) -> None:
        parse_intermixed(parser, *given, **named)
        raise _Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_end),
        mock.patch.object(argparse.ArgumentParser, "parse_intermixed_args", parse_intermixed_and_end),
        mock.patch.object(sys, "argv", [program, *arguments]),
        _complaints(),
    ):
        try:
            yield
        except _Parsed:
            return
    raise Refused(f"{program} did not parse its command line with argparse; teach this test how to check it")


@contextlib.contextmanager
def _complaints() -> Iterator[None]:
    """Turn the exit of a parser into ``Refused`` with what it printed; an exit after ``--help`` is fine."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as end:
        if end.code:
            raise Refused(said.getvalue().strip() or f"exit code {end.code}") from end


# -- launchers ---------------------------------------------------------------------------------------------------------


def torchrun(arguments: Sequence[str]) -> None:
    """torchrun's own parser, then the module that it starts."""
    with _complaints():
        given = torchrun_parser().parse_args(list(arguments))
    _require(given.module, f"torchrun {given.training_script}: start a module (-m)")
    module(given.training_script, given.training_script_args)


def accelerate(arguments: Sequence[str]) -> None:
    """accelerate's own parser, its configuration file, then the module that it starts."""
    _require(arguments[0] == "launch", f"accelerate {arguments[0]}: teach this test how to check it")
    with _complaints():
        given = launch_command_parser().parse_args(list(arguments[1:]))
    _require((ROOT / given.config_file).is_file(), f"{given.config_file}: no such file")
    _require(given.module, f"accelerate launch {given.training_script}: start a module (-m)")
    module(given.training_script, given.training_script_args)


def sbatch(arguments: Sequence[str]) -> None:
    """Known options of sbatch, a template of ``slurm/``, and its arguments."""
    options = [argument for argument in arguments if argument.startswith("--")]
    wrong = [option for option in options if not re.match(r"--(array|dependency)=\S", option)]
    _require(not wrong, f"sbatch {wrong}: teach this test how to check it")
    script, *rest = arguments[len(options) :]
    _require_bash(script)
    if script.endswith("report.sbatch"):
        return check(["storymem-report", *rest])
    return render(rest)


def bash(arguments: Sequence[str]) -> None:
    """A script of this project, and its arguments."""
    script, *rest = arguments
    _require_bash(script)
    if script.startswith("launch/"):
        return render([*rest, "launch=torchrun"])
    _require(script == ".ci/run", f"bash {script}: teach this test how to check it")
    stages = re.findall(r"^ +([a-z]+)\) ", (ROOT / script).read_text(), re.MULTILINE)
    return _require(set(rest) <= set(stages), f".ci/run {rest}: its stages are {stages}")


def _require_bash(script: str) -> None:
    _require((ROOT / script).is_file(), f"{script}: no such script")
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    _require(done.returncode == 0, done.stderr)


# -- tools -------------------------------------------------------------------------------------------------------------


def make(arguments: Sequence[str]) -> None:
    """Targets and variables of the Makefile; paths in ``PYTEST_ARGS``."""
    text = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, value = argument.partition("=")
        if is_variable:
            _require(f"$({name})" in text, f"make {argument}: the Makefile does not use {name}")
            pytest(value.split())
        else:
            _require(re.search(rf"^{re.escape(name)}:", text, re.MULTILINE), f"make {name}: no such target")


def pytest(arguments: Sequence[str]) -> None:
    """Test files and folders exist."""
    missing = [path for path in arguments if path.startswith("tests/") and not (ROOT / path).exists()]
    _require(not missing, f"no such tests: {missing}")


def pip(arguments: Sequence[str]) -> None:
    """``pip install`` of this project with its extras and constraints, or of a known package."""
    _require(arguments[0] == "install", f"pip {arguments[0]}: teach this test how to check it")
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("-c", "--constraint"):
            path = next(rest)
            _require((ROOT / path).is_file(), f"{path}: no such file")
        elif project := re.fullmatch(r"\.(?:\[(.*)\])?", argument):
            extras = set((project[1] or "").split(",")) - {""}
            _require(extras <= set(PROJECT["optional-dependencies"]), f"{argument}: no such extra")
        elif argument not in ("-e", "--editable", "--no-deps"):
            _require(argument in FOREIGN_PACKAGES, f"pip install {argument}: teach this test that it is right")


def hf(arguments: Sequence[str]) -> None:
    """``hf download`` of a repository that the code names."""
    known = {entry.repo for entry in published_weights().values()}
    _require(arguments[0] == "download" and arguments[1] in known, f"hf {arguments}: known are {known}")


def touch(arguments: Sequence[str]) -> None:
    """The stop file of a run folder."""
    _require(all(path.endswith(f"/{STOP_FILE}") for path in arguments), f"touch {arguments}: the file is {STOP_FILE}")


def wandb(arguments: Sequence[str]) -> None:
    """``wandb sync`` of an offline run."""
    _require(arguments[0] == "sync" and "/wandb/offline-run-" in arguments[1], f"wandb {arguments}: teach this test")


def docker(arguments: Sequence[str]) -> None:
    """Building the image, or a command of this project in it."""
    _require((ROOT / "Dockerfile").is_file(), "there is no Dockerfile")
    if arguments[0] == "build":
        return _require(list(arguments[1:]) == ["-t", IMAGE, "."], f"docker {arguments}: teach this test")
    _require(arguments[0] == "run" and IMAGE in arguments, f"docker {arguments}: teach this test")
    return check(arguments[list(arguments).index(IMAGE) + 1 :])


def kubectl(arguments: Sequence[str]) -> None:
    """The commands that look at, change and end a job of ``launch=kubernetes``, or apply one of the templates."""
    parser = argparse.ArgumentParser("kubectl", exit_on_error=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("apply").add_argument("-f", dest="file", required=True)
    for verb in ("get", "logs", "patch", "delete"):
        of_verb = verbs.add_parser(verb)
        for option in ("--namespace", "--selector", "--patch"):
            of_verb.add_argument(option)
        for flag in ("--follow", "--prefix"):
            of_verb.add_argument(flag, action="store_true")
        of_verb.add_argument("what", nargs="*", choices=["pods", "job", "jobset", []] if verb == "get" else None)
    with _complaints():
        given = parser.parse_args(list(arguments))
    if given.verb == "apply":
        return _require((ROOT / given.file).is_file(), f"{given.file}: no such file")
    if given.selector:
        key = given.selector.partition("=")[0]
        _require(
            f'"{key}"' in KUBERNETES.read_text(), f"kubectl {given.selector}: launch=kubernetes prints another label"
        )
    if given.verb == "patch":
        wrong = set(json.loads(given.patch)["spec"]) - {"parallelism", "completions", "suspend"}
        _require(not wrong, f"kubectl patch {wrong}: these fields of a job cannot be changed")
    if given.verb in ("patch", "delete"):
        _require(given.what[0] in ("job", "jobset") and len(given.what) == 2, f"kubectl {arguments}: which job?")
    return None


CHECKERS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "storymem-render": render,
    "storymem-doctor": doctor,
    "storymem-report": console_script("storymem-report"),
    "storymem-queue": console_script("storymem-queue"),
    "storymem-weights": console_script("storymem-weights"),
    "storymem-plan": plan,
    "storymem-score": score,
    "python": python,
    "torchrun": torchrun,
    "accelerate": accelerate,
    "sbatch": sbatch,
    "bash": bash,
    "make": make,
    "pip": pip,
    "hf": hf,
    "touch": touch,
    "wandb": wandb,
    "docker": docker,
    "kubectl": kubectl,
}
"""How to check each program that the pages may name."""
