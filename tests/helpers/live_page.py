"""Live pages for tests: requests straight to the application, or a real server in a thread of this process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from storymem_dist.observe.live.access import Access
from storymem_dist.observe.live.app import LivePages
from storymem_dist.observe.live.hub import Hub
from storymem_dist.observe.live.server import LiveServer, open_listener
from storymem_dist.observe.live.sources import Sources

TOKEN = "a-token-that-only-tests-have"
CONTROL = Access(token=TOKEN, control=True)
ONLY_READING = Access()


class Clock:
    """A monotonic clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class LivePage:
    """The application over some run folders; no server."""

    hub: Hub
    application: Any

    def send(self, *requests: tuple[str, str] | tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Send requests (method, address, more arguments of httpx), one after the other."""

        async def all_of_them() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=self.application)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8321") as client:
                return [await client.request(one[0], one[1], **(one[2] if len(one) > 2 else {})) for one in requests]

        return asyncio.run(all_of_them())

    def get(self, address: str, **more: Any) -> httpx.Response:
        return self.send(("GET", address, more))[0]

    def ask(self, headers: dict[str, str] | None = None, address: str = "/control", **request: Any) -> httpx.Response:
        """Press a button: POST a request, with the token."""
        return self.send(
            ("POST", address, {"json": request, "headers": {"x-storymem-token": TOKEN} | (headers or {})})
        )[0]


@contextlib.contextmanager
def live_page(
    *paths: Path, access: Access = CONTROL, clock: Callable[[], float] = time.monotonic
) -> Iterator[LivePage]:
    hub = Hub(Sources(paths, clock=clock))
    try:
        yield LivePage(hub, LivePages(hub, access).application())
    finally:
        hub.close()


@dataclass
class Served:
    """A server in a thread."""

    hub: Hub
    port: int
    server: LiveServer
    thread: threading.Thread

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def served(
    paths: Sequence[Path], *, access: Access = CONTROL, port: int = 0, interval: float = 1.0
) -> Iterator[Served]:
    """Serve ``paths`` on a port of this machine until the block ends, or ``stop`` is called."""
    with open_listener("127.0.0.1", port) as listener:
        hub = Hub(Sources(paths), interval=interval)
        server = LiveServer(hub, access)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running = Served(hub, listener.getsockname()[1], server, thread)
        try:
            yield running
        finally:
            running.stop()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
