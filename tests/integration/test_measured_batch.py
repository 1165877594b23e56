"""What a replica measures of itself reaches its event file: bytes read, time in collectives, device memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from storymem_dist.events import JobStarted, ShotFinished, StepFinished, ThroughputSampled
from storymem_dist.observe.journal import read_journal
from storymem_dist.observe.run.summary import load_run_state
from tests.helpers.ranks import run_ranks
from tests.helpers.small_job import render_small, write_storyboard

SHARDED = ("parallel=fsdp_2gpu", "parallel.share_reads=false")


def samples(run: Path) -> list[ThroughputSampled]:
    events = [stamped.event for stamped in read_journal(run / "events")]
    return [event for event in events if isinstance(event, ThroughputSampled)]


def seconds_in_collectives(run: Path) -> list[float]:
    return [sample.collective_seconds for sample in samples(run) if sample.collective_seconds is not None]


def bytes_read(run: Path) -> list[int]:
    return [sample.bytes_read for sample in samples(run) if sample.bytes_read is not None]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_storyboard(tmp_path_factory.mktemp("in") / "fox.json", ((True, False),))


@pytest.fixture(scope="module")
def alone(board: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert render_small(board, run) == 0
    return run


def test_one_rank_reads_every_weight_and_spends_no_time_in_collectives(alone: Path) -> None:
    t2v, m2v = bytes_read(alone)
    assert t2v > 0 and m2v > 0
    loaded = [load.bytes_total for row in load_run_state(alone).rows.values() for load in row.weights_done]
    assert t2v + m2v == sum(loaded) and len(loaded) == 4
    assert seconds_in_collectives(alone) == [0.0, 0.0], "once per shot"
    assert {sample.gpu_memory_gib for sample in samples(alone)} == {None}, "there is no GPU"


def test_a_replica_of_two_ranks_reports_what_both_read_and_how_long_its_leader_waited(
    board: Path, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_ranks(render_small, 2, (board, run, *SHARDED)) == [0, 0]
    assert bytes_read(run) == bytes_read(alone), "each rank reads its half"
    seconds = seconds_in_collectives(run)
    assert len(seconds) == 2 and min(seconds) > 0.0
    events = [stamped.event for stamped in read_journal(run / "events")]
    [started] = [event for event in events if isinstance(event, JobStarted)]  # one replica, one leader
    assert started.attention == "auto (flash)"
    whole = sum(event.elapsed_seconds for event in events if isinstance(event, ShotFinished))
    [row] = load_run_state(run).rows.values()
    assert row.collective_seconds == pytest.approx(sum(seconds)) and sum(seconds) < whole
    assert row.bytes_read == sum(bytes_read(alone))


def test_steps_and_shots_tell_what_torch_holds_of_the_device(
    board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"reserved_bytes.all.current": 3 * 2**30, "allocated_bytes.all.peak": 2**31}
    accelerator = SimpleNamespace(
        is_available=lambda: True,
        current_device_index=lambda: 5,
        memory_stats=lambda device: counts if device == 5 else {},
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    assert render_small(board, tmp_path / "run", "stories.max_shots=1") == 0
    events = [stamped.event for stamped in read_journal(tmp_path / "run" / "events")]
    assert [event.gpu_memory_gib for event in events if isinstance(event, StepFinished)] == [3.0] * 3
    [of_shot] = [sample for sample in samples(tmp_path / "run") if sample.collective_seconds is not None]
    assert (of_shot.gpu_memory_gib, of_shot.peak_gpu_memory_gib) == (3.0, 2.0)
    [row] = load_run_state(tmp_path / "run").rows.values()
    assert row.gpu_memory_gib == 3.0
