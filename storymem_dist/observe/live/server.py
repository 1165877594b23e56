"""Serves the live page until Ctrl-C or SIGTERM: the socket, what is printed, and a clean end."""

import contextlib
import getpass
import importlib
import ipaddress
import logging
import os
import re
import secrets
import signal
import socket
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h11
import uvicorn

from storymem_dist.errors import ConfigError, shown
from storymem_dist.files import read_limited
from storymem_dist.observe.live.access import Access
from storymem_dist.observe.live.app import LivePages
from storymem_dist.observe.live.connections import Connection
from storymem_dist.observe.live.hub import Hub
from storymem_dist.observe.live.sources import Sources
from storymem_dist.terminal.streams import print_error, print_line

LONGEST_END_SECONDS = 2
"""Longest time that a stopped server waits for answers that it is sending."""

PATIENCE_SECONDS = 3.0
"""After this long a person hears why nothing is printed yet."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,200}")


def serve(paths: Sequence[Path], *, host: str, port: int, control: bool, token_file: Path | None = None) -> None:
    """Serve the pages of the run folders ``paths`` (or of the runs in a sweep's folder) until a signal ends it.

    Anybody on this machine may read. A token is needed to change the queue (``control``); with a ``token_file``, or a
    ``host`` that other machines reach, to read as well.

    Raises ``RunFolderError`` for what is no run folder, and ``ConfigError`` for a host, port or token file that cannot
    be used.
    """
    with open_listener(host, port) as listener:
        address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
        needs_token = control or token_file is not None or not address.is_loopback
        access = Access(
            names=frozenset({host.strip("[]").lower(), str(address), *(() if address.is_loopback else _own_names())}),
            any_address=address.is_unspecified,
            token=(_read_token(token_file) if token_file is not None else secrets.token_urlsafe(32))
            if needs_token
            else None,
            read_with_token=token_file is not None or not address.is_loopback,
            control=control,
        )
        if control:
            importlib.import_module("storymem_dist.observe.queue.asking")  # it takes a second: not at the first click
        waiting = threading.Timer(PATIENCE_SECONDS, print_error, ["storymem-report: reading what is there already"])
        waiting.daemon = True
        waiting.start()
        try:
            hub = Hub(Sources(paths))
        finally:
            waiting.cancel()
        server = LiveServer(hub, access)
        for line in announcement(listener, host, access):
            print_line(line)
        server.run(sockets=[listener])


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens on ``host`` and ``port`` (0: any free one). Raises ``ConfigError``."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port} is not allowed; use 0 (any free port) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, ValueError) as error:
        raise ConfigError(f"--host {shown(host)} is no name or address of this machine: {error}") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {host} --port {port} cannot be used: {error.strerror or error}; --port 0 takes any free port"
        ) from None
    return listener


def announcement(listener: socket.socket, host: str, access: Access) -> Iterator[str]:
    """Yield what is printed: the address to open, and how to reach it from another machine."""
    bound, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(bound.partition("%")[0])
    name = socket.gethostname() if address.is_unspecified else host.strip("[]")
    secret = ""
    if access.token is not None:
        secret = f"{'?' if access.read_with_token else '#'}token={access.token}"
    yield f"live page: http://{_in_address(name)}:{port}/{secret}"
    if address.is_unspecified and (number := _own_address(listener.family)):  # a phone may not know the name
        yield f"or: http://{_in_address(number)}:{port}/{secret}"
    if address.is_loopback and _is_remote():
        yield f"from another machine: ssh -L {port}:{_in_address(name)}:{port} {_user()}@{socket.gethostname()}"
    yield "it can change the queue" if access.control else "it only shows the run; --control adds buttons"
    yield "Ctrl-C ends it; jobs are not affected"


class LiveServer(uvicorn.Server):
    """Serves a hub's pages. Ends the streams of all clients when it is stopped, and returns: signals are its end."""

    def __init__(self, hub: Hub, access: Access) -> None:
        config = uvicorn.Config(
            LivePages(hub, access).application(),
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # a client's broken request is answered; nobody here can mend it
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=LONGEST_END_SECONDS,
        )
        super().__init__(config)
        self._hub = hub
        logging.getLogger("uvicorn.error").addFilter(_is_fault_of_server)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._hub.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the server. Unlike uvicorn's own, sends the signal to nobody afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_fault_of_server(record: logging.LogRecord) -> bool:
    """Whether a message is not about a client that breaks HTTP while it is being answered, and so gets no answer."""
    return record.exc_info is None or not isinstance(record.exc_info[1], h11.LocalProtocolError)


def _read_token(path: Path) -> str:
    """Return the token in a file that only its owner can read; make one where there is none. Raises ``ConfigError``."""
    try:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # before the advice about its mode
            raise ConfigError(f"--token-file {path} is no file; give the name of one that may be made")
        if mode & 0o077:
            raise ConfigError(f"--token-file {path} can be read by others; chmod 600 {path}")
        token = read_limited(path, 1000).decode().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--token-file {path} cannot be used: {error}") from None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"--token-file {path} holds no token: 22 to 200 letters, digits, - or _; remove it to get one"
        )
    return token


def _own_names() -> set[str]:
    return {socket.gethostname().lower(), socket.getfqdn().lower()}


def _own_address(family: socket.AddressFamily) -> str:
    """The address of this machine in its network; empty where it has none. Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(("2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1", 9))  # addresses of nobody
        found: str = probe.getsockname()[0]
        return found.partition("%")[0]
    return ""


def _in_address(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def _is_remote() -> bool:
    """Whether the person sits at another machine: an SSH session, a job of a cluster."""
    return any(name in os.environ for name in ("SSH_CONNECTION", "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"))


def _user() -> Any:
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return "USER"
