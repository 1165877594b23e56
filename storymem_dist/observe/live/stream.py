"""Server-sent events: one open answer to one client, which ends when the client goes or the server stops."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

RETRY_MILLISECONDS = 2000
KEEP_ALIVE_SECONDS = 15.0
"""A sign of life after this long without news: tunnels keep the connection, and a client notices a dead one."""

KEEP_ALIVE = b": still here\nevent: alive\ndata: 1\n\n"


def message(identity: str, value: Any) -> bytes:
    """Return one event that carries ``value`` as JSON; a client that comes back names ``identity``."""
    return f"id: {identity}\ndata: {json.dumps(value)}\n\n".encode()


class EventStream(Response):
    """Sends what ``parts`` yields until it ends or the client is gone, whichever is first."""

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with anyio.create_task_group() as group:
            group.start_soon(self._send_all, send, group.cancel_scope)
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

    async def _send_all(self, send: Send, scope: anyio.CancelScope) -> None:
        await send(_part(f"retry: {RETRY_MILLISECONDS}\n\n".encode()))
        async for part in self._parts:
            await send(_part(part))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        scope.cancel()


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}
