"""Binds each rank to the cores next to its GPU, through torch's launcher: copies from host memory are faster there.

Decides whether this torch and this machine can; torch does the rest. Knows nothing of ranks.
"""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from storymem_dist.errors import ConfigError

_NODES = Path("/sys/devices/system/node")


def numa_options(choice: str, *, on_gpus: bool, accepted: Collection[str]) -> dict[str, Any]:
    """Return what torch's ``LaunchConfig`` takes for ``launch.numa=choice``; empty where ranks are not bound.

    ``accepted``: the names of its fields in this torch.

    ``auto`` binds to the GPU's NUMA node where there are GPUs and several such nodes, and does without where it cannot.
    Raises ``ConfigError`` when a named choice cannot be followed.
    """
    if choice == "off":
        return {}
    missing = _missing(on_gpus, accepted)
    if choice == "auto":
        if missing or _num_nodes() < 2:
            return {}
    elif missing:
        raise ConfigError(f"launch.numa={choice} needs {missing}; use launch.numa=auto or off")
    from torch.numa.binding import AffinityMode, NumaOptions

    try:
        mode = AffinityMode("node" if choice == "auto" else choice)
    except ValueError:
        known = ", ".join(one.value for one in AffinityMode)
        raise ConfigError(f"launch.numa={choice}: torch {torch.__version__} knows {known}") from None
    return {"numa_options": NumaOptions(affinity_mode=mode, should_fall_back_if_binding_fails=choice == "auto")}


def _missing(on_gpus: bool, accepted: Collection[str]) -> str | None:
    """What binding needs and is not here, in words."""
    if not on_gpus:
        return "ranks on GPUs (they are bound to the cores next to their GPU)"
    if "numa_options" not in accepted:
        return f"a newer torch (this is {torch.__version__})"
    if shutil.which("numactl") is None:
        return "the program numactl, which is not installed"
    return None


def _num_nodes() -> int:
    return sum(1 for folder in _NODES.glob("node[0-9]*")) if _NODES.is_dir() else 1
