"""How long a rank is held up by collectives: a counter that is put around the calls, read now and then.

The host's clock is the right one only where the host waits for a collective: on CPUs with gloo, outside compiled code.
Where it is not (GPUs work asynchronously, a compiled graph cannot read clocks) there is no counter, and the time is
unknown. What FSDP2 gathers goes through calls of its own and is not seen. Knows nothing of processes or tensors.
"""

import time
from contextlib import AbstractContextManager, nullcontext


class CollectiveClock:
    """Adds up the seconds for which ``with clock:`` was open. For one thread; not to be nested."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = 0.0

    def take(self) -> float:
        """The seconds since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._began


def timed(clock: CollectiveClock | None) -> AbstractContextManager[None]:
    """A context whose time ``clock`` counts; without a clock, one that does nothing."""
    return nullcontext() if clock is None else clock
