"""``storymem-render``: the Hydra application, from a command line to settings, ranks and an exit code.

Knows nothing of models. A user's mistake becomes one message on standard error here, without a stack trace.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from storymem_dist.config.composing import register_schema
from storymem_dist.config.launch import SUBMITTING
from storymem_dist.config.overrides import COMPOSING_ERRORS, as_error, is_multirun, prepare
from storymem_dist.config.points import Point
from storymem_dist.errors import CollectiveFailed, ConfigError, StoryMemError
from storymem_dist.files import expand_home
from storymem_dist.launch.again import next_line
from storymem_dist.launch.environment import set_cache_folders
from storymem_dist.launch.points import forget_error, keep_error, point_of, read_point
from storymem_dist.launch.sweep import register_launcher
from storymem_dist.parallel.launcher_watch import follow_launcher, started_by_torch
from storymem_dist.resources import config_folder
from storymem_dist.terminal.program import INTERRUPTED, program
from storymem_dist.terminal.streams import print_error, print_text

_OTHER_RANKS_WAIT_SECONDS = 3.0


class Application:
    """The callable to which Hydra passes a composed configuration. ``arguments``: the command line as typed."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self.exit_code = 0
        self.error: StoryMemError | None = None
        self.has_begun = False

    def __call__(self, config: DictConfig) -> int:
        """Render one configuration: a whole job, or a point of a multirun that another launcher started."""
        self.begin()
        register_schema()  # a cluster's launcher calls this in a process that did not run ``main``
        hydra_config = HydraConfig.get()
        if hydra_config.mode != RunMode.MULTIRUN:
            self.exit_code = self._exit_code_of(lambda: self.render([point_of(config)]))
            self._print_next(config)
            return self.exit_code
        name = hydra_config.job.override_dirname
        sweep_folder = expand_home(config.output, "output")
        forget_error(sweep_folder, name)

        def render_point() -> int:
            point = point_of(config, name)
            if point.settings.launch.submits:
                raise ConfigError(
                    f"launch={point.settings.launch.mode} submits one job for a whole sweep, and "
                    "hydra/launcher=submitit_slurm one for each point; use one of them: launch=torchrun with submitit"
                )
            return self.render([point], sweep=Path(sweep_folder).name)

        return self._exit_code_of(render_point, on_error=lambda error: keep_error(sweep_folder, name, error))

    def begin(self) -> None:
        """Note that the configuration is composed: errors from now on are this program's, not Hydra's."""
        self.has_begun = True

    def render(self, points: Sequence[Point], *, sweep: str | None = None) -> int:
        """Render ``points`` as one job, started as ``launch`` sets; return its exit code.

        Raises ``StoryMemError`` when the job cannot begin. Heavy imports come here, after the settings are validated.
        """
        launch = points[0].settings.launch
        set_cache_folders(points[0].settings.output)
        if launch.dry_run and not launch.submits:
            from storymem_dist.launch.forecast import describe, hardware_of

            print_text(describe(points, hardware=hardware_of(points[0].settings)))
            return 0
        if launch.mode == "torchrun":
            from storymem_dist.launch.torchrun import render_with_torchrun

            return render_with_torchrun(points, sweep=sweep)
        if launch.mode == "slurm":
            from storymem_dist.launch.slurm import submit

            return submit(points, self.arguments)
        if launch.mode == "kubernetes":
            from storymem_dist.launch.kubernetes import submit as submit_to_kubernetes

            return submit_to_kubernetes(points, self.arguments)
        from storymem_dist.render.job import render_job

        return render_job(points, sweep=sweep)

    def print_error(self, error: StoryMemError) -> None:
        """Print an error, usually once, however many ranks found it.

        The first rank prints at once; its end makes torchrun end the others, so they print only errors that the first
        one did not meet. Ranks that lost each other have agreed which one prints.
        """
        rank = os.environ.get("RANK", "0")
        if rank != "0" and not isinstance(error, CollectiveFailed):
            time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        where = "" if rank == "0" else f" [rank {rank}]"
        print_error(f"storymem-render: error{where}: {error}")

    def _print_next(self, config: DictConfig) -> None:
        """Name the next command if this job ended early; the first rank only."""
        if os.environ.get("RANK", "0") != "0" or config.launch.mode in SUBMITTING or config.launch.dry_run:
            return
        folder = Path(expand_home(config.output, "output"))
        print_text(next_line([read_point(folder)], self.exit_code, self.error))

    def _exit_code_of(self, render: Callable[[], int], on_error: Callable[[StoryMemError], None] | None = None) -> int:
        try:
            return render()
        except StoryMemError as error:
            self.error = error
            if on_error is not None:
                on_error(error)
            self.print_error(error)
            return error.exit_code


def name_points_by_what_is_swept(arguments: Sequence[str]) -> list[str]:
    """Add an argument to a multirun: Hydra names each point by the swept settings alone, not by all overrides."""
    if not is_multirun(arguments):
        return list(arguments)
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException:
        return list(arguments)  # Hydra reports it
    is_swept = {one.key_or_group: one.is_sweep_override() for one in parsed if not one.is_hydra_override()}
    listed = ",".join(f"'{key}'" for key, swept in is_swept.items() if not swept)
    return [*arguments, f"hydra.job.config.override_dirname.exclude_keys=[{listed}]"]


def main() -> None:
    """Entry point of ``storymem-render`` and ``python -m storymem_dist.cli``."""
    if started_by_torch():
        follow_launcher()
    with program("storymem-render"):
        sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what a command line asks; return the exit code. ``sys.argv`` is changed meanwhile, because Hydra reads it."""
    application = Application(arguments)
    try:
        register_schema()
        register_launcher()
        with _hydra_arguments(name_points_by_what_is_swept(prepare(arguments))):
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="render")(application)()
    except StoryMemError as error:
        application.print_error(error)
        return error.exit_code
    except COMPOSING_ERRORS as error:
        if application.has_begun and not isinstance(error, HydraException | OmegaConfBaseException):
            raise  # a bug
        application.print_error(as_error(error, arguments))
        return ConfigError.exit_code
    except KeyboardInterrupt:
        if application.has_begun and os.environ.get("RANK", "0") == "0":
            print_text(next_line([], INTERRUPTED))
        raise
    return application.exit_code


@contextmanager
def _hydra_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Give Hydra a command line. Its errors pass through it, and only the first rank's files stay."""
    given, before = list(arguments), sys.argv
    with ExitStack() as cleaning:
        if os.environ.get("RANK", "0") != "0" and is_multirun(given):
            nowhere = cleaning.enter_context(tempfile.TemporaryDirectory(prefix="storymem-hydra-"))
            given.append(f"hydra.sweep.dir={nowhere}")
        sys.argv = [before[0], *given]
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            yield
        finally:
            sys.argv = before


if __name__ == "__main__":
    main()
