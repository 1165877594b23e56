"""Counts the time that a rank spends in collectives.

The host's clock can measure it only where the host waits for a collective: on CPUs with gloo, outside compiled code.
Elsewhere (GPUs run asynchronously, a compiled graph cannot read clocks) there is no counter, and the time is unknown.
FSDP2's own all-gathers are not counted. Knows nothing of processes or tensors.
"""

import time
from contextlib import AbstractContextManager, nullcontext


class CollectiveClock:
    """Adds up the seconds inside ``with clock:``. For one thread; must not be nested."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = 0.0

    def take(self) -> float:
        """Return the seconds counted since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._began


def timed(clock: CollectiveClock | None) -> AbstractContextManager[None]:
    """Return a context whose time ``clock`` counts; without a clock, one that does nothing."""
    return nullcontext() if clock is None else clock
