"""Applies the ``debug`` group on one rank: log lines, including the rank's events, and repeatable kernels.

Both end with the job; the process may render another one afterwards. Changes no fingerprint; knows nothing of shots.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from storymem_dist.config.schema import DebugSettings
from storymem_dist.events import Event, Observer, ThroughputSampled, WeightsProgress
from storymem_dist.terminal.streams import print_error_text
from storymem_dist.terminal.text import printable

PACKAGE = "storymem_dist"
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE_WORKSPACE = ":4096:8"
_MANY = (ThroughputSampled, WeightsProgress)

logger = logging.getLogger(__name__)


@contextmanager
def debugging(settings: DebugSettings, *, writes_log: bool = True) -> Iterator[None]:
    """Apply the settings to this process, one rank of a job; restore the earlier state at the end.

    ``writes_log``: write the log lines; the process of another program has handlers of its own.
    """
    with (
        _log_lines(settings.log_level, rank=os.environ.get("RANK", "0")) if writes_log else nullcontext(),
        _repeatable_kernels() if settings.deterministic else nullcontext(),
    ):
        yield


def logged(observer: Observer) -> Observer:
    """Return an observer that passes events on and, with ``debug.log_level=debug``, logs them on every rank."""
    return _LoggedEvents(observer) if logger.isEnabledFor(logging.DEBUG) else observer


class _LoggedEvents:
    """Logs events: console and event files show what replica leaders do, these lines show every rank."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def notify(self, event: Event) -> None:
        if not isinstance(event, _MANY):
            logger.debug("%r", event)
        self._observer.notify(event)


class _Line(logging.Formatter):
    """A record in one line, and its trace below."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class _StandardError(logging.Handler):
    """Writes to the current ``sys.stderr``: a live console replaces it while it draws."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print_error_text(self.format(record))
        except Exception:
            self.handleError(record)


@contextmanager
def _log_lines(level: str, *, rank: str) -> Iterator[None]:
    """Write the log lines of this package to standard error, each with the rank in front."""
    handler = _StandardError()
    handler.setFormatter(_Line(f"[rank {rank}] %(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger(PACKAGE)
    before = package.level
    for name, known in logging.root.manager.loggerDict.items():
        if isinstance(known, logging.Logger) and name.partition(".")[0] == PACKAGE:
            known.disabled = False  # Hydra disables the loggers that exist when it starts a job
    package.addHandler(handler)
    package.setLevel(level.upper())
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)


@contextmanager
def _repeatable_kernels() -> Iterator[None]:
    """Make torch choose kernels that give the same bits in every run on the same machine with the same layout.

    An operation without such a kernel only warns, because a failed render would not help to find a fault.
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_benchmark = torch.backends.cudnn.benchmark
    sets_workspace = WORKSPACE_VARIABLE not in os.environ
    if sets_workspace:
        if torch.cuda.is_initialized():
            logger.warning(
                "debug.deterministic: CUDA started in this process before %s was set, so matrix products may differ "
                "between runs; set it to %s before the command",
                WORKSPACE_VARIABLE,
                _REPEATABLE_WORKSPACE,
            )
        os.environ[WORKSPACE_VARIABLE] = _REPEATABLE_WORKSPACE
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        torch.backends.cudnn.benchmark = was_benchmark
        if sets_workspace:
            os.environ.pop(WORKSPACE_VARIABLE, None)
