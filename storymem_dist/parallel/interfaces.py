"""Which network interface of this node leads to another one. Reads Linux's tables; knows no ranks.

Gloo, without a name in ``GLOO_SOCKET_IFNAME``, listens at the address that this host's own name has. On many machines
that is 127.0.1.1, where no other node can reach it.
"""

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "GLOO_SOCKET_IFNAME"

_ROUTES = Path("/proc/net/route")
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_ANY_PORT = 9  # nothing is sent


def set_gloo_interface(head: str) -> None:
    """Let gloo use the interface that leads to ``head`` in this process, unless ``GLOO_SOCKET_IFNAME`` is set."""
    if not os.environ.get(VARIABLE) and (name := interface_towards(head)) is not None:
        os.environ[VARIABLE] = name


def interface_towards(head: str) -> str | None:
    """Return the name of the interface through which this node reaches ``head``; None where that is not known.

    Where the name ``head`` stands for a loopback address, this is that node, and it is the interface of the default
    route. None for ``localhost``, which no other node can use.
    """
    if head == "localhost" or _is_loopback(head):
        return None
    addresses = list(_own_addresses_towards(head))
    for address in addresses:
        if not _is_loopback(address):
            for name in interface_names():
                if address in _addresses_of(name):
                    return name
    return _interface_of_default_route() if addresses else None


def interface_names() -> list[str]:
    """Return the names of this node's interfaces."""
    return [name for _, name in socket.if_nameindex()]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _own_addresses_towards(head: str) -> Iterator[str]:
    """This node's addresses from which it would send to each address of ``head``."""
    with suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(head, _ANY_PORT, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(place)  # of a datagram socket: only chooses a route
                yield str(probe.getsockname()[0]).partition("%")[0]


def _addresses_of(name: str) -> Iterator[str]:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
        yield socket.inet_ntoa(answer[20:24])
    with suppress(OSError):
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, *_, of_name = line.split()
            if of_name == name:
                yield str(ipaddress.IPv6Address(int(digits, 16)))


def _interface_of_default_route() -> str | None:
    routes: list[tuple[int, str]] = []
    with suppress(OSError):
        for line in _ROUTES.read_text().splitlines()[1:]:
            name, destination, *_, metric, mask = line.split()[:8]
            if int(destination, 16) == 0 and int(mask, 16) == 0:
                routes.append((int(metric), name))
    return min(routes)[1] if routes else None
