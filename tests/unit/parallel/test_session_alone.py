import importlib.util

import pytest
import torch
import torch.distributed as dist

from storymem_dist.errors import ExtraNotInstalled, LayoutError
from storymem_dist.parallel.session import choose_backend, choose_device, start_session
from storymem_dist.parallel.settings import ParallelSettings


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_plain_python_is_a_one_rank_session_without_process_group() -> None:
    with start_session(ParallelSettings(device="cpu")) as session:
        assert not dist.is_initialized()
        assert (session.rank, session.world_size, session.replica, session.is_leader) == (0, 1, 0, True)
        assert session.mesh.shard.group is None
        assert session.leader_decides(lambda: "yes") == "yes"
        with pytest.raises(OSError, match="disk"):
            session.leader_decides(_full_disk)


def test_one_rank_with_sharded_weights_starts_a_group_of_its_own_and_ends_it() -> None:
    with start_session(ParallelSettings(device="cpu", weights="fsdp")) as session:
        assert dist.is_initialized()
        assert session.mesh.shard_mesh is not None
        assert session.mesh.shard_mesh.size() == 1
    assert not dist.is_initialized()


def test_one_rank_that_offloads_whole_weights_needs_no_group() -> None:
    with start_session(ParallelSettings(device="cpu", weights="fsdp_offload")) as session:
        assert not dist.is_initialized()
        assert session.mesh.shard_mesh is None


def test_a_layout_that_does_not_fit_is_refused_before_any_group_exists() -> None:
    with pytest.raises(LayoutError, match="needs 2 ranks per replica"):
        start_session(ParallelSettings(device="cpu", ulysses=2))
    assert not dist.is_initialized()


def test_heads_are_checked_before_any_group_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LayoutError, match="ulysses=3 does not divide the model's 4"):
        start_session(ParallelSettings(device="cpu", ulysses=3), num_heads=4)
    assert not dist.is_initialized()


def test_ranks_without_a_rendezvous_are_refused_with_the_way_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LayoutError, match="MASTER_ADDR and MASTER_PORT is not set; start them with torchrun"):
        start_session(ParallelSettings(device="cpu"))


def test_an_environment_that_is_not_a_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LayoutError, match="RANK='zero'"):
        start_session(ParallelSettings(device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(LayoutError, match="torch sees no GPU here; use"):
        choose_device("cuda", local_rank=0)
    with pytest.raises(LayoutError, match="backend=nccl needs GPUs, but torch sees no GPU here"):
        start_session(ParallelSettings(backend="nccl"))
    assert choose_device("auto", local_rank=5) == torch.device("cpu")
    assert choose_backend("auto", torch.device("cpu")) == "gloo"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(LayoutError, match="local rank 4 has no GPU: this node has 4"):
        choose_device("auto", local_rank=4)


@pytest.mark.parametrize(
    ("visible", "has_agent", "allowed"),
    [(None, False, True), ("5", False, True), ("GPU-3f2a", True, True), (None, True, False), ("0,1", True, False)],
)
def test_a_rank_that_sees_its_own_gpu_only_uses_it(
    visible: str | None, has_agent: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``srun --gpus-per-task=1``, or a script per rank that sets ``CUDA_VISIBLE_DEVICES``."""
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "TORCHELASTIC_RUN_ID": "x" if has_agent else None}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    if allowed:
        assert choose_device("auto", local_rank=3) == torch.device("cuda", 0)
        assert used == [torch.device("cuda", 0)]
    else:
        with pytest.raises(LayoutError, match="local rank 3 has no GPU: this node has 1"):
            choose_device("auto", local_rank=3)


def test_ranks_that_share_a_gpu_learn_what_nccl_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise dist.DistBackendError("NCCL error: invalid usage, Duplicate GPU detected : rank 0 and rank 1")

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(LayoutError, match=r"rank 1 .*shares its GPU with another rank.*one rank per GPU"):
        start_session(ParallelSettings(device="cpu", ulysses=2))


def _full_disk() -> None:
    raise OSError(28, "disk full")


def test_zero3_without_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtraNotInstalled, match=r"pip install 'storymem_dist\[deepspeed\]'"):
        start_session(ParallelSettings(device="cpu", weights="zero3"))
    assert not dist.is_initialized()
