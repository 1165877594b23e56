"""500 hostile requests to a real server: paths, headers, methods, bodies, ranges. Nothing changes, nothing breaks."""

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.helpers.fake_run import whole_run
from tests.helpers.live_page import TOKEN, served, wait_until

CLIP = "stories/story_0/shot_01.mp4"
PIECES = [
    "..",
    ".",
    "",
    "%2e%2e",
    "%2e%2e%2f",
    "..%2f",
    "%252e%252e",
    "..\\",
    "%5c..%5c",
    "%00",
    "\\",
    "//",
    "%2f",
    "~",
    "~root",
    "stories",
    "story_0",
    "shot_01.mp4",
    "config",
    "events",
    "c0ffee.yaml",
    "storymem_run.json",
    "etc",
    "passwd",
    "%ff%fe",
    "%c0%ae%c0%ae",
    "%F0%9F%92%A9",
    "%e2%80%ae",
    "\u202e".encode().decode("latin-1"),
    "a" * 300,
    "%0d%0aX-Evil:1",
    ";",
    "?",
    "#",
    "*",
    "{path}",
    "$(id)",
    "<script>",
    "con",
    "leases",
    "requests",
    "STOP",
    "__proto__",
    "null",
    "-1",
    "report.html",
]
ROOTS = [
    "/",
    "/media/",
    "/poster/",
    "/thumbnail/",
    "/report/",
    "/parts?page=",
    "/events?page=",
    "/control",
    "/runs/",
    "/../",
    "",
]
METHODS = [
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PROPFIND",
    "get",
    "G\0T",
    "",
    "Ω",
]
RANGES = [
    "bytes=0-",
    "bytes=-1",
    "bytes=5-3",
    "bytes=--5",
    "bytes=99999999999999999999-",
    "bytes=0-0,1-1,2-2",
    "bytes=" + "0-1," * 200,
    "bytes=a-b",
    "lines=0-1",
    "bytes",
    "bytes=",
    "bytes=0-0" + "0" * 5000,
    "bytes=1_0-2_0",
    "bytes=,-,",
]
HEADERS = [
    "Host: evil.example",
    "Host: 127.0.0.1\r\nHost: evil.example",
    "Host:",
    "Origin: null",
    "Origin: http://evil.example",
    f"X-Storymem-Token: {TOKEN[:-1]}",
    "X-Storymem-Token: " + "x" * 9000,
    "Cookie: storymem-x=1; \x7f=\x01",
    "Cookie: " + "a=b;" * 999,
    "Content-Length: -1",
    "Content-Length: 99999999999",
    "Content-Length: 1\r\nContent-Length: 2",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 3",
    "Transfer-Encoding: gzip",
    "Expect: 100-continue",
    "Upgrade: websocket",
    "Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: x",
    "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-Host: evil.example",
    "X-HTTP-Method-Override: DELETE",
    "Accept-Encoding: gzip;q=x",
    "If-None-Match: *",
    "If-Range: x",
    "Last-Event-ID: \x00",
    "Content-Type: application/json; charset=utf-7",
    "Content-Type: multipart/form-data",
    "No colon at all",
    " Folded: x",
    "X: " + "y" * 70000,
    "Sec-Fetch-Site: cross-site",
    "Accept: text/event-stream",
]
BODIES = [
    b"",
    b"{}",
    b"[]",
    b'{"action":"pause"}',
    b'{"action":"stop","now":true}',
    b'{"action":"rerender","story_id":"../x"}',
    b'{"action":"skip","story_id":"story_0\\u0000"}',
    b'{"action":"skip","story_id":"\\ud800"}',
    b"{" * 5000,
    b"[" * 20000,
    b'{"action":' + b"9" * 5000 + b"}",
    b"\xff\xfe\x00",
    b"x" * 40000,
    b'{"action":"pause"' * 2,
    b"action=pause",
    b"0\r\n\r\n",
    b'{"action":"add","story_id":"x","story":{}}',
    b"5\r\nhello\r\n",
    b"fffffffffffffffff\r\n",
]


def hostile(random_: random.Random) -> bytes:
    """One request, as bytes. One in four has the right token: what it asks must be refused for itself."""
    if random_.random() < 0.04:
        return random_.randbytes(random_.randrange(1, 3000))
    path = random_.choice(ROOTS) + random_.choice(["/", "%2f", ""]).join(
        random_.choices(PIECES, k=random_.randrange(6))
    )
    method = random_.choice(METHODS) if random_.random() < 0.5 else random_.choice(["GET", "POST"])
    body = random_.choice(BODIES) if random_.random() < 0.6 else b""
    headers = random_.choices(HEADERS, k=random_.randrange(4))
    if random_.random() < 0.2:  # right in all but one thing
        path = random_.choice(["/media/", "/poster/", "/thumbnail/"]) + CLIP
        method, body, headers = "GET", b"", headers[:1]
    if not any(line.startswith("Host") for line in headers):
        headers.append("Host: localhost:1")
    if random_.random() < 0.4:
        headers.append(f"Range: {random_.choice(RANGES)}")
    if random_.random() < 0.25 and body != b'{"action":"pause"}' and b'"now":true' not in body:
        headers += [f"X-Storymem-Token: {TOKEN}", "Content-Type: application/json"]
    if body and not any(line.startswith(("Content-Length", "Transfer")) for line in headers):
        headers.append(f"Content-Length: {len(body)}")
    text = f"{method} {path} HTTP/{random_.choice(['1.1', '1.1', '1.1', '1.0', '9.9'])}\r\n" + "\r\n".join(headers)
    return text.encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def answer_to(port: int, request: bytes) -> bytes:
    """The beginning of the answer; empty where the server hangs up or waits for more."""
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as connection:
        try:
            connection.sendall(request)
            return connection.recv(64)
        except (ConnectionError, TimeoutError):
            return b""


def digest_of(root: Path) -> str:
    """A digest of all names, sizes, times and contents."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders.sort()
        for path in [Path(folder), *(Path(folder) / name for name in sorted(names))]:
            found = path.lstat()
            digest.update(f"{path} {found.st_mode} {found.st_mtime_ns} {found.st_size}\n".encode())
            digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def test_500_hostile_requests_change_nothing_and_break_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=2, num_replicas=1)
    random_ = random.Random(21)
    requests = [hostile(random_) for _ in range(500)]
    assert len(set(requests)) > 490
    before = digest_of(tmp_path)
    codes: dict[bytes, int] = {}
    with served([run.root]) as page:
        for request in requests:
            answer = answer_to(page.port, request)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 "), request[:200]
            assert not answer.startswith((b"HTTP/1.1 500", b"HTTP/1.1 502")), request[:200]
            codes[answer[9:12]] = codes.get(answer[9:12], 0) + 1
        with httpx.Client(base_url=page.address) as client:
            assert client.get("/").status_code == 200
            assert client.get(f"/media/{CLIP}", headers={"range": "bytes=0-7"}).status_code == 206
        wait_until(lambda: page.hub.num_followers == 0)
    assert digest_of(tmp_path) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncio")]
    assert {b"200", b"206", b"400", b"403", b"404", b"405", b"416"} <= codes.keys(), codes
    assert "Traceback" not in caplog.text and "Traceback" not in capsys.readouterr().err


def test_a_client_that_never_finishes_keeps_nobody_waiting(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)

    async def both(port: int) -> None:
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in slow:
            writer.write(f"POST /control HTTP/1.1\r\nHost: localhost\r\nX-Storymem-Token: {TOKEN}\r\n".encode())
            writer.write(b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            await writer.drain()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await asyncio.wait_for(client.get("/"), 5)).status_code == 200
        for _, writer in slow:
            writer.close()

    with served([run.root]) as page:
        asyncio.run(both(page.port))


def test_connections_that_ask_nothing_are_closed_and_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole_run(tmp_path / "run", num_stories=1, num_shots=1, num_replicas=1)
    monkeypatch.setattr("storymem_dist.observe.live.connections.REQUEST_SECONDS", 0.5)
    monkeypatch.setattr("storymem_dist.observe.live.connections.MAX_CONNECTIONS", 20)
    with served([run.root]) as page, contextlib.ExitStack() as stack:
        connect = partial(socket.create_connection, ("127.0.0.1", page.port), timeout=10)
        open_ones = [stack.enter_context(connect()) for _ in range(20)]
        for number, one in enumerate(open_ones):  # nothing at all, half a request, an answered one and then half of one
            one.sendall(
                [b"", b"GET / HTTP/1.1\r\nHost: ", b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\nGET"][number % 3]
            )
        wait_until(lambda: len(page.server.server_state.connections) == 20)
        with stack.enter_context(connect()) as beyond, contextlib.suppress(ConnectionError):
            assert beyond.recv(1) == b""
        for one in open_ones:
            with contextlib.suppress(ConnectionError):
                while one.recv(4096):
                    pass
        with httpx.stream("GET", f"{page.address}/events?page=", timeout=10) as stream:
            time.sleep(1.2)  # an answer may take any time
            assert next(stream.iter_lines()).startswith("retry")
            assert page.hub.num_followers == 1
        assert httpx.get(page.address).status_code == 200
    assert "Traceback" not in capsys.readouterr().err
