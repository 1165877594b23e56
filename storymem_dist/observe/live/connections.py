"""Connections of clients that do not speak, or are too many: they are closed, so that others are answered.

Knows HTTP connections; nothing of runs.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

MAX_CONNECTIONS = 300
"""Connections at the same time: three times as many as pages that are followed; a process may open 1,024 files."""

REQUEST_SECONDS = 10.0
"""Longest time for a request's headers to arrive; twice that where an earlier one of the connection was answered."""


class Connection(H11Protocol):
    """One connection. An answer may take any time; a request that does not come ends it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._wait(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def _wait(self, last: RequestResponseCycle | None) -> None:
        self._waiting = self.loop.call_later(REQUEST_SECONDS, self._look, last)

    def _look(self, last: RequestResponseCycle | None) -> None:
        """End the connection if nothing was asked since ``last``, which is answered."""
        newest: Any = self.cycle
        if newest is last and (newest is None or newest.response_complete):
            self.transport.abort()
        else:
            self._wait(newest)
