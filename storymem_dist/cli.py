"""``storymem-render``: the Hydra application, from a command line to settings, ``build`` and an exit code.

Knows nothing about models or ranks. A user's mistake ends here as one line on standard error, without a stack trace.
"""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from storymem_dist.config import config_folder, register_schema, to_plain, to_settings
from storymem_dist.errors import StoryMemError


def point_stories_at_paths(arguments: list[str], stories_folder: Path) -> list[str]:
    """Rewrite ``stories=VALUE`` to ``stories.path=VALUE`` unless ``VALUE`` names a file of the ``stories`` group.

    Hydra would look for a configuration called VALUE; people mean their storyboard file, folder or glob.
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


def _render(config: DictConfig) -> None:
    try:
        settings = to_settings(config)
        from storymem_dist.job import render_job  # heavy imports only after the settings are known to be good

        exit_code = render_job(settings, to_plain(config))
    except StoryMemError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        print(f"storymem-render: error{where}: {error}", file=sys.stderr)
        exit_code = error.exit_code
    sys.exit(exit_code)


def main() -> None:
    """Entry point of ``storymem-render`` and ``python -m storymem_dist.cli``."""
    register_schema()
    folder = config_folder()
    OmegaConf.register_new_resolver("storymem_examples", lambda: str(folder / "stories" / "examples"), replace=True)
    sys.argv[1:] = point_stories_at_paths(sys.argv[1:], folder / "stories")
    hydra.main(version_base="1.3", config_path=str(folder), config_name="render")(_render)()


if __name__ == "__main__":
    main()
