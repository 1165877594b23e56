import errno
import os
import threading
from pathlib import Path

import pytest

from storymem_dist import files


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_of_many_publishers_exactly_one_wins_and_its_content_stays(tmp_path: Path) -> None:
    wins: list[int] = []
    barrier = threading.Barrier(16)

    def publish(number: int) -> None:
        barrier.wait()
        if files.create_exclusively(tmp_path / "record", str(number).encode() * 1000):
            wins.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert (tmp_path / "record").read_bytes() == str(wins[0]).encode() * 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]


def test_a_link_whose_answer_was_lost_still_counts_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client that repeats a request reports "exists" for the link that its first request made."""
    (tmp_path / "source").write_bytes(b"x")
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert files.publish_exclusively(tmp_path / "source", tmp_path / "target")
    (tmp_path / "other").write_bytes(b"y")
    monkeypatch.setattr(os, "link", link)
    assert not files.publish_exclusively(tmp_path / "other", tmp_path / "target")


def test_a_view_follows_its_source_and_leaves_no_second_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
    view = tmp_path / "view"
    for name in ("one", "one", "two", "two", "one"):
        files.link_or_replace(tmp_path / name, view)
        assert view.read_bytes() == name.encode()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "two", "view"]


def test_json_is_canonical_and_refuses_nan() -> None:
    assert files.canonical_json({"b": 1, "a": "ü"}) == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        files.canonical_json({"a": float("nan")})


def test_names_leaves_out_hidden_files_and_takes_a_missing_folder_for_empty(tmp_path: Path) -> None:
    for name in ("b", "a", ".tmp-1-c"):
        (tmp_path / name).touch()
    assert files.names_in(tmp_path) == ["a", "b"]
    assert files.names_in(tmp_path / "absent") == []


def test_a_lock_is_held_by_one_until_it_is_released(tmp_path: Path) -> None:
    first = files.hold_lock(tmp_path / "x.lock")
    assert first is not None
    assert files.hold_lock(tmp_path / "x.lock") is None
    first.release()
    assert files.hold_lock(tmp_path / "x.lock") is not None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_never_refuses_and_leaves_no_lock_that_outlives_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert files.hold_lock(tmp_path / "x.lock") is not None
    assert files.hold_lock(tmp_path / "x.lock") is not None


def test_a_lock_file_that_may_not_be_written_is_an_error_not_a_lock_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(PermissionError):
        files.hold_lock(tmp_path / "x.lock")


@pytest.mark.parametrize(("durable", "num_flushed"), [(True, 2), (False, 0)])
def test_only_a_durable_write_flushes_the_file_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, num_flushed: int
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    files.write_bytes(tmp_path / "x", b"new", durable=durable)
    assert len(flushed) == num_flushed
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]
