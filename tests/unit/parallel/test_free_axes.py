"""Axes and weights that are "auto": what is pinned, what the started ranks can form, and who may decide."""

import pytest
import torch

from storymem_dist.config.composing import compose_settings
from storymem_dist.errors import ConfigError, LayoutError, StoryMemError
from storymem_dist.parallel.choice import Choice, RankFacts, StartedRanks
from storymem_dist.parallel.layout import axes_that_fit, check_heads, plan_layout
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings

FREE = {"cfg": "auto", "ring": "auto", "ulysses": "auto", "weights": "auto"}


def axes(world_size: int, ranks_per_node: int | None = None, num_heads: int = 40, **pinned: object) -> list[object]:
    settings = ParallelSettings(**{**FREE, **pinned})  # type: ignore[arg-type]
    found = axes_that_fit(settings, world_size=world_size, ranks_per_node=ranks_per_node, num_heads=num_heads)
    assert all(one.weights == settings.weights and set(one.free) <= {"weights"} for one in found)
    return [one.axes for one in found]


def test_free_axes_are_all_that_the_ranks_can_form_narrowest_first() -> None:
    assert axes(1) == [(1, 1, 1)]
    found = axes(4)
    assert found[0] == (1, 1, 1) and len(found) == len(set(found)) == 9
    assert {cfg * ring * ulysses for cfg, ring, ulysses in found} == {1, 2, 4}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pinned", "expected"),
    [
        ({"cfg": 2, "ring": 1}, [(2, 1, 1), (2, 1, 2)]),
        ({"cfg": 1, "ring": 2}, [(1, 2, 1), (1, 2, 2)]),
        ({"cfg": 1, "ring": 1, "ulysses": 4}, [(1, 1, 4)]),
        ({"num_replicas": 4}, [(1, 1, 1)]),
        ({"num_replicas": 1, "ring": 1}, [(1, 1, 4), (2, 1, 2)]),
    ],
)
def test_what_is_pinned_stays(pinned: dict[str, object], expected: list[object]) -> None:
    assert axes(4, **pinned) == expected


@pytest.mark.parametrize(
    ("world_size", "pinned", "message"),
    [
        (4, {"ulysses": 3}, r"parallel\.ulysses=3 does not divide the model's 40 attention heads; use 1, 2, 4"),
        (4, {"cfg": 2, "ulysses": 4}, r"parallel\.cfg=2 x ring=1 x ulysses=4 needs 8 ranks per replica.* has 4 ranks"),
        (3, {"cfg": 2}, "start a multiple of 2 ranks"),
        (4, {"num_replicas": 3}, r"parallel\.num_replicas=3 does not fit the 4 ranks"),
        (2, {"weights": "zero3"}, "zero3 runs one rank per process group"),
    ],
)
def test_pins_that_no_layout_meets_are_refused_in_words(
    world_size: int, pinned: dict[str, object], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        axes(world_size, **pinned)


def test_a_replica_spans_nodes_only_where_it_may() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.across_nodes=true"):
        axes(16, 8)
    found = axes(16, 8, across_nodes=True)
    assert (2, 1, 8) in found and (1, 1, 1) in found


def test_nobody_reads_an_axis_before_it_is_decided() -> None:
    settings = ParallelSettings(**FREE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"parallel\.cfg=auto is decided by a render job"):
        _ = settings.ranks_per_replica
    with pytest.raises(ConfigError, match="auto is decided by a render job"):
        plan_layout(settings, world_size=2)
    check_heads(settings, 40)
    for undecided in (settings, ParallelSettings(weights="auto")):
        with pytest.raises(ConfigError, match="auto is decided by a render job"):
            start_session(undecided)


@pytest.mark.parametrize("value", [True, 1.5, "two", "2", None, 0, 3, 10**9])
def test_another_value_of_an_axis_is_refused_in_words(value: object) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.cfg=.* is not allowed; .*\b2\b"):
        ParallelSettings(cfg=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", ["parallel.ulysses=two", "parallel.ring=1.5", "parallel.cfg=3", "parallel.weights=no"]
)
def test_a_wrong_value_on_the_command_line_names_its_setting(given: str) -> None:
    with pytest.raises(StoryMemError, match=given.partition("=")[0].replace(".", r"\.")):
        compose_settings([given])


def test_a_preset_pins_all_and_an_axis_alone_pins_itself() -> None:
    assert compose_settings(["parallel=fsdp_8gpu"]).parallel.free == ()
    assert compose_settings(["parallel.cfg=2"]).parallel.free == ("ring", "ulysses", "weights")
    assert compose_settings(["parallel=fsdp_8gpu", "parallel.ulysses=auto"]).parallel.free == ("ulysses",)
    assert compose_settings(["parallel=usp4"]).parallel.free == (), "a former name is a preset"


def test_one_rank_asks_the_chooser_and_does_what_it_says() -> None:
    asked: list[StartedRanks] = []

    def choose(ranks: StartedRanks) -> Choice:
        asked.append(ranks)
        return Choice(parallel=ParallelSettings(device="cpu", compile=False), experts="resident", reasons=("why",))

    with start_session(ParallelSettings(device="cpu", **FREE), num_heads=12, choose=choose) as session:  # type: ignore[arg-type]
        assert session.choice is not None and session.choice.reasons == ("why",)
        assert session.world_size == 1 and session.mesh.shard.group is None
    (ranks,) = asked
    assert (ranks.world_size, ranks.num_nodes, ranks.free_bytes) == (1, 1, None)
    assert ranks.host_bytes > 0


def test_the_memory_of_a_job_is_that_of_its_fullest_device_and_smallest_host() -> None:
    facts = [RankFacts(host=f"n{n}", free_bytes=free, host_bytes=host) for n, free, host in ((0, 9, 50), (1, 7, 60))]
    ranks = StartedRanks(device=torch.device("cuda", 0), ranks_per_node=1, facts=facts)
    assert (ranks.free_bytes, ranks.host_bytes, ranks.num_nodes) == (7, 50, 2)
