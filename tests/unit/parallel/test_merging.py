from typing import Any

import pytest
import torch.distributed as dist

from storymem_dist.parallel.job_store import JobStore
from storymem_dist.parallel.layout import AXES, Layout
from storymem_dist.parallel.merging import (
    _runs_along,
    holds_whole_weights,
    merged_settings,
    replicas_per_node,
)
from storymem_dist.parallel.settings import ParallelSettings


@pytest.mark.parametrize(
    ("axes", "size", "heads", "split", "merged"),
    [
        ((1, 1, 1), 2, 40, True, (2, 1, 1)),
        ((1, 1, 1), 8, 40, True, (2, 1, 4)),
        ((1, 1, 1), 8, 40, False, (1, 1, 8)),
        ((1, 1, 1), 16, 40, False, (1, 2, 8)),  # 16 does not divide 40
        ((2, 1, 2), 2, 40, True, (2, 1, 4)),
        ((1, 1, 2), 2, 12, True, (2, 1, 2)),
        ((1, 2, 3), 4, 6, False, (1, 4, 6)),
    ],
)
def test_the_layout_of_a_team(
    axes: tuple[int, int, int], size: int, heads: int, split: bool, merged: tuple[int, int, int]
) -> None:
    cfg, ring, ulysses = axes
    alone = ParallelSettings(num_replicas=8, cfg=cfg, ring=ring, ulysses=ulysses, prefetch_blocks=3)
    team = merged_settings(alone, size, num_heads=heads, may_split_guidance=split)
    assert team.axes == merged and team.ranks_per_replica == size * alone.ranks_per_replica
    assert (team.num_replicas, team.prefetch_blocks) == (None, 3)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({}, True),
        ({"cfg": 2, "ulysses": 2}, True),
        ({"weights": "fsdp_offload"}, True),  # one rank streams its own blocks
        ({"weights": "fsdp", "ulysses": 2}, False),
        ({"weights": "fsdp_offload", "cfg": 2}, False),
        ({"weights": "zero3", "compile": False}, False),
    ],
)
def test_teams_need_whole_weights_on_each_rank(settings: dict[str, Any], whole: bool) -> None:
    assert holds_whole_weights(ParallelSettings(**settings)) is whole


def test_replicas_of_a_node() -> None:
    assert replicas_per_node(Layout(replica=8, ranks_per_node=8)) == 8
    assert replicas_per_node(Layout(replica=4, cfg=2, ulysses=2, ranks_per_node=8)) == 2
    assert replicas_per_node(Layout(replica=1, ulysses=16, ranks_per_node=8)) == 0
    assert replicas_per_node(Layout(replica=2, ring=3, ranks_per_node=4)) == 0


def test_ranks_along_axes() -> None:
    layout = Layout(replica=2, cfg=2, ulysses=2, ranks_per_node=8)
    assert _runs_along(layout, AXES[1:]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert _runs_along(layout, ["cfg"]) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert _runs_along(layout, ["ring", "ulysses"]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert _runs_along(layout, ["ring"]) == [[rank] for rank in range(8)]


class Flaky:
    """A store whose first answers are errors, in order."""

    def __init__(self, store: Any, *errors: Exception) -> None:
        self._store, self._errors = store, list(errors)

    def __getattr__(self, name: str) -> Any:
        if self._errors:
            raise self._errors.pop(0)
        return getattr(self._store, name)


def test_a_request_to_the_store_is_repeated() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from torch's stubs
    late, lost = dist.DistStoreError("wait timeout"), dist.DistNetworkError("Connection reset by peer")
    connections = [Flaky(store, late, lost), Flaky(store)]
    job = JobStore(lambda: connections.pop(0))
    job.set("key", "idle")
    assert not connections
    assert job.compare_set("key", "idle", "busy") == b"busy" and job.compare_set("key", "idle", "x") == b"busy"
    assert job.check(["key"]) and not job.check(["other"]) and job.multi_get(["key"]) == [b"busy"]


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_a_store_that_is_gone_is_a_lost_connection(how: str) -> None:
    def connect() -> Any:
        if how == "gone" and made:
            raise dist.DistNetworkError("Connection refused")
        made.append(1)
        error = dist.DistStoreError if how == "silent" else dist.DistNetworkError
        return Flaky(None, *[error("no")] * 9)

    made: list[int] = []
    job = JobStore(connect)
    with pytest.raises(ConnectionError, match="no answer to check" if how == "silent" else "refused"):
        job.check(["key"])
