from pathlib import Path

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB, host_memory_bytes
from storymem_dist.memory.scorers import HPSV3_BYTES
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel import weight_memory as module
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.weight_memory import (
    check_weight_memory,
    decide_experts,
    expert_bytes,
    host_has_room,
    place_scorer,
    weight_memory,
)
from storymem_dist.parallel.working_memory import decode_bytes
from storymem_dist.weights.settings import ModelSettings

A14B = WAN22_A14B.t2v
EXPERT_GIB, BLOCK_GIB, OUTSIDE_GIB = 26.96, 0.6546, 0.779


@pytest.mark.parametrize(("linears", "expected_gib"), [("exact", EXPERT_GIB), ("float8", 13.89), ("int8", 13.89)])
def test_an_expert_is_counted_as_it_is_held(linears: str, expected_gib: float) -> None:
    held = expert_bytes(A14B, torch.bfloat16, linears)
    assert held / GIB == pytest.approx(expected_gib, abs=0.01)


@pytest.mark.parametrize(
    ("experts", "parallel", "on_device", "on_host"),
    [
        ("resident", ParallelSettings(), 2 * EXPERT_GIB, 0),
        ("swap", ParallelSettings(), EXPERT_GIB, 56),
        ("swap", ParallelSettings(ulysses=8), EXPERT_GIB, 56),
        ("stream", ParallelSettings(), OUTSIDE_GIB + 2 * BLOCK_GIB, 56),
        ("stream", ParallelSettings(prefetch_blocks=3), OUTSIDE_GIB + 4 * BLOCK_GIB, 56),
        ("stream", ParallelSettings(prefetch_blocks=1000), EXPERT_GIB, 56),
        ("resident", ParallelSettings(weights="fsdp_offload"), OUTSIDE_GIB + 2 * BLOCK_GIB, 56),
        ("resident", ParallelSettings(ulysses=8, weights="fsdp"), EXPERT_GIB / 4, 0),
        ("swap", ParallelSettings(ulysses=4, cfg=2, weights="fsdp"), EXPERT_GIB / 8, 8),
        ("resident", ParallelSettings(ulysses=2, weights="fsdp_offload"), 0, 28),
        ("swap", ParallelSettings(weights="zero3"), 0, 2 * EXPERT_GIB),
    ],
)
def test_what_a_rank_holds_follows_from_the_settings(
    experts: str, parallel: ParallelSettings, on_device: float, on_host: float
) -> None:
    needed = weight_memory(ModelSettings(experts=experts), parallel, A14B)
    assert needed.on_device / GIB == pytest.approx(on_device, abs=0.01)
    assert needed.on_host / GIB == pytest.approx(on_host, abs=0.01)


@pytest.mark.parametrize(
    ("device_gib", "parallel", "expected"),
    [
        (78.6, ParallelSettings(), "resident"),
        (47.4, ParallelSettings(), "stream"),
        (23.1, ParallelSettings(), "stream"),
        (39.4, ParallelSettings(ulysses=8, weights="fsdp"), "resident"),
        (23.6, ParallelSettings(ulysses=8, weights="fsdp"), "resident"),
        (23.6, ParallelSettings(ulysses=2, weights="fsdp"), "swap"),
        (39.0, ParallelSettings(ulysses=2, weights="fsdp"), "swap"),
        (79.1, ParallelSettings(cfg=2), "resident"),
        (None, ParallelSettings(), "resident"),
        (78.6, ParallelSettings(weights="fsdp_offload"), "stream"),
        (None, ParallelSettings(weights="fsdp_offload"), "stream"),
        (23.1, ParallelSettings(ulysses=2, weights="fsdp_offload"), "resident"),
    ],
)
def test_both_experts_stay_on_a_device_that_keeps_room_to_work(
    monkeypatch: pytest.MonkeyPatch, device_gib: float | None, parallel: ParallelSettings, expected: str
) -> None:
    free = None if device_gib is None else int(device_gib * GIB)
    monkeypatch.setattr(module, "free_device_memory_bytes", lambda device: free)
    model = ModelSettings()
    assert decide_experts(model, parallel, A14B, torch.device("cpu")).experts == expected
    asked = decide_experts(ModelSettings(experts="swap"), parallel, A14B, torch.device("cpu")).experts
    assert asked == ("stream" if parallel.streams_blocks else "swap")
    assert model.experts == "auto"


@pytest.mark.parametrize(("precision", "expected"), [("tf32", "stream"), ("bfloat16", "resident")])
def test_room_is_left_for_the_decode_and_the_workspace_of_its_convolutions(
    monkeypatch: pytest.MonkeyPatch, precision: str, expected: str
) -> None:
    """75.5 GiB hold both experts, a decode of 1280x720 and the reserve, but no workspace; in bf16 a decode is half."""
    free = int(75.5 * GIB)
    monkeypatch.setattr(module, "free_device_memory_bytes", lambda device: free)
    model = ModelSettings(vae_precision=precision)
    assert decide_experts(model, ParallelSettings(), A14B, torch.device("cpu")).experts == expected
    exact, half = (decode_bytes(720, 1280, dtype) / GIB for dtype in (torch.float32, torch.bfloat16))
    assert (exact, half) == (pytest.approx(17.57 + 2, abs=0.2), pytest.approx(9.14 + 2, abs=0.1))


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, "resident"), (111_600, "resident"), (250_000, "stream")])
def test_room_is_left_for_the_longest_shot_of_the_job(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, expected: str
) -> None:
    monkeypatch.setattr(module, "free_device_memory_bytes", lambda device: int(78.6 * GIB))
    found = decide_experts(ModelSettings(), ParallelSettings(), A14B, torch.device("cpu"), num_tokens=num_tokens)
    assert found.experts == expected


@pytest.mark.parametrize(
    ("device_gib", "parallel", "experts", "place"),
    [
        (139.0, ParallelSettings(), "resident", "device"),
        (78.6, ParallelSettings(), "resident", "between_shots"),
        (74.5, ParallelSettings(), "stream", "between_shots"),
        (47.4, ParallelSettings(), "stream", "between_shots"),
        (23.1, ParallelSettings(), "stream", "between_shots"),
        (15.5, ParallelSettings(), "stream", "cpu"),
        (30.8, ParallelSettings(ulysses=8, weights="fsdp"), "resident", "device"),
        (27.5, ParallelSettings(ulysses=8, weights="fsdp"), "resident", "between_shots"),
        (39.4, ParallelSettings(ulysses=2, weights="fsdp"), "swap", "between_shots"),
        (23.1, ParallelSettings(ulysses=2, weights="fsdp_offload"), "resident", "between_shots"),
        (None, ParallelSettings(), "resident", "cpu"),
    ],
)
def test_the_scorer_of_keyframes_is_kept_where_it_has_room(
    monkeypatch: pytest.MonkeyPatch, device_gib: float | None, parallel: ParallelSettings, experts: str, place: str
) -> None:
    free = None if device_gib is None else int(device_gib * GIB)
    monkeypatch.setattr(module, "free_device_memory_bytes", lambda device: free)
    model = decide_experts(ModelSettings(), parallel, A14B, torch.device("cpu"), scorer_bytes=HPSV3_BYTES)
    assert model.experts == experts
    assert place_scorer(HPSV3_BYTES, model, parallel, A14B, torch.device("cpu")) == place


def test_experts_do_not_stay_on_a_device_where_the_scorer_could_not_come_between_shots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks of 42.5 GiB hold half of both experts and their work, but not HPSv3 next to them."""
    monkeypatch.setattr(module, "free_device_memory_bytes", lambda device: int(42.5 * GIB))
    parallel, small = ParallelSettings(ulysses=2, weights="fsdp"), ModelSettings(vae_precision="bfloat16")
    without = decide_experts(small, parallel, A14B, torch.device("cpu"))
    scoring = decide_experts(small, parallel, A14B, torch.device("cpu"), scorer_bytes=HPSV3_BYTES)
    assert (without.experts, scoring.experts) == ("resident", "swap")


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
    """Cards of 48 GiB, half a GiB of it in use, and a host of 256 GiB."""
    for name, gib in (("device_memory_bytes", 48), ("free_device_memory_bytes", 47.5)):
        num_bytes = int(gib * GIB)
        monkeypatch.setattr(module, name, lambda device, has=num_bytes: has if device.type == "cuda" else None)
    monkeypatch.setattr(module, "host_memory_bytes", lambda: 256 * GIB)


@pytest.mark.usefixtures("node")
def test_what_fits_is_fine() -> None:
    check("swap", ranks=4)
    check("stream", ranks=4)
    check("resident", ranks=4, weights="fsdp_offload")
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
    with pytest.raises(ConfigError) as caught:
        check("resident")
    assert str(caught.value) == (
        "model.experts=resident with parallel.weights=replicated needs 53.9 GiB for weights on each device; cuda has "
        "47.5 GiB free of 48.0 GiB; use model.experts=stream, model.linears=float8 or int8 (half the bytes, lossy), or "
        "a layout whose ranks share the weights (parallel=fsdp_2gpu, fsdp_8gpu, ...)"
    )


@pytest.mark.usefixtures("node")
def test_what_other_processes_hold_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_device_memory_bytes", lambda device: int(1.9 * GIB))
    with pytest.raises(ConfigError, match=r"stream .* needs 2.1 GiB .* has 1.9 GiB free of 48.0 GiB; free what other"):
        check("stream", ranks=1)


@pytest.mark.usefixtures("node")
def test_shards_cannot_be_streamed_by_a_rank_alone() -> None:
    with pytest.raises(ConfigError, match=r"=stream needs whole weights on every rank, but parallel.weights=fsdp"):
        check("stream", ulysses=8, weights="fsdp")


@pytest.mark.usefixtures("node")
def test_ranks_of_a_node_share_its_memory() -> None:
    with pytest.raises(ConfigError, match=r"needs 448.0 GiB of host memory .* 8 ranks on this node, which has 256.0"):
        check("swap")


@pytest.mark.usefixtures("node")
def test_scorers_count_in_the_memory_of_the_host() -> None:
    needed = {"device": torch.device("cuda"), "ranks_per_node": 4}
    check_weight_memory(ModelSettings(experts="stream"), ParallelSettings(), A14B, **needed)
    with pytest.raises(ConfigError, match=r"and the scorer of keyframes \(57\.8 GiB of host memory\) needs 281\.8 GiB"):
        check_weight_memory(
            ModelSettings(experts="stream"), ParallelSettings(), A14B, **needed, scorers_on_host=4 * HPSV3_BYTES
        )


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
