"""Types of arguments that several commands share."""

import argparse
from pathlib import Path

from storymem_dist.errors import ConfigError
from storymem_dist.files import expand_home


def a_path(text: str) -> Path:
    """A path as somebody typed it, with ``~`` replaced (a shell leaves it in ``--to=~/x``).

    Raises ``argparse.ArgumentTypeError`` for a path that is empty or not UTF-8: records and pages hold names as UTF-8.
    """
    try:
        text.encode()
        expanded = expand_home(text, "the path ")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text}: this name is not UTF-8; rename it") from None
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(expanded)
