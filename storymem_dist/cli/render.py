"""``storymem-render``: the Hydra application, from a command line to settings, ranks and an exit code.

Knows nothing of models. A user's mistake becomes one message on standard error here, without a stack trace.
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig

from storymem_dist.config.composing import register_schema
from storymem_dist.config.points import Point
from storymem_dist.errors import CollectiveFailed, ConfigError, StoryMemError
from storymem_dist.launch.points import forget_error, keep_error, point_of
from storymem_dist.launch.sweep import register_launcher
from storymem_dist.resources import config_folder

_MULTIRUN_FLAGS = ("-m", "--multirun")
_OTHER_RANKS_WAIT_SECONDS = 3.0


class Application:
    """The callable to which Hydra passes a composed configuration. ``arguments``: the command line as typed."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self.exit_code = 0
        self.has_begun = False
        self.on_begin: Callable[[], None] | None = None

    def __call__(self, config: DictConfig) -> int:
        """Render one configuration: a whole job, or a point of a multirun that another launcher started."""
        self.begin()
        register_schema()  # a cluster's launcher calls this in a process that did not run ``main``
        hydra_config = HydraConfig.get()
        if hydra_config.mode != RunMode.MULTIRUN:
            self.exit_code = self._exit_code_of(lambda: self.render([point_of(config)]))
            return self.exit_code
        name = hydra_config.job.override_dirname
        forget_error(config.output, name)

        def render_point() -> int:
            point = point_of(config, name)
            if point.settings.launch.mode == "slurm":
                raise ConfigError(
                    "launch=slurm submits one job for a whole sweep, and hydra/launcher=submitit_slurm one for each "
                    "point; use one of them: launch=torchrun with submitit"
                )
            return self.render([point], sweep=Path(config.output).name)

        return self._exit_code_of(render_point, on_error=lambda error: keep_error(config.output, name, error))

    def begin(self) -> None:
        """Note that the configuration is composed: errors from now on are this program's, not Hydra's."""
        self.has_begun = True
        if self.on_begin is not None:
            self.on_begin()

    def render(self, points: Sequence[Point], *, sweep: str | None = None) -> int:
        """Render ``points`` as one job, started as ``launch`` sets; return its exit code.

        Raises ``StoryMemError`` when the job cannot begin. Heavy imports come here, after the settings are validated.
        """
        launch = points[0].settings.launch
        if launch.dry_run and launch.mode != "slurm":
            from storymem_dist.launch.forecast import describe

            sys.stdout.write(describe(points))
            return 0
        if launch.mode == "torchrun":
            from storymem_dist.launch.torchrun import render_with_torchrun

            return render_with_torchrun(points, sweep=sweep)
        if launch.mode == "slurm":
            from storymem_dist.launch.slurm import submit

            return submit(points, self.arguments)
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
        print(f"storymem-render: error{where}: {error}", file=sys.stderr, flush=True)

    def _exit_code_of(self, render: Callable[[], int], on_error: Callable[[StoryMemError], None] | None = None) -> int:
        try:
            return render()
        except StoryMemError as error:
            if on_error is not None:
                on_error(error)
            self.print_error(error)
            return error.exit_code


def point_stories_at_paths(arguments: list[str], stories_folder: Path) -> list[str]:
    """Rewrite ``stories=VALUE`` to ``stories.path=VALUE`` unless ``VALUE`` names a file of the ``stories`` group.

    Hydra would look for a configuration named VALUE, but people mean their storyboard file, folder or glob.
    """
    options = {path.stem for path in stories_folder.glob("*.yaml")}
    rewritten = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "stories" and equals and not set(value.split(",")) <= options:
            plain = value.startswith(("[", "'", '"')) or "," in value
            quoted = value if plain else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
            rewritten.append(f"stories.path={quoted}")
        else:
            rewritten.append(argument)
    return rewritten


def name_points_by_what_is_swept(arguments: Sequence[str]) -> list[str]:
    """Add an argument to a multirun: Hydra names each point by the swept settings alone, not by all overrides."""
    if not any(argument in _MULTIRUN_FLAGS for argument in arguments):
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
    register_schema()
    register_launcher()
    folder = config_folder()
    application = Application(sys.argv[1:])
    sys.argv[1:] = name_points_by_what_is_swept(point_stories_at_paths(sys.argv[1:], folder / "stories"))
    with _composing(application):
        hydra.main(version_base="1.3", config_path=str(folder), config_name="render")(application)()
    sys.exit(application.exit_code)


@contextmanager
def _composing(application: Application) -> Iterator[None]:
    """Make Hydra's own errors exit with the code of ``ConfigError``, printed once however many ranks meet them.

    Ranks other than the first delay what Hydra prints, as ``Application.print_error`` does, and give it a temporary
    folder for its files.
    """
    rank = os.environ.get("RANK", "0")
    stderr, printed = sys.stderr, io.StringIO()
    with ExitStack() as cleaning:
        if rank != "0":
            if any(argument in _MULTIRUN_FLAGS for argument in sys.argv):
                nowhere = cleaning.enter_context(tempfile.TemporaryDirectory(prefix="storymem-hydra-"))
                sys.argv.append(f"hydra.sweep.dir={nowhere}")
            cleaning.enter_context(redirect_stderr(printed))
            application.on_begin = partial(setattr, sys, "stderr", stderr)
        try:
            yield
        except SystemExit as end:
            if application.has_begun or end.code != 1:
                raise
            if printed.getvalue():
                time.sleep(_OTHER_RANKS_WAIT_SECONDS)
                stderr.write(printed.getvalue())
            sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    main()
