"""Every entry of ``conf/parallel`` is a layout that can be started."""

import re

import pytest
import yaml

from storymem_dist.config.composing import compose_settings
from storymem_dist.parallel.layout import check_heads, plan_layout
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.resources import config_folder

NAMES = [
    "auto",
    "deepspeed_1gpu",
    "fsdp_2gpu",
    "fsdp_4gpu",
    "fsdp_8gpu",
    "latency_8gpu",
    "offload_1gpu",
    "replicas",
    "single",
    "two_nodes_16gpu",
]


def test_these_are_the_entries() -> None:
    assert sorted(path.stem for path in (config_folder() / "parallel").iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES[1:])
def test_an_entry_sets_known_fields_and_fits_the_ranks_it_is_named_for(name: str) -> None:
    text = (config_folder() / "parallel" / f"{name}.yaml").read_text()
    settings = ParallelSettings(**yaml.safe_load(text))
    check_heads(settings, 40)
    plan_layout(settings, world_size=settings.ranks_per_replica)
    named_for = re.search(r"(\d+)gpu", name)
    assert settings.ranks_per_replica == (int(named_for[1]) if named_for else 1)
    assert text.startswith("# For "), "an entry begins by saying what it is for"
    assert not settings.free, "a preset leaves nothing to the job"


def test_the_default_leaves_the_layout_to_the_job() -> None:
    default = compose_settings([]).parallel
    assert default == ParallelSettings(**yaml.safe_load((config_folder() / "parallel" / "auto.yaml").read_text()))
    assert default.free == ("cfg", "ring", "ulysses", "weights") and default.compile == "auto"


def test_no_weights_cross_the_network_between_two_nodes() -> None:
    """Each node holds all weights: a shard for each of its eight GPUs."""
    text = (config_folder() / "parallel" / "two_nodes_16gpu.yaml").read_text()
    settings = ParallelSettings(**yaml.safe_load(text))
    layout = plan_layout(settings, world_size=16, ranks_per_node=8)
    assert settings.weight_shards == 8
    assert {layout.node_of(rank) for rank in range(settings.weight_shards)} == {0}
