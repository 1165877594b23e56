"""Sessions of several gloo ranks, started as torchrun starts them."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from storymem_dist.errors import LayoutError, ShotError
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import RankFailed, run_ranks


class NeedsTwoArguments(Exception):
    """Pickles, but cannot be rebuilt from its pickle."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


def _layout_and_decisions() -> dict[str, object]:
    with start_session(ParallelSettings(cfg=2), num_heads=4) as session:
        mesh = session.mesh
        decided = session.leader_decides(lambda: (session.rank, torch.arange(3)))
        outcomes: dict[str, object] = {
            "place": (session.replica, session.rank_in_replica, session.is_leader),
            "axes": {a.name: (a.size, a.rank) for a in (mesh.cfg, mesh.ring, mesh.ulysses, mesh.sequence, mesh.shard)},
            "decided_by": decided[0],
            "tensor": decided[1].tolist(),
        }
        for name, fn in {
            "full disk": _raise_full_disk,
            "shot": _raise_shot_failed,
            "awkward": _raise_awkward,
            "unpicklable": lambda: lambda: None,
        }.items():
            try:
                session.leader_decides(fn)
            except Exception as error:
                outcomes[name] = (type(error).__name__, str(error))
        outcomes["still in step"] = session.leader_decides(lambda: session.rank)
        if session.is_leader and session.replica == 0:
            session.leader_decides(lambda: "a replica decides as often as it likes")
        elif session.replica == 0:
            session.leader_decides(lambda: None)
        return outcomes


def _raise_full_disk() -> None:
    raise OSError(28, "No space left on device")


def _raise_shot_failed() -> None:
    raise ShotError("shot 3: NaN in latents")


def _raise_awkward() -> None:
    raise NeedsTwoArguments(7, "odd")


def test_four_ranks_form_two_replicas_that_decide_apart() -> None:
    results = run_ranks(_layout_and_decisions, world_size=4)
    assert [r["place"] for r in results] == [(0, 0, True), (0, 1, False), (1, 0, True), (1, 1, False)]
    assert results[3]["axes"] == {"cfg": (2, 1), "ring": (1, 0), "ulysses": (1, 0), "sequence": (1, 0), "shard": (2, 1)}
    assert [r["decided_by"] for r in results] == [0, 0, 2, 2]
    assert [r["still in step"] for r in results] == [0, 0, 2, 2]
    for rank, result in enumerate(results):
        assert result["tensor"] == [0, 1, 2]
        kind, message = result["full disk"]
        assert kind == "MachineError" and "No space left on device" in message
        assert result["shot"] == ("ShotError", "shot 3: NaN in latents")
        assert result["unpicklable"][0] == "TypeError"
        on_leader = rank % 2 == 0
        expected = (
            ("NeedsTwoArguments", "7: odd")
            if on_leader
            else ("RuntimeError", "NeedsTwoArguments on the leader: 7: odd")
        )
        assert result["awkward"] == expected


def _decide_slowly() -> str:
    settings = ParallelSettings(ulysses=2, leader_timeout_seconds=1.0)
    with start_session(settings) as session:

        def wait_for_a_shot() -> str:
            time.sleep(2.5)
            return "shot_01"

        return session.leader_decides(wait_for_a_shot)


def test_a_leader_may_take_longer_than_the_time_out() -> None:
    assert run_ranks(_decide_slowly, world_size=2) == ["shot_01", "shot_01"]


def _leader_hangs() -> str:
    with start_session(ParallelSettings(ulysses=2, leader_timeout_seconds=1.0)) as session:
        if session.is_leader:
            time.sleep(2.5)
            return "slept outside"
        try:
            return session.leader_decides(lambda: "never")
        except RuntimeError as error:
            return type(error).__name__


def test_a_leader_that_never_comes_is_noticed_within_the_time_out() -> None:
    leader, peer = run_ranks(_leader_hangs, world_size=2)
    assert (leader, peer) == ("slept outside", "RuntimeError")


def _groups_of_equal_ranks(weights: str) -> set[str]:
    with start_session(ParallelSettings(ulysses=2, weights=weights)) as session:
        groups = [axis.group for axis in (session.mesh.ulysses, session.mesh.sequence, session.mesh.shard)]
        assert [group.size() for group in groups if group is not None] == [2, 2, 2]
        return {group.group_name for group in groups if group is not None}


def test_sharded_weights_do_not_queue_with_activations() -> None:
    """A group runs its collectives one after the other: prefetched weights would hold up an all-to-all."""
    assert [len(names) for names in run_ranks(_groups_of_equal_ranks, world_size=2, args=("replicated",))] == [1, 1]
    assert [len(names) for names in run_ranks(_groups_of_equal_ranks, world_size=2, args=("fsdp",))] == [2, 2]


def _groups_after_sessions(layouts: list[ParallelSettings]) -> list[int]:
    """Process groups of this rank after each session; the first one is the default group."""
    dist.init_process_group("gloo")
    counts = []
    for settings in layouts:
        with start_session(settings) as session:
            assert session.leader_decides(lambda: 7) == 7
            assert len(dist.distributed_c10d._world.pg_map) > 1
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_every_session_destroys_all_groups_that_it_opened() -> None:
    layouts = [
        ParallelSettings(cfg=2, ulysses=2),
        ParallelSettings(ring=2, ulysses=2, weights="fsdp"),
        ParallelSettings(cfg=2, ring=2, weights="fsdp", shard_over="sequence"),
        ParallelSettings(ulysses=2),
        ParallelSettings(weights="fsdp"),
    ]
    assert run_ranks(_groups_after_sessions, 4, (layouts,)) == [[1] * len(layouts)] * 4


def _shards_of_one_pass() -> dict[str, object]:
    settings = ParallelSettings(cfg=2, ulysses=2, weights="fsdp", shard_over="sequence", across_nodes=True)
    with start_session(settings) as session:
        mesh = session.mesh
        assert mesh.shard_mesh is not None and mesh.sequence.group is not None
        return {
            "holders": dist.get_process_group_ranks(mesh.shard_mesh.get_group()),
            "apart": mesh.shard_mesh.get_group().group_name != mesh.sequence.group.group_name,
            "replica": mesh.shard.size,
            "readers": session.readers.size,
        }


def test_weights_sharded_over_one_pass_stay_on_its_node() -> None:
    """Two nodes of two ranks, a guidance pass on each: no block crosses the network."""
    results = run_ranks(_shards_of_one_pass, 4, ranks_per_node=2)
    assert [r["holders"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(r["apart"] and r["replica"] == 4 and r["readers"] == 1 for r in results)


def _peers_never_come() -> dict[str, str]:
    errors: dict[str, str] = {}
    with start_session(ParallelSettings(cfg=2, collective_timeout_seconds=1.0)) as session:
        assert dist.group.WORLD is not None
        store = dist.group.WORLD.get_group_store()
        if session.rank:
            store.wait(["rank 0 has given up"], timedelta(seconds=60))
            return errors
        groups = {"cfg": session.mesh.cfg.group, "shard": session.mesh.shard.group, "readers": session.readers_group}
        for name, group in groups.items():
            try:
                dist.all_reduce(torch.ones(1), group=group)
            except RuntimeError as error:
                errors[name] = str(error)
        store.set("rank 0 has given up", "")
    return errors


def test_collectives_of_one_replica_of_several_end_at_the_time_out() -> None:
    """Groups smaller than the world have a time-out of their own, which is half an hour unless somebody sets it."""
    errors = run_ranks(_peers_never_come, world_size=4)[0]
    assert errors.keys() == {"cfg", "shard", "readers"}
    assert all("Timed out waiting 1000ms" in error for error in errors.values()), errors


def _impossible() -> str:
    try:
        start_session(ParallelSettings(ulysses=8, across_nodes=False))
    except LayoutError as error:
        return f"{error} | {dist.is_initialized()}"
    return "started"


def test_a_replica_larger_than_a_node_is_refused_on_every_rank() -> None:
    for message in run_ranks(_impossible, world_size=2, ranks_per_node=1):
        assert "needs 8 ranks per replica" in message
        assert message.endswith("False")


def _one_fails() -> None:
    session = start_session(ParallelSettings(ulysses=2))  # not closed: peers would see that before the error arrives
    if session.rank == 1:
        raise ValueError("this rank is broken")
    session.leader_decides(lambda: None)
    dist.barrier()


def test_the_helper_names_the_rank_that_failed_first() -> None:
    with pytest.raises(RankFailed, match="this rank is broken") as caught:
        run_ranks(_one_fails, world_size=2)
    assert caught.value.rank == 1


def _hang() -> None:
    time.sleep(60)


def test_the_helper_shows_where_a_rank_hangs() -> None:
    with pytest.raises(RankFailed, match="in _hang"):
        run_ranks(_hang, world_size=1, timeout_seconds=3.0)
