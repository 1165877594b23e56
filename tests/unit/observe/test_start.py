import io
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import storymem_dist.events as ev
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.hardware import DeviceMemory, device_memory, peak_tflops
from storymem_dist.observe.journal import JournalWriter, read_journal
from storymem_dist.observe.observers import Observers
from storymem_dist.observe.settings import ConsoleSettings, TrackingSettings, WandbSettings
from storymem_dist.observe.start import RankInfo, start_observers, wait_for_replicas_of
from storymem_dist.observe.system import SystemSampler


def tracking(**changes: Any) -> TrackingSettings:
    values: dict[str, Any] = {
        "console": ConsoleSettings(mode="off"),
        "wandb": WandbSettings(mode="off"),
        "report": False,
        "system_interval_seconds": 0.0,
    }
    return TrackingSettings(**{**values, **changes})


def run_folder(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    return folder.root


def test_a_leaders_events_reach_its_file_and_a_followers_are_dropped(tmp_path: Path) -> None:
    root = run_folder(tmp_path)
    leader = RankInfo(rank=2, replica=1, num_replicas=2)
    for place in (leader, RankInfo(rank=3, replica=1, num_replicas=2, is_leader=False)):
        with start_observers(tracking(), root, place) as observers:
            observers.observer.notify(ev.StopRequested(reason=f"rank {place.rank}"))
    (stamped,) = read_journal(root / "events")
    assert (stamped.event, stamped.replica) == (ev.StopRequested(reason="rank 2"), 1)


def test_every_rank_samples_its_system(tmp_path: Path) -> None:
    root = run_folder(tmp_path)
    places = [RankInfo(rank=2, replica=1, num_replicas=2), RankInfo(rank=3, replica=1, num_replicas=2, is_leader=False)]
    for place in places:
        observers = start_observers(tracking(system_interval_seconds=0.05), root, place)
        deadline = time.monotonic() + 10.0
        while (
            not any(path.stat().st_size for path in (root / "events").glob("*.jsonl")) and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        time.sleep(0.2)
        observers.close()
    samples = [s.event for s in read_journal(root / "events") if isinstance(s.event, ev.SystemSampled)]
    assert {sample.rank for sample in samples} == {2, 3}


def test_the_console_writes_to_the_given_stream_and_the_report_is_written_at_the_end(tmp_path: Path) -> None:
    root = run_folder(tmp_path)
    stream = io.StringIO()
    settings = tracking(console=ConsoleSettings(), report=True)
    with start_observers(settings, root, RankInfo(), stream=stream) as observers:
        observers.observer.notify(ev.StopRequested(reason="SIGTERM"))
    assert "stopping after this step (SIGTERM)" in stream.getvalue()
    assert (root / "report.html").is_file()


def test_a_report_that_cannot_be_written_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_folder(tmp_path)
    (root / "report.html").mkdir()
    start_observers(tracking(report=True), root, RankInfo()).close()
    assert "report.html could not be written" in capsys.readouterr().err


def test_the_sweep_becomes_the_wandb_group_unless_one_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[str | None] = []

    class Process:
        name, tick_seconds = "wandb", 1.0

        def __init__(self, folder: Path, settings: WandbSettings) -> None:
            groups.append(settings.group)

        def handle(self, stamped: ev.StampedEvent) -> None: ...

        def tick(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("storymem_dist.observe.start.WandbProcess", Process)
    root = run_folder(tmp_path)
    for own in (None, "mine"):
        settings = tracking(wandb=WandbSettings(mode="offline", group=own))
        start_observers(settings, root, RankInfo(), sweep="cfg-sweep").close()
        assert settings.wandb.group == own, "the settings themselves stay as they were"
    start_observers(settings, root, RankInfo(rank=4, replica=1, num_replicas=2)).close()
    assert groups == ["cfg-sweep", "mine"], "only the first leader feeds"


def announce(root: Path, replica: int, *, job: str, over: bool, host: str = "", process_id: int = 0) -> None:
    writer = f"writer{replica}"
    with Observers(journal=JournalWriter(root / "events", writer), writer=writer, replica=replica) as observers:
        observers.notify(ev.JobStarted(job=job, num_replicas=3, host=host, process_id=process_id))
        if over:
            observers.notify(ev.JobFinished(outcome="finished"))


def test_the_first_leader_waits_until_its_other_replicas_are_finished(tmp_path: Path) -> None:
    root = run_folder(tmp_path)
    for replica, over in ((1, True), (2, False)):
        announce(root, replica, job="j", over=over)
    waiting = threading.Thread(target=wait_for_replicas_of, args=(root, RankInfo(job="j", num_replicas=3)))
    waiting.start()
    time.sleep(1.2)
    assert waiting.is_alive()
    with Observers(journal=JournalWriter(root / "events", "writer2-end"), writer="writer2", replica=2) as observers:
        observers.notify(ev.JobFinished(outcome="finished"))
    waiting.join(20.0)
    assert not waiting.is_alive()


def test_a_replica_that_fell_silent_is_not_waited_for(tmp_path: Path) -> None:
    root = run_folder(tmp_path)
    announce(root, 1, job="j", over=False)
    began = time.monotonic()
    wait_for_replicas_of(root, RankInfo(job="j", num_replicas=3), silence_seconds=0.5)
    assert 0.5 <= time.monotonic() - began < 10.0


@pytest.mark.parametrize(("host", "is_waited_for"), [(socket.gethostname(), False), ("another-host", True)])
def test_a_replica_whose_process_is_gone_from_this_host_is_not_waited_for(
    tmp_path: Path, host: str, is_waited_for: bool
) -> None:
    root = run_folder(tmp_path)
    with subprocess.Popen(["true"]) as ended:
        pass
    announce(root, 1, job="j", over=False, host=host, process_id=ended.pid)
    began = time.monotonic()
    wait_for_replicas_of(root, RankInfo(job="j", num_replicas=2), silence_seconds=2.5)
    assert (time.monotonic() - began >= 2.5) == is_waited_for


def test_a_replica_whose_process_lives_on_this_host_is_waited_for(tmp_path: Path) -> None:
    root = run_folder(tmp_path)
    announce(root, 1, job="j", over=False, host=socket.gethostname(), process_id=os.getpid())
    began = time.monotonic()
    wait_for_replicas_of(root, RankInfo(job="j", num_replicas=2), silence_seconds=1.5)
    assert time.monotonic() - began >= 1.5


def test_leaving_on_an_error_does_not_wait(tmp_path: Path) -> None:
    root = run_folder(tmp_path)
    began = time.monotonic()
    with pytest.raises(RuntimeError), start_observers(tracking(), root, RankInfo(job="j", num_replicas=8)):
        raise RuntimeError
    assert time.monotonic() - began < 30.0


def test_a_sample_measures_this_process(tmp_path: Path) -> None:
    sampler = SystemSampler(ev.NullObserver(), rank=5, interval_seconds=1000.0)
    began = time.thread_time()
    while time.thread_time() - began < 0.05:
        pass
    sample = sampler.sample()
    sampler.close()
    assert sample.rank == 5 and sample.host
    assert sample.host_memory_gib is not None and 0.01 < sample.host_memory_gib < 100.0
    assert sample.cpu_ratio is not None and 0.0 < sample.cpu_ratio < 64.0


def test_device_memory_is_that_of_the_thread_that_made_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    own = threading.get_ident()
    held = {0: 2**30, 3: 7 * 2**30}
    accelerator = SimpleNamespace(
        is_available=lambda: True,
        current_device_index=lambda: 3 if threading.get_ident() == own else 0,
        memory_stats=lambda device: {"reserved_bytes.all.current": held[device]},
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    sampler, samples = SystemSampler(ev.NullObserver(), rank=3, interval_seconds=1000.0), []
    thread = threading.Thread(target=lambda: samples.append(sampler.sample()))
    thread.start()
    thread.join()
    sampler.close()
    assert samples[0].gpu_memory_gib == 7.0 and samples[0].gpu_busy_ratio is None


def refuse(device: int) -> dict[str, int]:
    raise RuntimeError("Allocator for mps is not a DeviceAllocator.")


@pytest.mark.parametrize("memory_stats", [lambda device: {}, refuse])
def test_memory_that_no_allocator_counts_is_not_known(
    memory_stats: Callable[[int], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_memory(None) == DeviceMemory(held_gib=None, peak_gib=None)
    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(memory_stats=memory_stats))
    assert device_memory(0) == DeviceMemory(held_gib=None, peak_gib=None)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak
