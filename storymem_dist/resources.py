"""Where the files that belong to the program lie: ``conf/``, ``launch/`` and ``slurm/``."""

from pathlib import Path


def assets_folder(name: str) -> Path:
    """``conf``, ``launch`` or ``slurm``: inside an installed package, or next to the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "assets" / name
    return installed if installed.is_dir() else package.parent / name


def config_folder() -> Path:
    """The folder ``conf/``."""
    return assets_folder("conf")
