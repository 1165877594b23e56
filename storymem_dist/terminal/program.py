"""What every program does first and last: safe streams, and an interrupt that ends in one line and exit code 130."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from storymem_dist.terminal.streams import install, print_error

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


@contextlib.contextmanager
def program(name: str) -> Iterator[None]:
    """Run a program's body with safe streams.

    Ctrl-C in it becomes one line and exit code 130; from then on, and after the body, another Ctrl-C ends the process
    at once. In a process that is not the program's own (a test, a notebook) the streams are restored.
    """
    streams = sys.stdout, sys.stderr
    is_own = sys.stdout is sys.__stdout__ or sys.stderr is sys.__stderr__
    install()
    try:
        yield
    except KeyboardInterrupt:
        if is_own:
            _end_at_once_when_interrupted()
        if os.environ.get("RANK", "0") == "0":  # one line, however many ranks the terminal interrupts
            print_error(f"{name}: interrupted")
        raise SystemExit(INTERRUPTED) from None
    finally:
        if is_own:
            _end_at_once_when_interrupted()
        else:
            sys.stdout, sys.stderr = streams


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors are one line, whatever the arguments hold, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message``; exit."""
        self.print_usage(sys.stderr)
        print_error(f"{self.prog}: error: {message}")
        sys.exit(2)


def _end_at_once_when_interrupted() -> None:
    def end(*_: Any) -> None:
        os._exit(INTERRUPTED)

    with contextlib.suppress(ValueError):  # signals belong to the main thread
        signal.signal(signal.SIGINT, end)
