"""Which requests are answered: the Host and Origin of browsers, the token, and the headers of every answer.

A page of somebody else that a browser has open can send requests to this machine. What stops it: the Host must be a
name of this server (a foreign name that leads here is refused), a change needs the token in a header that no form can
send, and what a page of another origin sends is refused: it can only link here. Pure ASGI; knows nothing of runs.
"""

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-storymem-token"
READING = ("GET", "HEAD")

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:(?P<port>\d{1,5}))?")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, kw_only=True)
class Access:
    """What is allowed.

    ``names``: the names and addresses of this server, next to those of this machine for itself. ``any_address``: it
    listens on all addresses of the machine, so a Host that is an address is right. ``token``: needed for changes; with
    ``read_with_token`` for reading as well. ``control``: changes are allowed at all.
    """

    names: frozenset[str] = frozenset()
    any_address: bool = False
    token: str | None = None
    read_with_token: bool = False
    control: bool = False

    def knows_host(self, host: str) -> bool:
        """Whether a Host header names this server; with any port, since a tunnel has one of its own."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].strip("[]").lower().rstrip(".")
        return name in _LOCAL_NAMES or name in self.names or (self.any_address and _is_address(name))

    def is_token(self, given: str | None) -> bool:
        """Whether ``given`` is the token; takes the same time for every wrong one."""
        return self.token is not None and given is not None and hmac.compare_digest(given.encode(), self.token.encode())

    @property
    def cookie(self) -> str:
        """Name of the cookie for reading: that of no other server of this machine, since cookies ignore ports."""
        return f"storymem-{hashlib.sha256((self.token or '').encode()).hexdigest()[:12]}"

    @property
    def reading_pass(self) -> str:
        """What that cookie holds: it is made from the token and allows reading alone.

        A browser sends it to the servers of others on this machine, too.
        """
        return hmac.digest((self.token or "").encode(), b"reading", "sha256").hex()

    def may_read(self, given: str | None) -> bool:
        """Whether ``given`` is what the cookie holds."""
        return (
            self.token is not None
            and given is not None
            and hmac.compare_digest(given.encode(), self.reading_pass.encode())
        )


class Guard:
    """Answers 403 to whatever ``access`` forbids and passes on the rest. Puts safe headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _SAFE_HEADERS.items():
                    headers[name] = value
                headers.setdefault("content-security-policy", _NOTHING)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        if (problem := self._problem(scope, headers)) is not None:
            await JSONResponse({"error": problem}, status_code=403)(scope, receive, send_safely)
        elif (address := self._without_token(scope)) is not None:
            response = RedirectResponse(address, status_code=303)
            response.set_cookie(self._access.cookie, self._access.reading_pass, httponly=True, samesite="lax")
            await response(scope, receive, send_safely)
        else:
            await self._app(scope, receive, send_safely)

    def _problem(self, scope: Scope, headers: Headers) -> str | None:
        """Why this request is refused; None where it is not."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.knows_host(hosts[0]):
            return "this server has another name; open the address that storymem-report printed"
        changes = scope["method"] not in READING
        if not self._is_own_page(headers, hosts[0]) and (changes or not _is_opened(headers)):
            return f"a page of another origin may {'change' if changes else 'read'} nothing"
        given = headers.get(TOKEN_HEADER)
        if changes and not self._access.control:
            return "this page only shows the run; start it with --control to change the queue"
        if changes and not self._access.is_token(given):
            return "the token is missing or wrong; open the address that storymem-report printed"
        if changes or not self._access.read_with_token:
            return None
        if any(self._access.is_token(one) for one in (given, _queried(scope))):
            return None
        if self._access.may_read(_cookie(headers, self._access.cookie)):
            return None
        return "the token is missing or wrong; open the address that storymem-report printed"

    @staticmethod
    def _is_own_page(headers: Headers, host: str) -> bool:
        """Whether a request comes from a page of this server, or from no page at all."""
        origins = headers.getlist("origin")
        if origins and (
            len(origins) > 1 or origins[0].lower() not in {f"http://{host}".lower(), f"https://{host}".lower()}
        ):
            return False
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")

    def _without_token(self, scope: Scope) -> str | None:
        """Where a page that was opened with the token in its address is shown: a cookie keeps it, the page the rest."""
        if not self._access.read_with_token or scope["method"] != "GET" or not self._access.is_token(_queried(scope)):
            return None
        rest = [(name, value) for name, value in _query(scope) if name != "token"]
        path = "/" + quote(scope["path"].lstrip("/\\"))  # never //, which would be another server
        fragment = f"#token={self._access.token}" if self._access.control else ""
        return path + (f"?{urlencode(rest)}" if rest else "") + fragment


def _is_opened(headers: Headers) -> bool:
    """Whether a person follows a link to a page; not what a page fetches by itself."""
    return headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _query(scope: Scope) -> list[tuple[str, str]]:
    try:
        return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return []


def _queried(scope: Scope) -> str | None:
    return next((value for name, value in _query(scope) if name == "token"), None)


def _cookie(headers: Headers, name: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return found.value if found is not None else None
