"""Who may read and change: Host, Origin, token and cookie, and the headers of every answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.observe.live.access import Access
from tests.helpers.fake_run import FakeRun
from tests.helpers.live_page import CONTROL, ONLY_READING, TOKEN, LivePage, live_page

HOST = "127.0.0.1:8321"
ALL = Access(
    names=frozenset({"node7", "node7.cluster"}), any_address=True, token=TOKEN, read_with_token=True, control=True
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FakeRun(tmp_path_factory.mktemp("access") / "run", num_stories=1, num_shots=1).root


@pytest.fixture(scope="module")
def page(root: Path) -> Iterator[LivePage]:
    with live_page(root) as page:
        yield page


def requests_in(root: Path) -> int:
    return len(list(root.glob("requests/*/*.json")))


@pytest.mark.parametrize("host", [HOST, "localhost:9000", "LOCALHOST", "[::1]:8321", "127.0.0.1", "localhost.:1"])
def test_names_of_this_machine_are_known_with_any_port(page: LivePage, host: str) -> None:
    assert page.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "192.168.1.7", "localhost@evil", "", "[::1", "a b",
     "127.0.0.1:port", "127.0.0.1:8321:1", "0.0.0.0",
     "localhost.evil.example", "127.0.0.1.nip.io", "[::ffff:127.0.0.1]", "2130706433", "127.1",
     "localhost, evil.example"],
)  # fmt: skip
def test_a_foreign_name_that_leads_here_is_refused(page: LivePage, host: str) -> None:
    for method, address in (("GET", "/"), ("GET", "/events"), ("POST", "/control")):
        answer = page.send((method, address, {"headers": {"host": host, "x-storymem-token": TOKEN}}))[0]
        assert answer.status_code == 403 and "another name" in answer.json()["error"]


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_changes_without_the_token(page: LivePage, root: Path, token: str | None, method: str) -> None:
    headers = {} if token is None else {b"x-storymem-token": token.encode("latin-1")}
    for address in ("/control", "/", "/no", "/media/x"):
        answer = page.send((method, address, {"json": {"action": "pause"}, "headers": headers}))[0]
        assert answer.status_code == 403 and "token" in answer.json()["error"]
    assert requests_in(root) == 0


def test_a_token_in_the_address_or_a_cookie_changes_nothing(page: LivePage, root: Path) -> None:
    for more in ({"params": {"token": TOKEN}}, {"headers": {"cookie": f"{CONTROL.cookie}={TOKEN}"}}):
        answer = page.send(("POST", "/control", {"json": {"action": "pause"}, **more}))[0]
        assert answer.status_code == 403
    assert requests_in(root) == 0


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:8322"}, {"origin": f"ftp://{HOST}"},
     {"origin": ""}, {"origin": f"http://{HOST}.evil.example"}, {"origin": "http://localhost:8321"},
     {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
     {"origin": f"http://{HOST}", "sec-fetch-site": "cross-site"}],
)  # fmt: skip
def test_a_page_of_another_origin_changes_nothing_even_with_the_token(
    page: LivePage, root: Path, headers: dict[str, str]
) -> None:
    answer = page.ask(headers=headers, action="pause")
    assert answer.status_code == 403 and "origin" in answer.json()["error"]
    assert requests_in(root) == 0


@pytest.mark.parametrize(("headers", "status"), [
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, 403),
    ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "origin": "http://127.0.0.1:8322"}, 403),
    ({"origin": "null"}, 403),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, 403),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),
    ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),
    ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
])  # fmt: skip
def test_a_page_of_another_origin_may_link_here_and_read_nothing(
    page: LivePage, headers: dict[str, str], status: int
) -> None:
    for address in ("/", "/parts"):
        assert page.get(address, headers=headers).status_code == status


@pytest.mark.parametrize("control", [False, True])
def test_without_control_no_route_changes_anything(root: Path, control: bool) -> None:
    access = Access(token=TOKEN, control=False) if control else ONLY_READING
    with live_page(root, access=access) as page:
        answer = page.ask(action="pause")
        assert answer.status_code == 403 and "--control" in answer.json()["error"]
    assert requests_in(root) == 0


@pytest.mark.parametrize(("method", "address", "status"), [
    ("POST", "/", 405), ("PUT", "/control", 405), ("DELETE", "/media/x", 405), ("POST", "/no", 404),
    ("GET", "/control", 405), ("OPTIONS", "/control", 405), ("TRACE", "/", 405),
])  # fmt: skip
def test_other_routes_and_methods_are_refused_with_the_token(
    page: LivePage, method: str, address: str, status: int
) -> None:
    assert page.send((method, address, {"headers": {"x-storymem-token": TOKEN}}))[0].status_code == status


def test_every_answer_has_safe_headers(page: LivePage) -> None:
    for address in ("/", "/parts", "/no", "/media/no", "/control"):
        headers = page.get(address).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY" and "default-src 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin" and "cache-control" in headers
        assert "access-control-allow-origin" not in headers


# -- for other machines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(root: Path) -> Iterator[LivePage]:
    with live_page(root, access=ALL) as page:
        yield page


@pytest.mark.parametrize("address", ["/", "/report.html", "/parts", "/events", "/media/x", "/no", "/?token=wrong"])
def test_even_reading_needs_the_token(public: LivePage, address: str) -> None:
    assert public.get(address).status_code == 403


@pytest.mark.parametrize("host", ["node7:8321", "node7.cluster", "10.0.0.7:8321", "[fe80::1]:80", "localhost"])
def test_all_names_of_the_machine_are_known(public: LivePage, host: str) -> None:
    assert public.get("/", headers={"host": host, "x-storymem-token": TOKEN}).status_code == 200
    assert public.get("/", headers={"host": "evil.example", "x-storymem-token": TOKEN}).status_code == 403


def test_the_address_with_the_token_gives_a_cookie_for_reading_and_the_page_the_token(public: LivePage) -> None:
    answer = public.get("/report.html", params={"token": TOKEN, "a": "b"})
    assert answer.status_code == 303
    assert answer.headers["location"] == f"/report.html?a=b#token={TOKEN}"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie  # a link in a chat leads here as well
    assert TOKEN not in cookie, "other servers of this machine get it, too"
    pair = {"cookie": cookie.partition(";")[0]}
    read, parts, changed, stolen = public.send(
        ("GET", "/", {"headers": pair}),
        ("GET", "/parts", {"headers": pair}),
        ("POST", "/control", {"headers": pair, "json": {"action": "pause"}}),
        ("POST", "/control", {"headers": {"x-storymem-token": ALL.reading_pass}, "json": {"action": "pause"}}),
    )
    assert [one.status_code for one in (read, parts, changed, stolen)] == [200, 200, 403, 403]
    other = Access(token=TOKEN + "2", read_with_token=True)
    assert other.cookie != ALL.cookie, "two servers of a machine share cookies"


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "/%2f%2fevil.example", "/http://evil.example"])
def test_the_address_with_the_token_leads_to_no_other_server(public: LivePage, path: str) -> None:
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": "GET", "path": path, "query_string": f"token={TOKEN}".encode(),
        "headers": [(b"host", b"node7")], "root_path": "",
    }  # fmt: skip

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    coroutine = public.application(scope, None, send)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    location = dict(sent[0]["headers"])[b"location"]
    assert location.startswith(b"/") and not location.startswith((b"//", b"/\\"))
