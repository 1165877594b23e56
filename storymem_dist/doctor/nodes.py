"""Checks of what ranks on several nodes need: how they reach each other. Reads state, changes nothing."""

import os
from collections.abc import Iterator

from storymem_dist.config.schema import RenderConfig
from storymem_dist.doctor.finding import Finding, ok, problem
from storymem_dist.parallel.interfaces import VARIABLE, interface_names, interface_towards


def check_nodes(settings: RenderConfig) -> Iterator[Finding]:
    """Through which interface the ranks of a replica over several nodes decide together (gloo); nothing on one node."""
    launch = settings.launch
    over_nodes = settings.parallel.across_nodes and launch.num_nodes > 1
    given = os.environ.get(VARIABLE)
    if given:
        names = interface_names()
        wrong = [name for name in given.split(",") if name not in names]
        if wrong:
            fix = f"set {VARIABLE} to one of {', '.join(names)}, or unset it"
            yield problem("network", "gloo", f"{VARIABLE}={given}, and there is no {wrong[0]} here", fix)
        else:
            yield ok("network", "gloo", f"{VARIABLE}={given}")
    elif over_nodes:
        if (name := interface_towards(launch.head)) is None:
            fix = f"set {VARIABLE} to the interface that leads to the other nodes (ip route get shows it)"
            yield problem("network", "gloo", f"no interface leads to launch.head={launch.head}", fix)
        else:
            yield ok("network", "gloo", f"{name} leads to launch.head={launch.head}; ranks use it")
