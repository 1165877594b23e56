"""One reader for all clients: how often it looks, what it sends, and that nothing stays behind when clients go."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.counting import counting
from storymem_dist.observe.live import hub as hub_module
from storymem_dist.observe.live.hub import Hub
from storymem_dist.observe.live.sources import LiveRun, Sources, snapshot
from tests.helpers.fake_run import FakeReplica, FakeRun, whole_run
from tests.helpers.live_page import Clock, LivePage, live_page


@pytest.fixture
def going(tmp_path: Path) -> Iterator[tuple[FakeRun, FakeReplica]]:
    """A run that goes on: one shot is done."""
    run = FakeRun(tmp_path / "run", num_stories=1, num_shots=3)
    with run.replica() as replica:
        run.shot(replica, 0, 0)
        yield run, replica


class Client:
    """A browser that follows a page, as the application sees it."""

    def __init__(self, page: LivePage, *, query: str = "page=", headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.gone = asyncio.Event()
        self.status = 0
        self._text = ""
        self._more = asyncio.Event()
        scope = {
            "type": "http", "method": "GET", "path": "/events", "raw_path": b"/events", "root_path": "",
            "query_string": query.encode(), "headers": [(b"host", b"127.0.0.1"), *headers], "http_version": "1.1",
        }  # fmt: skip
        self.task = asyncio.create_task(page.application(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self._text += message.get("body", b"").decode()
        self._more.set()

    async def next(self, beginning: str = "id: ") -> dict[str, Any]:
        """The next event that begins like this."""
        async with asyncio.timeout(10):
            while True:
                event, separator, rest = self._text.partition("\n\n")
                if not separator:
                    self._more.clear()
                    await self._more.wait()
                    continue
                self._text = rest
                if event.startswith(beginning):
                    lines = dict(line.split(": ", 1) for line in event.splitlines() if not line.startswith(":"))
                    return {"id": lines.get("id"), **(json.loads(lines["data"]) if "id" in lines else {})}

    async def leave(self) -> None:
        self.gone.set()
        await self.task


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks every 20 ms, and signs of life every 50 ms."""
    monkeypatch.setattr("storymem_dist.observe.live.sources.SCAN_SECONDS", 0.0)
    monkeypatch.setattr(hub_module, "KEEP_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(hub_module, "LARGEST_SHARE", 1.0)
    monkeypatch.setattr(Hub.__init__, "__kwdefaults__", {"interval": 0.02})


def test_a_client_hears_which_parts_changed(going: tuple[FakeRun, FakeReplica], quick: None) -> None:
    run, replica = going

    async def follow(page: LivePage) -> None:
        client = Client(page)
        first = await client.next()
        assert client.status == 200 and first["id"] == first["identity"]
        await client.next(": still here")
        run.shot(replica, 0, 1)
        changed: set[str] = set()
        while not {"shot:story_0:shot_02", "head"} <= changed:  # a look may come while the shot is rendered
            news = await client.next()
            changed |= {name for name, digest in news["digests"].items() if first["digests"].get(name) != digest}
        assert not {"shot:story_0:shot_01", "shot:story_0:shot_03", "stories", "settings"} & changed
        await client.leave()

    with live_page(run.root) as page:
        asyncio.run(follow(page))


@pytest.mark.parametrize("by_header", [True, False])
def test_a_client_that_comes_back_to_another_server_hears_only_news(
    going: tuple[FakeRun, FakeReplica], quick: None, by_header: bool
) -> None:
    run, replica = going
    with live_page(run.root) as page:
        known = page.get("/parts").json()["identity"]

    async def come_back(page: LivePage) -> None:
        headers = ((b"last-event-id", known.encode()),) if by_header else ()
        client = Client(page, query="page=" if by_header else f"page=&known={known}", headers=headers)
        assert await client.next("") and await client.next("")  # how to come back, then a sign of life: no news
        assert "data: {" not in client._text
        run.shot(replica, 0, 1)
        assert (await client.next())["identity"] != known
        await client.leave()

    with live_page(run.root) as page:
        asyncio.run(come_back(page))


def test_one_reader_looks_once_a_second_for_any_number_of_clients_and_never_for_none(
    going: tuple[FakeRun, FakeReplica],
) -> None:
    run, _ = going
    clock = Clock()

    async def follow(page: LivePage, live: LiveRun) -> None:
        begun = live.num_scans
        assert begun == 1, "the folder is read when the server starts"
        clients = [Client(page) for _ in range(25)] + [Client(page, query="page=story_0") for _ in range(25)]
        for client in clients:
            await client.next()
        for second in range(5):
            clock.now += 1.0
            while live.num_scans < begun + second + 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert live.num_scans == begun + second + 1
        assert len([thread for thread in threading.enumerate() if thread.name.startswith("storymem-live")]) == 1
        for client in clients:
            await client.leave()
        assert page.hub.num_followers == 0
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1, "no task stays behind"
        scans = live.num_scans
        clock.now += 100
        await asyncio.sleep(0.1)
        assert live.num_scans == scans, "nobody looks"

    with live_page(run.root, clock=clock) as page:
        page.hub._interval = 0.02
        asyncio.run(follow(page, next(iter(page.hub.sources.runs.values()))))


def test_many_requests_in_a_second_are_one_look(going: tuple[FakeRun, FakeReplica]) -> None:
    clock = Clock()
    with live_page(going[0].root, clock=clock) as page:
        clock.now += 5
        page.send(*[("GET", address) for address in ("/", "/parts", "/report/story_0.html") for _ in range(10)])
        assert next(iter(page.hub.sources.runs.values())).num_scans == 2


def test_a_client_of_a_list_costs_a_bounded_number_of_looks(tmp_path: Path) -> None:
    for number in range(20):
        FakeRun(tmp_path / f"run{number:02d}", num_stories=1, num_shots=1)
    clock = Clock()
    hub = Hub(Sources([tmp_path], clock=clock))
    for _ in range(3):
        clock.now += 2
        hub.look(("", ""))
    assert {run.num_scans for run in hub.sources.runs.values()} == {2, 3}, "all in turn, eight at once"
    assert sum(run.num_scans for run in hub.sources.runs.values()) == 20 + 3 * 8
    hub.close()


def test_too_many_clients_are_refused(going: tuple[FakeRun, FakeReplica], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storymem_dist.observe.live.app.MAX_CLIENTS", 2)

    async def follow(page: LivePage) -> None:
        clients = [Client(page), Client(page)]
        for client in clients:
            await client.next()
        third = Client(page)
        await third.task
        assert third.status == 503
        for client in clients:
            await client.leave()

    with live_page(going[0].root) as page:
        asyncio.run(follow(page))


def test_a_stopped_server_ends_the_streams_and_refuses_the_rest(going: tuple[FakeRun, FakeReplica]) -> None:
    async def follow(page: LivePage) -> None:
        client = Client(page)
        await client.next()
        page.hub.close()
        await asyncio.wait_for(client.task, 5)

    with live_page(going[0].root) as page:
        asyncio.run(follow(page))
        assert page.get("/").status_code == 503


def test_a_fault_of_the_reader_is_said_and_ends_no_stream(
    going: tuple[FakeRun, FakeReplica], quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, replica = going
    real, faults = Hub._look_all, iter([True, True, False])

    def look(self: Hub, places: Any) -> Any:
        if next(faults, False):
            raise ZeroDivisionError
        return real(self, places)

    monkeypatch.setattr(Hub, "_look_all", look)

    async def follow(page: LivePage) -> None:
        client = Client(page)
        first = await client.next()
        run.shot(replica, 0, 1)
        assert (await client.next())["identity"] != first["identity"]
        await client.leave()

    with live_page(run.root) as page:
        asyncio.run(follow(page))
    assert "the run cannot be shown" in caplog.text and "ZeroDivisionError" in caplog.text


def test_time_alone_is_no_news() -> None:
    first = snapshot({"head": "a", "foot": "written at 1"})
    second = snapshot({"head": "a", "foot": "written at 2"})
    assert first.identity == second.identity and first.digests["foot"] != second.digests["foot"]
    assert snapshot({"head": "b", "foot": "written at 1"}).identity != first.identity
    assert snapshot(first.parts, paused=True).identity != first.identity


def test_a_look_at_a_run_where_nothing_happens_costs_the_same_for_any_number_of_shots(tmp_path: Path) -> None:
    costs = []
    for num_shots in (1, 4):
        run = whole_run(tmp_path / f"run{num_shots}", num_stories=2, num_shots=num_shots, num_replicas=1)
        clock = Clock()
        hub = Hub(Sources([run.root], clock=clock))
        place = (run.root.name, "")
        for path in run.root.rglob("*"):
            os.utime(path, (1.0, 1.0))  # what was written just now is read twice
        for _ in range(2):
            clock.now += 1
            hub.look(place)
        clock.now += 1
        with counting(run.root) as operations:
            for _ in range(5):  # as many clients
                hub.look(place)
        costs.append(operations.total)
        hub.close()
    assert costs[0] == costs[1] <= 25
