"""Where the files that belong to the program lie: ``conf/``, ``examples/``, ``launch/``, ``slurm/``, packed weights."""

from pathlib import Path

PACKAGE_FOLDER = Path(__file__).resolve().parent
"""The folder of the package's modules; its parent is what Python must find to import it."""


def assets_folder(name: str) -> Path:
    """``conf``, ``examples``, ``launch`` or ``slurm``: inside an installed package, or next to it in a checkout."""
    installed = PACKAGE_FOLDER / "assets" / name
    return installed if installed.is_dir() else PACKAGE_FOLDER.parent / name


def config_folder() -> Path:
    """The folder ``conf/``."""
    return assets_folder("conf")


def packed_weights(name: str) -> Path:
    """The file of a model that comes with the package (``nano.safetensors``)."""
    return PACKAGE_FOLDER / "weights" / "packed_files" / name
