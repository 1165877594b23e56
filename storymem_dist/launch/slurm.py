"""Submits a render to SLURM: a template of ``slurm/`` with options of sbatch, which override its ``#SBATCH`` lines.

The job runs the same command line on its nodes, with ``launch=torchrun`` instead. Renders nothing here; checks
settings, storyboards and weights before the job waits in a queue.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from storymem_dist.config.launch import SUBMITTING, SlurmSettings
from storymem_dist.config.points import Point
from storymem_dist.errors import ConfigError
from storymem_dist.launch.again import COMMAND_VARIABLE, command_again
from storymem_dist.launch.forecast import describe, hardware_of
from storymem_dist.render.check import check_job
from storymem_dist.resources import assets_folder
from storymem_dist.terminal.streams import print_line, print_lines, print_text

TEMPLATES = ("render", "render_array")
_REPORT_TEMPLATE = "report"


def submit(points: Sequence[Point], arguments: Sequence[str]) -> int:
    """Submit one job that renders ``points`` and print its number; return the exit code.

    ``arguments`` is the command line. With ``launch.dry_run`` only print what would be submitted. Raises
    ``StoryMemError``.
    """
    launch = points[0].settings.launch
    output = sweep_or_run_folder(points)
    template = template_path(launch.slurm.template)
    options = [*sbatch_options(launch.slurm, output, is_array=template.stem.endswith("_array"))]
    command = ["sbatch", "--parsable", *options, str(template), *job_arguments(arguments)]
    report = ["sbatch", "--parsable", f"--output={output / 'logs' / 'report-%j.out'}"]
    environment = job_environment(launch.slurm, output) | {COMMAND_VARIABLE: command_again()}
    if launch.dry_run:
        print_lines(["would submit:", f"  {_shown(environment, command)}"])
        if launch.slurm.report:
            print_lines(["and, when it has ended:", f"  {_shown(environment, _report(report, 'JOB', output))}"])
        hardware = hardware_of(points[0].settings)
        print_text(describe(points, num_replicas=num_replicas(points[0]), hardware=hardware))
        if hardware is None and points[0].settings.parallel.free:
            print_line("layout: decided when the job starts; name its devices for a plan, such as hardware=h100_80g")
        return 0
    check_job(points)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launch=slurm, but there is no sbatch on this machine's PATH; submit from a login node of the cluster, "
            "or use launch=torchrun"
        )
    (output / "logs").mkdir(parents=True, exist_ok=True)
    job = _sbatch(command, environment)
    print_line(f"submitted job {job}; logs are in {output / 'logs'}")
    if launch.slurm.report:
        print_line(f"submitted job {_sbatch(_report(report, job, output), environment)} for the report")
    return 0


def sbatch_options(slurm: SlurmSettings, output: Path, *, is_array: bool) -> list[str]:
    """Return the settings as options of sbatch; a setting of None keeps the template's value."""
    given = {
        "job-name": slurm.job_name,
        "nodes": slurm.nodes,
        "array": f"0-{slurm.tasks - 1}" if slurm.tasks else None,
        "gres": f"gpu:{slurm.gpus_per_node}" if slurm.gpus_per_node else None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "output": output / "logs" / ("slurm-%A_%a.out" if is_array else "slurm-%j.out"),
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    if slurm.gpus_per_node == 0:
        options.append("--gres=none")
    return [*options, *slurm.options]


def job_environment(slurm: SlurmSettings, output: Path) -> dict[str, str]:
    """Return the environment variables that the scripts of the job read."""
    return {
        "STORYMEM_LAUNCH": str(assets_folder("launch")),
        "STORYMEM_PYTHON": sys.executable,
        "STORYMEM_OUTPUT": str(output),
        "STORYMEM_MAX_REQUEUES": str(slurm.max_requeues),
    }


def job_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line without the arguments about submission."""

    def is_about_submitting(argument: str) -> bool:
        key = argument.partition("=")[0].lstrip("+~")
        group, _, rest = key.partition(".")
        return key == "launch" or (group == "launch" and rest.split(".")[0] in ("mode", "dry_run", *SUBMITTING))

    return [argument for argument in arguments if not is_about_submitting(argument)]


def template_path(template: str) -> Path:
    """Return the path of a template: one of this project by name, or any other by path. Raises ``ConfigError``."""
    if template in TEMPLATES:
        return assets_folder("slurm") / f"{template}.sbatch"
    path = Path(template).absolute()
    if not path.is_file():
        raise ConfigError(
            f"launch.slurm.template={template!r} is neither a template of this project ({', '.join(TEMPLATES)}) nor "
            "a file"
        )
    return path


def sweep_or_run_folder(points: Sequence[Point]) -> Path:
    """Return the run folder of a job, or the folder with all run folders of a sweep."""
    output = Path(points[0].settings.output).absolute()
    return output.parent if points[0].name else output


def num_replicas(point: Point) -> int | None:
    """Return how many replicas the job will have; None where only the template or the job itself knows."""
    launch, parallel = point.settings.launch, point.settings.parallel
    num_nodes = launch.cluster_nodes
    ranks_per_node = launch.processes_per_node or launch.cluster_gpus
    if num_nodes is None or ranks_per_node is None or parallel.free:
        return None
    return max(1, num_nodes * ranks_per_node // parallel.ranks_per_replica)


def _report(start: Sequence[str], job: str, output: Path) -> list[str]:
    template = assets_folder("slurm") / f"{_REPORT_TEMPLATE}.sbatch"
    return [*start, f"--dependency=afterany:{job}", str(template), str(output)]


def _sbatch(command: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()} (the command was: {shlex.join(command)})")
    return done.stdout.strip().partition(";")[0]


def _shown(environment: dict[str, str], command: Sequence[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])
