import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import storymem_dist.events as ev
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.errors import ConfigError
from storymem_dist.observe import prometheus
from storymem_dist.observe.journal import JournalTail, read_journal
from storymem_dist.observe.prometheus import PrometheusFile, check_textfile
from storymem_dist.observe.settings import ConsoleSettings, PrometheusSettings, TrackingSettings, WandbSettings
from storymem_dist.observe.start import RankInfo, start_observers
from tests.helpers.fake_run import FakeRun

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(text: str) -> dict[Sample, float]:
    """All samples of a file, parsed by the library: names, labels and values; every sample has a type and a help."""
    found: dict[Sample, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter"), family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert sample.timestamp is None, "the textfile collector refuses timestamps"
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, "node_exporter refuses a sample that appears twice"
            found[key] = sample.value
    return found


def value(found: dict[Sample, float], name: str, **labels: str) -> float:
    (one,) = [number for (key, has), number in found.items() if key == name and labels.items() <= dict(has).items()]
    return one


def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, num_replicas: int = 2) -> list[Path]:
    """Two replicas of one job at work, each with its file; the first one is the last to write."""
    run = FakeRun(tmp_path / "night", num_stories=2, num_shots=3, job="job 7")
    folder = tmp_path / "collector"
    folder.mkdir()
    events = run.folder.events_folder
    files = []
    for number in (1, 0):
        tail = JournalTail(events, skip=("start02-r0",)) if number == 0 else None
        file = PrometheusFile(folder / "storymem.prom", run="night", replica=number, tail=tail)
        files.append(file.path)
        with run.replica(number, num_replicas=num_replicas, back_ends=[file]) as replica:
            monkeypatch.setattr(time, "time", lambda clock=replica.clock: clock.now)
            run.shot(replica, number, 0)
            run.shot(replica, number, 1, fail="no" if number else "")
            run.wait(replica, 3.0)
            if number == 0:
                notify = replica.observers.notify
                notify(ev.RequestApplied(number=1, action="pause", who="lea", asked_at=replica.clock.now - 2))
                notify(ev.RequestApplied(number=2, action="skip", story_id="story_1"))
    return files[::-1]


def test_the_files_of_two_replicas_say_what_each_did_and_one_of_them_what_all_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = played(tmp_path, monkeypatch)
    assert (first.name, second.name) == ("storymem.prom", "storymem.replica1.prom")
    one, other = samples(first.read_text()), samples(second.read_text())
    assert not one.keys() & other.keys(), "the same sample in two files ends the whole scrape"
    assert value(one, "storymem_replica_shots_total", replica="0", outcome="finished") == 2
    assert value(other, "storymem_replica_shots_total", replica="1", outcome="failed") == 1
    assert value(one, "storymem_replica_steps_total", render_job="job 7") == 8
    assert value(other, "storymem_replica_waited_seconds_total") == 3.0
    shots = {state: value(one, "storymem_shots", state=state) for state in ("finished", "failed", "running", "skipped")}
    assert shots == {"finished": 3, "failed": 1, "running": 0, "skipped": 1}
    assert value(one, "storymem_shots", state="waiting") == 1
    assert value(one, "storymem_queue_paused") == 1.0 and value(one, "storymem_requests_applied") == 2
    assert value(one, "storymem_clips_per_gpu_hour") > 0 and value(one, "storymem_seconds_per_step") > 1.5
    assert not any(name in ("storymem_shots", "storymem_clips_per_gpu_hour") for name, _ in other)
    assert value(one, "storymem_build_info", torch="2.13.0", run="night") == 1.0
    helps = [{line for line in path.read_text().splitlines() if line.startswith("# ")} for path in (first, second)]
    assert helps[1] <= helps[0], "node_exporter drops a metric whose help differs between files"


def test_the_file_of_a_replica_that_ended_stays_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = played(tmp_path, monkeypatch)
    assert value(samples(first.read_text()), "storymem_up") == 0.0
    assert sorted(path.name for path in first.parent.iterdir()) == ["storymem.prom", "storymem.replica1.prom"]


def test_it_is_up_from_its_first_event_on_and_what_is_rendered_is_running(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "night", num_stories=1, num_shots=2)
    file = PrometheusFile(tmp_path / "x.prom", run="night", replica=0, tail=JournalTail(tmp_path / "none"))
    with run.replica(0, at=time.time()) as replica:
        run.shot(replica, 0, 0, stop_after_step=1)
    for stamped in read_journal(run.folder.events_folder):
        file.handle(stamped)
        assert value(samples(file.path.read_text()), "storymem_up") == 1.0
    file.tick()
    found = samples(file.path.read_text())
    assert value(found, "storymem_shots", state="running") == 1 and value(found, "storymem_replicas_up") == 1


@settings(max_examples=60)
@given(st.text(), st.text(), st.integers(0, 3))
def test_any_name_of_a_run_and_a_job_is_a_valid_label(run: str, job: str, replica: int) -> None:
    figures = prometheus._Figures(run, replica, device=None, is_first=True)
    figures.apply(
        ev.StampedEvent(event=ev.JobStarted(job=job, host=run), wall_time=1.0, writer="w", replica=0, sequence=0)
    )
    registry = CollectorRegistry()
    registry.register(figures)
    found = samples(generate_latest(registry).decode())
    assert value(found, "storymem_up", replica=str(replica), run=prometheus._label(run)) == 1.0


def test_free_and_reserved_memory_of_the_leaders_device_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def free(device: Any) -> int:
        asked.append(str(device))
        return 123_456

    monkeypatch.setattr(prometheus, "current_device", lambda: 3)
    monkeypatch.setattr(prometheus, "free_device_memory_bytes", free)
    monkeypatch.setattr(
        prometheus, "device_memory", lambda device: SimpleNamespace(held_gib=2.0 if device == 3 else None)
    )
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: SimpleNamespace(type="cuda"))
    file = PrometheusFile(tmp_path / "x.prom", run="night", replica=0)
    file.tick()
    found = samples(file.path.read_text())
    assert value(found, "storymem_device_free_bytes") == 123_456 and asked == ["cuda:3"]
    assert value(found, "storymem_device_reserved_bytes") == 2 * 2**30


def test_a_device_that_does_not_answer_costs_that_figure_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: Any) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(prometheus, "current_device", lambda: 0)
    monkeypatch.setattr(prometheus, "free_device_memory_bytes", fail)
    monkeypatch.setattr(prometheus, "device_memory", lambda device: SimpleNamespace(held_gib=None))
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: SimpleNamespace(type="cuda"))
    file = PrometheusFile(tmp_path / "x.prom", run="night", replica=0)
    file.tick()
    names = {name for name, _ in samples(file.path.read_text())}
    assert "storymem_up" in names and "storymem_device_free_bytes" not in names


def test_a_write_that_fails_is_reported_once_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "collector"
    folder.mkdir()
    file = PrometheusFile(folder / "x.prom", run="night", replica=0)
    folder.rename(tmp_path / "away")
    file.tick()
    file.tick()
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "away").rename(folder)
    file.tick()
    assert file.path.is_file() and not list(folder.glob("*.prom.*"))


@pytest.mark.parametrize("text", ["", "x", "x.prom/", "a/.prom", "x.txt", "x.prom\0", "x.prom.tmp"])
def test_a_name_that_node_exporter_would_not_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.prometheus\.textfile=.* ends in \.prom"):
        PrometheusSettings(textfile=text)


def test_points_of_a_joined_sweep_write_a_file_each() -> None:
    assert PrometheusSettings(textfile="/a/x.prom").of_part(2).textfile == "/a/x.point2.prom"
    assert PrometheusSettings().of_part(2).textfile is None


@pytest.mark.parametrize("place", ["missing/x.prom", "file/x.prom", "folder.prom"])
def test_a_place_that_cannot_be_written_is_refused_before_a_job_and_a_warning_in_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.prom").mkdir()
    textfile = str(tmp_path / place)
    with pytest.raises(ConfigError, match=r"tracking\.prometheus\.textfile=.* cannot be written: "):
        check_textfile(textfile)
    run = RunFolder(tmp_path / "run")
    run.open()
    tracking = TrackingSettings(
        console=ConsoleSettings(mode="off"),
        wandb=WandbSettings(mode="off"),
        prometheus=PrometheusSettings(textfile=textfile),
        report=False,
        system_interval_seconds=0.0,
    )
    with start_observers(tracking, run.root, RankInfo()) as observers:
        observers.observer.notify(ev.StopRequested(reason="SIGTERM"))
    warning, stop = (stamped.event for stamped in read_journal(run.events_folder))
    assert isinstance(warning, ev.WarningIssued) and "the render continues without it" in warning.message
    assert isinstance(stop, ev.StopRequested)


def test_a_job_writes_its_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open()
    textfile = tmp_path / "x.prom"
    tracking = TrackingSettings(
        console=ConsoleSettings(mode="off"),
        wandb=WandbSettings(mode="off"),
        prometheus=PrometheusSettings(textfile=str(textfile)),
        report=False,
        system_interval_seconds=0.0,
    )
    with start_observers(tracking, run.root, RankInfo(job="j")) as observers:
        observers.observer.notify(ev.JobStarted(job="j", num_shots=4, num_stories=1))
    found = samples(textfile.read_text())
    assert value(found, "storymem_shots", state="waiting", run="run") == 4
    assert value(found, "storymem_up", render_job="j") == 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.prom"]
