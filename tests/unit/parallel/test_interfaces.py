"""Ranks on several nodes talk gloo over the interface that leads to the head node."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.config.composing import compose_settings
from storymem_dist.doctor.nodes import check_nodes
from storymem_dist.errors import LayoutError
from storymem_dist.parallel import interfaces, session
from storymem_dist.parallel.interfaces import VARIABLE, interface_towards, set_gloo_interface
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings

ADDRESSES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5"], "ib0": ["192.168.7.5", "fe80::7"]}
OWN_ADDRESS_TOWARDS = {"node1": "192.168.7.5", "node1.lan": "10.0.0.5", "node6": "fe80::7", "myself": "127.0.1.1"}
ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
ib0 00000000 0 3 0 0 900 00000000 0 0 0
eth0 00000000 010200C0 3 0 0 100 00000000 0 0 0
ib0 000200C0 00000000 1 0 0 0 00FFFFFF 0 0 0
"""


@pytest.fixture(autouse=True)
def a_node_with_two_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    routes = tmp_path / "route"
    routes.write_text(ROUTES)
    monkeypatch.setattr(interfaces, "_ROUTES", routes)
    monkeypatch.setattr(interfaces, "interface_names", lambda: list(ADDRESSES))
    monkeypatch.setattr(interfaces, "_addresses_of", lambda name: iter(ADDRESSES[name]))
    monkeypatch.setattr(interfaces, "_own_addresses_towards", own_addresses)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    return routes


def own_addresses(head: str) -> Iterator[str]:
    if head in OWN_ADDRESS_TOWARDS:
        yield OWN_ADDRESS_TOWARDS[head]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("node1", "ib0"),
        ("node1.lan", "eth0"),
        ("node6", "ib0"),
        ("myself", "eth0"),  # this is the head, and its name is 127.0.1.1 here: the default route
        ("unknown", None),
        ("localhost", None),
        ("127.0.0.1", None),
        ("::1", None),
    ],
)
def test_the_interface_that_leads_to_the_head(head: str, expected: str | None) -> None:
    assert interface_towards(head) == expected
    set_gloo_interface(head)
    assert os.environ.get(VARIABLE) == expected


def test_a_head_without_any_route_has_none(a_node_with_two_networks: Path) -> None:
    a_node_with_two_networks.write_text(ROUTES.splitlines()[0])
    assert interface_towards("myself") is None


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "bond0")
    set_gloo_interface("node1")
    assert os.environ[VARIABLE] == "bond0"


def test_this_machines_own_tables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "127.0.0.1" in interfaces._addresses_of("lo")
    assert list(interfaces._own_addresses_towards("localhost"))[:1] in (["127.0.0.1"], ["::1"])
    route = interfaces._interface_of_default_route()
    assert route is None or route in interfaces.interface_names()
    if route is not None and (addresses := list(interfaces._addresses_of(route))):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 2, 17, "", (addresses[0], 9))])
        assert interface_towards("this-node") == route


@pytest.mark.parametrize(("ranks_per_node", "expected"), [(1, "ib0"), (2, None)])
def test_a_session_sets_it_before_groups_start_on_several_nodes_only(
    ranks_per_node: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts(*_: Any, **__: Any) -> None:
        assert os.environ.get(VARIABLE) == expected
        raise LayoutError("far enough")

    environment = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks_per_node}
    for name, value in {**environment, "MASTER_ADDR": "node1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(session.dist, "init_process_group", starts)
    with pytest.raises(LayoutError, match="far enough"):
        start_session(ParallelSettings(ulysses=2, across_nodes=True, device="cpu"))


@pytest.mark.parametrize(
    ("given", "head", "state", "value"),
    [
        (None, "node1", "ok", "ib0 leads to launch.head=node1"),
        (None, "unknown", "problem", "no interface leads to launch.head=unknown"),
        ("lo", "unknown", "ok", "GLOO_SOCKET_IFNAME=lo"),
        ("eth9", "node1", "problem", "there is no eth9 here"),
    ],
)
def test_the_doctor_says_which_one(
    given: str | None, head: str, state: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["parallel=two_nodes_16gpu", "launch=torchrun", "launch.num_nodes=2", f"launch.head={head}"]
    settings = compose_settings(["model=nano", *overrides])
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    (finding,) = check_nodes(settings)
    assert (finding.state, finding.name) == (state, "gloo")
    assert value in finding.value
    assert bool(finding.fix) == (state == "problem")


def test_the_doctor_is_silent_on_one_node() -> None:
    assert list(check_nodes(compose_settings(["model=nano"]))) == []
