import pytest

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError, LayoutError
from storymem_dist.parallel.layout import check_guidance, check_heads, layouts_for, plan_layout
from storymem_dist.parallel.settings import ParallelSettings


def test_replicas_fill_the_ranks_that_were_started() -> None:
    layout = plan_layout(ParallelSettings(cfg=2, ulysses=2), world_size=8)
    assert layout.shape == (2, 2, 1, 2)
    assert layout.ranks_of_replica(1) == [4, 5, 6, 7]
    assert [layout.replica_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_one_process_is_one_replica() -> None:
    assert plan_layout(ParallelSettings(), world_size=1).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("settings", "world_size", "ranks_per_node", "says"),
    [
        ({"ulysses": 4}, 6, None, ["ulysses=4 needs 4 ranks per replica", "has 6 ranks", "1, 2, 3 or 6"]),
        ({"ulysses": 2}, 1, None, ["needs 2 ranks per replica", "has 1 rank;", "product is 1"]),
        ({"num_replicas": 1}, 4, None, ["num_replicas=1", "4 ranks", "num_replicas=4", "Start 1 rank,"]),
        ({"num_replicas": 3, "cfg": 2}, 4, None, ["num_replicas=3", "Start 6 ranks", "num_replicas=2"]),
        (
            {"cfg": 2, "ulysses": 8},
            16,
            8,
            ["16 ranks per replica, more than one node", "across_nodes=true", "at most 8"],
        ),
        ({"ulysses": 8}, 16, 8, ["over 2 nodes of 8", "fits one node", "one torchrun group per node"]),
        ({"weights": "zero3"}, 2, None, ["one rank per process group", "2 ranks", "fsdp_offload"]),
        ({}, 6, 4, ["6 ranks were started with 4 on this node", "1, 2, 3 and 6"]),
    ],
)
def test_an_impossible_layout_is_refused_with_the_number_that_is_wrong_and_one_that_works(
    settings: dict[str, object], world_size: int, ranks_per_node: int | None, says: list[str]
) -> None:
    with pytest.raises(LayoutError) as caught:
        plan_layout(ParallelSettings(**settings), world_size=world_size, ranks_per_node=ranks_per_node)
    for words in says:
        assert words in str(caught.value)


def test_a_replica_may_span_nodes_when_that_is_asked_for() -> None:
    layout = plan_layout(ParallelSettings(cfg=2, ulysses=8, across_nodes=True), world_size=16, ranks_per_node=8)
    assert layout.shape == (1, 2, 1, 8)
    assert [layout.node_of(rank) for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]


def test_ulysses_must_divide_the_heads() -> None:
    check_heads(ParallelSettings(ulysses=8), 40)
    with pytest.raises(
        LayoutError, match=r"ulysses=3 does not divide the model's 40 attention heads; use 1, 2, 4, 5, 8"
    ):
        check_heads(ParallelSettings(ulysses=3), 40)


@pytest.mark.parametrize(
    ("high", "low", "named"), [(1.0, 3.5, "guidance_scale_high"), (3.5, 1.0, "guidance_scale_low")]
)
def test_guidance_cannot_be_split_when_one_expert_has_no_unconditional_pass(
    high: float, low: float, named: str
) -> None:
    with pytest.raises(LayoutError, match=f"sampler.{named}=1 has no unconditional pass"):
        check_guidance(ParallelSettings(cfg=2), SamplerSettings(guidance_scale_high=high, guidance_scale_low=low))
    check_guidance(ParallelSettings(cfg=1), SamplerSettings(guidance_scale_high=high, guidance_scale_low=low))
    check_guidance(ParallelSettings(cfg=2), SamplerSettings(guidance_scale_high=3.5, guidance_scale_low=3.5))


def test_the_ranks_of_a_node_that_hold_the_same_part_read_it_together() -> None:
    layout = plan_layout(ParallelSettings(ulysses=2, across_nodes=True), world_size=8, ranks_per_node=4)
    assert layout.reading_teams(2) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.reading_teams(1) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_every_layout_of_a_node_is_listed_once_and_fits() -> None:
    listed = layouts_for(4, num_heads=4)
    shapes = [plan_layout(settings, world_size=4).shape for settings in listed]
    assert len(set(shapes)) == len(shapes)
    assert {(4, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2), (1, 2, 1, 2), (1, 2, 2, 1)} <= set(shapes)
    assert {(1, 1, 1, 4), (1, 1, 2, 2), (1, 1, 4, 1)} <= set(shapes)
    assert all(settings.ulysses in (1, 2) for settings in layouts_for(6, num_heads=4))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cfg": 3}, "parallel.cfg=3"),
        ({"ring": 0}, "parallel.ring=0"),
        ({"ulysses": -1}, "parallel.ulysses=-1"),
        ({"num_replicas": 0}, "parallel.num_replicas=0"),
        ({"weights": "ddp"}, "replicated, fsdp, fsdp_offload, zero3"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"backend": "mpi"}, "auto, gloo, nccl"),
        ({"collective_timeout_seconds": float("nan")}, "collective_timeout_seconds=nan"),
        ({"stall_timeout_seconds": 100.0}, "stall_timeout_seconds=100.0 .* at least parallel.collective"),
        ({"weights": "zero3", "ulysses": 2}, "fsdp_offload to split a forward"),
        ({"weights": "zero3", "compile": True}, "eager mode only"),
        ({"weights": "zero3", "zero3_offload": "nvme"}, "zero3_offload=nvme .* has never been run"),
        ({"zero3_offload": "disk"}, "parallel.zero3_offload='disk' is not allowed; use one of: cpu"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ParallelSettings(**wrong)
