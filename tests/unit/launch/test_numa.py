"""Ranks are bound to the cores next to their GPU where torch and the machine can do that."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig
from torch.numa.binding import AffinityMode

from storymem_dist.config.launch import NUMA, LaunchSettings
from storymem_dist.errors import ConfigError
from storymem_dist.launch import numa
from storymem_dist.launch.numa import numa_options
from storymem_dist.launch.torchrun import _numa_options
from storymem_dist.parallel.settings import ParallelSettings

ACCEPTED = [field.name for field in fields(LaunchConfig)]


@pytest.fixture(autouse=True)
def two_numa_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("node0", "node1", "power"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


def test_auto_binds_to_the_node_of_the_gpu_and_never_fails() -> None:
    found = numa_options("auto", on_gpus=True, accepted=ACCEPTED)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1, **found)
    assert config.numa_options is not None
    assert config.numa_options.affinity_mode is AffinityMode.NODE
    assert config.numa_options.should_fall_back_if_binding_fails


@pytest.mark.parametrize("choice", NUMA[2:])
def test_a_named_choice_is_followed(choice: str) -> None:
    options = numa_options(choice, on_gpus=True, accepted=ACCEPTED)["numa_options"]
    assert options.affinity_mode.value == choice and not options.should_fall_back_if_binding_fails


def test_nothing_is_bound_where_it_makes_no_difference(two_numa_nodes: Path) -> None:
    assert numa_options("off", on_gpus=True, accepted=ACCEPTED) == {}
    assert numa_options("auto", on_gpus=False, accepted=ACCEPTED) == {}
    (two_numa_nodes / "node1").rmdir()
    assert numa_options("auto", on_gpus=True, accepted=ACCEPTED) == {}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"launch\.numa=node needs ranks on GPUs.*use launch\.numa=auto or off"):
        numa_options("node", on_gpus=False, accepted=ACCEPTED)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert numa_options("auto", on_gpus=True, accepted=ACCEPTED) == {}
    with pytest.raises(ConfigError, match="numactl, which is not installed"):
        numa_options("node", on_gpus=True, accepted=ACCEPTED)
    assert numa_options("auto", on_gpus=True, accepted=["min_nodes"]) == {}
    with pytest.raises(ConfigError, match="needs a newer torch"):
        numa_options("node", on_gpus=True, accepted=["min_nodes"])
    with pytest.raises(ConfigError, match=r"launch\.numa"):
        LaunchSettings(numa="maybe")


def test_the_launcher_binds_ranks_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _numa_options(LaunchSettings(), ParallelSettings()).keys() == {"numa_options"}
    assert _numa_options(LaunchSettings(), ParallelSettings(device="cpu")) == {}
    assert _numa_options(LaunchSettings(numa="off"), ParallelSettings()) == {}
