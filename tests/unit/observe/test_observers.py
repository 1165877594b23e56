import threading
import time
from pathlib import Path

import pytest

from storymem_dist.events import StampedEvent, StopRequested, WarningIssued
from storymem_dist.observe.journal import JournalWriter, read_journal
from storymem_dist.observe.observers import Observers


class Recorder:
    name = "recorder"
    tick_seconds = 0.01

    def __init__(self) -> None:
        self.events: list[StampedEvent] = []
        self.num_ticks = 0
        self.closed = False

    def handle(self, stamped: StampedEvent) -> None:
        self.events.append(stamped)

    def tick(self) -> None:
        self.num_ticks += 1

    def close(self) -> None:
        self.closed = True


class Raising(Recorder):
    name = "raising"

    def handle(self, stamped: StampedEvent) -> None:
        super().handle(stamped)
        raise RuntimeError("no service today")


class Hanging(Recorder):
    name = "hanging"

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def handle(self, stamped: StampedEvent) -> None:
        self.release.wait(60.0)


def reasons(events: list[StampedEvent]) -> list[str]:
    return [stamped.event.reason for stamped in events if isinstance(stamped.event, StopRequested)]


def warnings(events: list[StampedEvent]) -> list[str]:
    return [stamped.event.message for stamped in events if isinstance(stamped.event, WarningIssued)]


def test_every_back_end_and_the_journal_get_every_event_in_order(tmp_path: Path) -> None:
    one, other = Recorder(), Recorder()
    with Observers([one, other], journal=JournalWriter(tmp_path, "w"), writer="w", replica=2) as observers:
        for number in range(50):
            observers.notify(StopRequested(reason=str(number)))
    wanted = [str(number) for number in range(50)]
    assert reasons(one.events) == reasons(other.events) == reasons(read_journal(tmp_path)) == wanted
    assert one.closed and other.closed
    assert {(event.writer, event.replica) for event in one.events} == {("w", 2)}


def test_events_from_many_threads_get_gapless_numbers(tmp_path: Path) -> None:
    observers = Observers(journal=JournalWriter(tmp_path, "w"), writer="w")

    def send() -> None:
        for _ in range(100):
            observers.notify(StopRequested(reason="x"))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    observers.close()
    assert sorted(event.sequence for event in read_journal(tmp_path)) == list(range(400))
    lines = (tmp_path / "w.jsonl").read_text().splitlines()
    assert [f'"sequence":{number},' in line for number, line in enumerate(lines)] == [True] * 400


def test_a_back_end_that_raises_is_dropped_with_one_warning(tmp_path: Path) -> None:
    raising, good, lines = Raising(), Recorder(), list[str]()
    with Observers(
        [raising, good], journal=JournalWriter(tmp_path, "w"), writer="w", queue_size=4, report_line=lines.append
    ) as observers:
        for number in range(20):
            observers.notify(StopRequested(reason=str(number)))
            deadline = time.monotonic() + 10.0
            while len(reasons(good.events)) <= number and time.monotonic() < deadline:
                time.sleep(0.001)
    assert len(raising.events) == 1 and not raising.closed
    assert reasons(read_journal(tmp_path)) == reasons(good.events) == [str(number) for number in range(20)]
    sent = warnings(read_journal(tmp_path))
    assert sent == lines == ["raising failed and is switched off: RuntimeError: no service today"]


def test_a_back_end_that_hangs_blocks_no_other_and_is_not_waited_for_at_the_end(tmp_path: Path) -> None:
    hanging, good, lines = Hanging(), Recorder(), list[str]()
    observers = Observers(
        [hanging, good],
        journal=JournalWriter(tmp_path, "w"),
        writer="w",
        queue_size=8,
        report_line=lines.append,
    )
    began = time.monotonic()
    for number in range(500):
        observers.notify(StopRequested(reason=str(number)))
        if number % 4 == 0:
            time.sleep(0.001)
    observers.close(timeout_seconds=0.5)
    hanging.release.set()
    assert time.monotonic() - began < 30.0, "the hang of a minute reached the caller"
    assert reasons(read_journal(tmp_path)) == [str(number) for number in range(500)]
    assert [line for line in lines if line.startswith("hanging cannot keep up")] == lines[:1]
    assert "hanging did not finish within 0.5 s" in lines[-1]


def test_a_back_end_that_sends_events_itself_starts_no_flood(tmp_path: Path) -> None:
    class Flooding(Recorder):
        name = "flooding"

        def handle(self, stamped: StampedEvent) -> None:
            super().handle(stamped)
            for _ in range(100):
                observers.notify(StopRequested(reason="echo"))

    flooding = Flooding()
    observers = Observers([flooding], journal=JournalWriter(tmp_path, "w"), writer="w")
    for number in range(5):
        observers.notify(StopRequested(reason=str(number)))
    observers.close()
    assert reasons(read_journal(tmp_path)) == [str(number) for number in range(5)]


def test_a_back_end_that_computes_all_the_time_gets_a_small_part_of_it() -> None:
    class Busy(Recorder):
        name = "busy"
        tick_seconds = 1e-6
        computed = 0.0

        def tick(self) -> None:
            began = time.thread_time()
            while time.thread_time() - began < 0.005:
                pass
            self.computed += 0.005

    busy = Busy()
    observers = Observers([busy])
    time.sleep(1.0)
    computed = busy.computed
    observers.close()
    assert 0.1 <= computed < 0.15, "what it has in reserve, and a hundredth of the second"


def test_back_ends_are_ticked_while_nothing_happens() -> None:
    recorder = Recorder()
    observers = Observers([recorder])
    deadline = time.monotonic() + 10.0
    while recorder.num_ticks < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    observers.close()
    assert recorder.num_ticks >= 3 and recorder.events == []


def test_closing_twice_and_notifying_after_it_do_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    observers = Observers([recorder], journal=JournalWriter(tmp_path, "w"), writer="w")
    observers.close()
    observers.close()
    observers.notify(StopRequested(reason="late"))
    assert read_journal(tmp_path) == []


def test_a_disk_that_refuses_events_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    observers = Observers(journal=JournalWriter(tmp_path, "w"), writer="w", report_line=lines.append)
    monkeypatch.setattr("os.write", lambda descriptor, data: (_ for _ in ()).throw(OSError(28, "no space left")))
    for _ in range(3):
        observers.notify(StopRequested(reason="x"))
    assert len(lines) == 1 and "no space left" in lines[0] and "w.jsonl" in lines[0]
