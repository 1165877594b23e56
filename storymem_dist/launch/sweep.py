"""Hydra's multirun: the launcher that groups points into jobs, and the table that ends every sweep.

``storymem-render -m sampler.num_inference_steps=20,40 memory.max_keyframes=6,10`` uses Hydra's own sweeper; this
launcher composes its points. Points that share weights and layout become one job with one run folder each; jobs run one
after the other. Another launcher (``hydra/launcher=submitit_slurm``) calls the application once for each point instead.
Knows nothing of how a job is rendered.
"""

import copy
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict, read_write

from storymem_dist.config.launch import SUBMITTING
from storymem_dist.config.points import Point, can_join
from storymem_dist.errors import ConfigError, MachineError, StoryMemError
from storymem_dist.files import expand_home
from storymem_dist.launch.again import next_line
from storymem_dist.launch.environment import set_cache_folders
from storymem_dist.launch.points import forget_error, keep_error, point_of, points_table, read_point, read_points
from storymem_dist.terminal.streams import print_error_text, print_line, print_text

PLUGIN_MODULE = "hydra_plugins.storymem_launcher"
"""Hydra instantiates only plugins of this namespace; ``register_launcher`` makes this module known there."""


class RendersPoints(Protocol):
    """The methods of the application that a sweep uses."""

    def begin(self) -> None:
        """Called before the first point is composed."""

    def render(self, points: Sequence[Point], *, sweep: str | None = None) -> int:
        """Render points as one job; return the exit code."""

    def print_error(self, error: StoryMemError) -> None:
        """Print a user's error."""


class SweepLauncher(Launcher):
    """Renders all points of a multirun as few jobs as their weights allow. A point that fails stops no other."""

    __module__ = PLUGIN_MODULE

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        """See Hydra's ``Launcher``. ``task_function`` is the application."""
        self._context = hydra_context
        self._application: RendersPoints = task_function
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Render the points with the given overrides."""
        self._application.begin()
        SweepTable.refused = 0
        points: list[tuple[str, Point]] = []
        sweep_folder = expand_home(str(self._config.output), "output")
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            name = str(config.hydra.job.override_dirname)
            sweep_folder = expand_home(str(config.output), "output")
            forget_error(sweep_folder, name)
            try:
                points.append((name, point_of(_without_hydra(config), name)))
            except StoryMemError as error:
                self._note(sweep_folder, name, error)
        self._render(sweep_folder, points)
        return [_finished(overrides) for overrides in job_overrides]

    def _render(self, sweep_folder: str, points: Sequence[tuple[str, Point]]) -> None:
        if points and points[0][1].settings.launch.submits:
            self._application.render([point for _, point in points], sweep=Path(sweep_folder).name)
            return
        if points:
            set_cache_folders(points[0][1].settings.output)
        jobs = group_points([point for _, point in points], self._can_begin(sweep_folder, points))
        if len(jobs) > 1 and "RANK" in os.environ:
            error = ConfigError(
                f"the points of this sweep need {len(jobs)} jobs (they differ in weights or layout, or "
                "sweep=separate), but ranks that another launcher started can only run one; use launch=torchrun "
                "instead of starting the ranks yourself"
            )
            for name, _ in points:
                keep_error(sweep_folder, name, error)
            self._application.print_error(error)
            return
        names = {id(point): name for name, point in points}
        for job in jobs:
            try:
                self._application.render(job, sweep=Path(sweep_folder).name)
            except MachineError as error:  # it would end the other jobs, too; the same command continues
                SweepTable.error = error
                self._application.print_error(error)
                return
            except StoryMemError as error:
                for point in job:
                    keep_error(sweep_folder, names[id(point)], error)
                SweepTable.refused = max(SweepTable.refused, error.exit_code)
                self._application.print_error(error)
            except Exception:  # a bug that ends one job must not lose the others
                print_error_text(traceback.format_exc().rstrip())
            if any(read_point(Path(point.settings.output)).state == "stopped" for point in job):
                return

    def _can_begin(self, sweep_folder: str, points: Sequence[tuple[str, Point]]) -> Callable[[Point], bool]:
        names = {id(point): name for name, point in points}

        def can_begin(point: Point) -> bool:
            from storymem_dist.render.check import check_job

            try:
                check_job([point])
            except StoryMemError as error:
                self._note(sweep_folder, names[id(point)], error)
                return False
            return True

        return can_begin

    def _note(self, sweep_folder: str, name: str, error: StoryMemError) -> None:
        keep_error(sweep_folder, name, error)
        SweepTable.refused = max(SweepTable.refused, error.exit_code)
        self._application.print_error(StoryMemError(f"{name}: {error}"))


def group_points(points: Sequence[Point], can_begin: Callable[[Point], bool]) -> list[list[Point]]:
    """Group points into jobs, in order, without those that cannot begin."""
    jobs: list[list[Point]] = []
    for point in points:
        if not can_begin(point):
            continue
        settings = point.settings
        fitting = [job for job in jobs if settings.sweep == "joined" and can_join(job[0].settings, settings)]
        if fitting:
            fitting[0].append(point)
        else:
            jobs.append([point])
    return jobs


class SweepTable(Callback):
    """Ends every multirun, with any launcher, with one table, the next command, and the exit code of the worst point.

    ``error`` is a fault of the machine that ended a multirun in this process; ``refused`` is the highest exit code of
    the points that this process refused, or 0.
    """

    error: ClassVar[MachineError | None] = None
    refused: ClassVar[int] = 0

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the state of all points in the sweep's folder; exit with the highest exit code."""
        if config.launch.mode in SUBMITTING or config.launch.dry_run:  # nothing is rendered here
            if self.refused:
                sys.exit(self.refused)
            return
        points = read_points(expand_home(str(config.output), "output"))
        exit_code = max((point.exit_code for point in points), default=0)
        if self.error is not None:
            exit_code = self.error.exit_code
        if os.environ.get("RANK", "0") == "0":
            print_line()
            print_line(f"sweep {config.output}: {len(points)} points")
            print_text(points_table(points))
            print_text(next_line(points, exit_code, self.error))
        sys.exit(exit_code)


def register_launcher() -> None:
    """Register ``SweepLauncher`` with Hydra, without a package in the namespace that all plugins share."""
    sys.modules[PLUGIN_MODULE] = sys.modules[__name__]
    Plugins.instance().register(SweepLauncher)


def _without_hydra(config: DictConfig) -> DictConfig:
    """The composed configuration without Hydra's own part."""
    rest = copy.deepcopy(config)
    with read_write(rest), open_dict(rest):
        del rest["hydra"]
    return rest


def _finished(overrides: Sequence[str]) -> JobReturn:
    job = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    job.return_value = 0
    return job
