import errno
import json
import os
import threading
import time
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


# -- what comes from somebody else -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a file, a folder and links, next to a file that is none of its business."""
    root = tmp_path / "run"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "file").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "file").write_text("outside")
    (root / "within").symlink_to("folder/file")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "over").symlink_to("out")
    (root / "up").symlink_to("..")
    (root / "sibling").symlink_to(tmp_path / "run2")
    (root / "loop").symlink_to("loop")
    return root


@pytest.mark.parametrize("path", ["folder/file", "./folder//file", "within", "folder"])
def test_a_name_inside_is_resolved_also_through_links_that_stay_inside(run: Path, tmp_path: Path, path: str) -> None:
    place = run / "folder" / ("" if path == "folder" else "file")
    assert files.resolve_inside(run, path) == place.resolve()
    (tmp_path / "link").symlink_to(run)
    assert files.resolve_inside(tmp_path / "link", path) == place.resolve(), "the folder itself may be a link"


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "folder/../../secret",
        "folder/../folder/file",
        "/etc/passwd",
        "//etc/passwd",
        "out",
        "over",
        "up/secret",
        "up/run2/file",
        "sibling/file",
        "a\0b",
        "\ud800",
    ],
)
def test_a_name_that_leads_out_is_refused(run: Path, path: str) -> None:
    with pytest.raises(files.UnsafePath):
        files.resolve_inside(run, path)


@pytest.mark.parametrize("path", ["missing", "loop", "folder/file/x", "n" * 5000, "n/" * 5000])
def test_a_name_without_a_file_is_an_error_of_the_system(run: Path, path: str) -> None:
    with pytest.raises(OSError):
        files.resolve_inside(run, path)


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(files.UnsafePath, match="not a regular file"):
            files.open_regular(path)
    (tmp_path / "big").write_bytes(b"x" * 11)
    assert files.read_limited(tmp_path / "big", 11) == b"x" * 11
    with pytest.raises(files.UnsafePath, match="larger than 10 bytes"):
        files.read_limited(tmp_path / "big", 10)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 65 + "]" * 65,
        "[" * 10**6,
        '{"a":' * 10**5,
        "NaN",
        "-Infinity",
        "1e999",
        "1" * 5000,
        '"\\ud800"',
        '{"a": 1, "a": 2}',
        "",
        "{",
        "\ufeff{}",
    ],
)
def test_json_that_no_writer_of_ours_makes_is_a_value_error_at_once(text: str) -> None:
    began = time.monotonic()
    for data in (text, text.encode()):
        with pytest.raises(ValueError):
            files.parse_json(data)
    assert time.monotonic() - began < 2


def test_json_of_ours_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"a": [1, -2.5, None, True, "ü“[{"], "b": {"c": [[]] * 100}}
    files.write_bytes(tmp_path / "a.json", files.canonical_json(value))
    assert files.read_json(tmp_path / "a.json") == value
    deep = json.loads("[" * 64 + "]" * 64)
    assert files.parse_json(json.dumps(deep)) == deep


def test_a_link_with_the_name_of_a_temporary_file_or_a_lock_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda number: "predicted")
    (tmp_path / ".tmp-predicted-x").symlink_to(target)
    for write in (files.write_bytes, files.create_exclusively):
        with pytest.raises(FileExistsError):
            write(tmp_path / "x", b"new")
        (tmp_path / ".tmp-predicted-x").unlink(missing_ok=True)
        (tmp_path / ".tmp-predicted-x").symlink_to(target)
    (tmp_path / "link.lock").symlink_to(target)
    (tmp_path / "name.lock").hardlink_to(target)
    os.mkfifo(tmp_path / "pipe.lock")
    (tmp_path / "folder.lock").mkdir()
    for name in ("link", "name", "pipe", "folder"):
        with pytest.raises(files.UnsafePath, match="is not a lock file"):
            files.hold_lock(tmp_path / f"{name}.lock")
    assert target.read_text() == "precious"


def test_writing_over_a_link_replaces_the_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "target")
    files.write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "target").read_text() == "precious" and not (tmp_path / "x").is_symlink()


def test_the_identity_of_weights_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """It is part of fingerprints."""
    path = tmp_path / "weights"
    path.write_bytes(b"".join(number.to_bytes(4, "little") for number in range(300_000)))
    assert files.file_identity(path) == "8958b8954a49122a2c98ab3dacf4f18d0fd3adc0ba93fdac17f9ccd9d1501596"


def test_a_quick_digest_covers_small_files_whole_and_reads_little_of_large_ones(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for size, finds in ((1, 1), (100_000, 100_000), (192 * 1024, 192 * 1024), (2**24, 0)):
        data = bytearray(size)
        path.write_bytes(data)
        before = files.quick_digest(path)
        for position in (0, size // 2, size - 1) if finds else (0, size - 1):
            data[position] ^= 1
            path.write_bytes(data)
            assert files.quick_digest(path) != before
            data[position] ^= 1
    path.write_bytes(data)
    assert files.quick_digest(path) == before


@pytest.mark.parametrize("target", ["view", "nowhere", "one"])
def test_a_link_with_the_name_of_a_view_is_replaced(tmp_path: Path, target: str) -> None:
    (tmp_path / "one").write_bytes(b"one")
    view = tmp_path / "view"
    view.symlink_to(target)
    files.link_or_replace(tmp_path / "one", view)
    assert not view.is_symlink() and view.samefile(tmp_path / "one")
