import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storymem_dist.events import StampedEvent, StopRequested
from storymem_dist.observe.journal import (
    FOLLOWED_FILES,
    MOST_REPLICAS,
    JournalTail,
    JournalWriter,
    journal_folder,
    new_writer_id,
    read_journal,
)


def stamped(number: int, writer: str = "w", reason: str = "x", wall_time: float | None = None) -> StampedEvent:
    when = float(number) if wall_time is None else wall_time
    return StampedEvent(event=StopRequested(reason=reason), wall_time=when, writer=writer, replica=0, sequence=number)


def test_what_was_written_is_read_back_in_order_of_time(tmp_path: Path) -> None:
    for writer, times in (("b", [2.0, 4.0]), ("a", [1.0, 3.0])):
        journal = JournalWriter(tmp_path, writer)
        for number, when in enumerate(times):
            journal.write(stamped(number, writer, wall_time=when))
        journal.close()
    assert [event.wall_time for event in read_journal(tmp_path)] == [1.0, 2.0, 3.0, 4.0]


def test_a_tail_returns_each_event_once_and_continues_after_a_restart(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, "w")
    tail = JournalTail(tmp_path)
    journal.write(stamped(0))
    assert [event.sequence for event in tail.poll()] == [0]
    assert tail.poll() == []
    journal.write(stamped(1))
    assert [event.sequence for event in JournalTail(tmp_path, offsets=tail.offsets).poll()] == [1]
    assert [event.sequence for event in tail.poll()] == [1]


def test_a_follower_of_many_files_looks_at_a_part_of_them_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = [f"w{number:03d}" for number in range(2 * FOLLOWED_FILES + 10)]
    journals = {}
    for writer in writers:  # those of a job of many replicas, which divides them, and of an earlier one
        many = MOST_REPLICAS + 1 if writer > "w100" else 1
        journals[writer] = JournalWriter(journal_folder(tmp_path, writer, many), writer)
        journals[writer].write(stamped(0, writer))
    assert len(list(tmp_path.glob("*.jsonl"))) == 101
    tail, looked = JournalTail(tmp_path), []
    assert {event.writer for event in tail.follow()} == set(writers)
    for writer in writers:
        journals[writer].write(stamped(1, writer))
    read = JournalTail._read_new
    monkeypatch.setattr(JournalTail, "_read_new", lambda *given: looked.append(given[1]) or read(*given))
    seen = []
    for number in range(1, 4):
        seen += [event.writer for event in tail.follow()]
        assert len(looked) <= number * FOLLOWED_FILES
    assert sorted(seen) == writers
    assert len(read_journal(tmp_path)) == 2 * len(writers)
    for journal in journals.values():
        journal.close()


def test_a_line_that_is_still_being_written_waits_and_a_broken_one_is_counted(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, "w")
    journal.write(stamped(0))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(b'{"broken\n' + whole + whole[:20])
    tail = JournalTail(tmp_path)
    assert len(tail.poll()) == 1 and tail.num_unreadable == 1
    journal.path.write_bytes(b'{"broken\n' + whole + whole)
    assert len(tail.poll()) == 1 and tail.num_unreadable == 1


def test_a_tail_reads_a_long_file_in_pieces_and_skips_its_own_writer(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path, "w")
    for number in range(50):
        journal.write(stamped(number))
    tail = JournalTail(tmp_path)
    pieces = []
    while piece := tail.poll(max_bytes=1000):
        pieces.append(len(piece))
    assert sum(pieces) == 50 and len(pieces) > 3
    assert JournalTail(tmp_path, skip=("w",)).poll() == []


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, state = os.write, {"room": 30}

    def write(descriptor: int, data: bytes) -> int:
        if state["room"] <= 0:
            raise OSError(errno.ENOSPC, "no space left on device")
        written = real_write(descriptor, bytes(data[: state["room"]]))
        state["room"] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    journal = JournalWriter(tmp_path, "w")
    for number in range(3):
        journal.write(stamped(number))
    assert journal.last_error is not None
    assert read_journal(tmp_path) == []
    state["room"] = 10**9
    journal.write(stamped(3))
    assert journal.last_error is None
    assert [event.sequence for event in read_journal(tmp_path)] == [0, 1, 2, 3]


def test_memory_for_waiting_lines_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storymem_dist.observe.journal.MAX_PENDING_BYTES", 1000)
    journal = JournalWriter(tmp_path, "w")
    monkeypatch.setattr(os, "write", lambda descriptor, data: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
    for number in range(20):
        journal.write(stamped(number, reason="r" * 100))
    assert journal.num_lost > 0


def test_a_killed_process_leaves_every_event_it_notified(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal; from pathlib import Path\n"
        "from storymem_dist.events import StopRequested\n"
        "from storymem_dist.observe.journal import JournalWriter\n"
        "from storymem_dist.observe.observers import Observers\n"
        "observers = Observers(journal=JournalWriter(Path(sys.argv[1]), 'w'), writer='w')\n"
        "for number in range(200): observers.notify(StopRequested(reason=str(number)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[3], check=False)
    assert ended.returncode == -signal.SIGKILL
    events = read_journal(tmp_path)
    assert [event.sequence for event in events] == list(range(200))


def test_writer_ids_differ_and_are_safe_as_file_names() -> None:
    ids = {new_writer_id(3), new_writer_id(3), new_writer_id(3, rank=5), new_writer_id(0, suffix="wandb")}
    assert len(ids) == 4
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in ids)
