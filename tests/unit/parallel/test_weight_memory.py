from pathlib import Path

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB, host_memory_bytes
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel import weight_memory as module
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.weight_memory import (
    check_weight_memory,
    decide_experts,
    expert_bytes,
    host_has_room,
    weight_memory,
)
from storymem_dist.weights.settings import ModelSettings

A14B = WAN22_A14B.t2v
EXPERT_GIB = 26.96


@pytest.mark.parametrize(("linears", "expected_gib"), [("exact", EXPERT_GIB), ("float8", 13.89), ("int8", 13.89)])
def test_an_expert_is_counted_as_it_is_held(linears: str, expected_gib: float) -> None:
    held = expert_bytes(A14B, torch.bfloat16, linears)
    assert held / GIB == pytest.approx(expected_gib, abs=0.01)


@pytest.mark.parametrize(
    ("experts", "parallel", "on_device", "on_host"),
    [
        ("resident", ParallelSettings(), 2.0, 0.0),
        ("swap", ParallelSettings(), 1.0, 2.0),
        ("swap", ParallelSettings(ulysses=8), 1.0, 2.0),
        ("resident", ParallelSettings(ulysses=8, weights="fsdp"), 0.25, 0.0),
        ("swap", ParallelSettings(ulysses=4, cfg=2, weights="fsdp"), 0.125, 0.25),
        ("resident", ParallelSettings(ulysses=2, weights="fsdp_offload"), 0.0, 1.0),
        ("swap", ParallelSettings(weights="zero3"), 0.0, 2.0),
    ],
)
def test_what_a_rank_holds_follows_from_the_settings(
    experts: str, parallel: ParallelSettings, on_device: float, on_host: float
) -> None:
    needed = weight_memory(ModelSettings(experts=experts), parallel, A14B)
    assert needed.on_device / GIB == pytest.approx(on_device * EXPERT_GIB, abs=0.01)
    assert needed.on_host / GIB == pytest.approx(on_host * EXPERT_GIB, abs=0.01)


@pytest.mark.parametrize(
    ("device_gib", "parallel", "expected"),
    [
        (79.1, ParallelSettings(), "resident"),
        (47.4, ParallelSettings(), "swap"),
        (39.4, ParallelSettings(ulysses=8, weights="fsdp"), "resident"),
        (23.6, ParallelSettings(ulysses=8, weights="fsdp"), "resident"),
        (23.6, ParallelSettings(ulysses=2, weights="fsdp"), "swap"),
        (39.4, ParallelSettings(ulysses=2, weights="fsdp"), "swap"),
        (79.1, ParallelSettings(cfg=2), "resident"),
        (None, ParallelSettings(), "resident"),
    ],
)
def test_both_experts_stay_on_a_device_that_keeps_room_to_work(
    monkeypatch: pytest.MonkeyPatch, device_gib: float | None, parallel: ParallelSettings, expected: str
) -> None:
    total = None if device_gib is None else int(device_gib * GIB)
    monkeypatch.setattr(module, "device_memory_bytes", lambda device: total)
    model = ModelSettings()
    assert decide_experts(model, parallel, A14B, torch.device("cpu")).experts == expected
    assert decide_experts(ModelSettings(experts="swap"), parallel, A14B, torch.device("cpu")).experts == "swap"
    assert model.experts == "auto"


def check(experts: str, *, device: str = "cuda", ranks: int = 8, **parallel: object) -> None:
    check_weight_memory(
        ModelSettings(experts=experts),
        ParallelSettings(**parallel),
        A14B,
        device=torch.device(device),
        ranks_per_node=ranks,
    )


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards of 48 GiB and a host of 256 GiB."""
    monkeypatch.setattr(module, "device_memory_bytes", lambda device: 48 * GIB if device.type == "cuda" else None)
    monkeypatch.setattr(module, "host_memory_bytes", lambda: 256 * GIB)


@pytest.mark.usefixtures("node")
def test_what_fits_is_fine() -> None:
    check("swap", ranks=4)
    check("swap", ulysses=8, weights="fsdp")
    check("resident", ulysses=8, weights="fsdp")
    check("resident", device="cpu", ranks=1)


@pytest.mark.usefixtures("node")
def test_experts_may_take_turns_where_the_host_has_room_for_those_of_all_ranks() -> None:
    model, parallel = ModelSettings(experts="resident"), ParallelSettings()
    assert host_has_room(model, parallel, A14B, ranks_per_node=4)
    assert not host_has_room(model, parallel, A14B, ranks_per_node=5)


@pytest.mark.usefixtures("node")
def test_a_device_that_cannot_hold_the_weights_is_refused_before_they_are_read() -> None:
    with pytest.raises(ConfigError, match=r"model.experts=resident with .*=replicated needs 53.9 GiB .* has 48.0 GiB"):
        check("resident")


@pytest.mark.usefixtures("node")
def test_ranks_of_a_node_share_its_memory() -> None:
    with pytest.raises(ConfigError, match=r"needs 431.\d GiB of host memory .* 8 ranks on this node, which has 256.0"):
        check("swap")


@pytest.mark.usefixtures("node")
def test_a_processor_holds_all_weights_in_host_memory() -> None:
    with pytest.raises(ConfigError, match=r"needs 323.\d GiB of host memory .* 4 ranks"):
        check("swap", device="cpu", ranks=4)


def make_cgroups(folder: Path, membership: str, limits: dict[str, str]) -> tuple[Path, Path]:
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(membership)
    for path, limit in limits.items():
        (folder / "cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / path).write_text(limit)
    return folder / "proc", folder / "cgroup"


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "1000\n"}, 1000),  # in a container
        (
            "0::/slurm/job_7/step_0\n",
            {"slurm/job_7/memory.max": "2000\n", "slurm/job_7/step_0/memory.max": "max\n"},
            2000,
        ),
        ("4:cpu,memory:/job\n1:name=systemd:/\n", {"memory/job/memory.limit_in_bytes": "3000\n"}, 3000),
        ("0::/user.slice\n", {"memory.max": "max\n", "other/memory.max": "5\n"}, None),
        ("", {}, None),
    ],
)
def test_the_limit_of_a_control_group_counts_as_the_host_s_memory(
    tmp_path: Path, membership: str, limits: dict[str, str], expected: int | None
) -> None:
    physical = host_memory_bytes(*make_cgroups(tmp_path / "none", "", {}))
    assert physical > 2**28
    assert host_memory_bytes(*make_cgroups(tmp_path / "some", membership, limits)) == (expected or physical)


def test_without_proc_there_is_physical_memory(tmp_path: Path) -> None:
    assert host_memory_bytes(tmp_path / "nowhere", tmp_path / "nowhere") > 2**28
