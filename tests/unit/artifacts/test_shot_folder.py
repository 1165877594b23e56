import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from storymem_dist.artifacts import shot_folder
from storymem_dist.artifacts.records import DamagedRecord, ShotRecord, StoredKeyframe
from storymem_dist.artifacts.shot_folder import ClipFiles, ShotFolder, keyframe_name, new_attempt_id, tail_name
from storymem_dist.artifacts.video import VideoSettings, read_png
from tests.helpers.records import make_record

FINGERPRINT = "ab" * 32


def yes() -> bool:
    return True


def save(
    shot: ShotFolder, *, fingerprint: str = FINGERPRINT, slots: tuple[int, ...] = (0, 2), **changes: object
) -> ShotRecord:
    """Save an attempt of a 3-frame clip; return its record, not yet published."""
    attempt_id = new_attempt_id(fingerprint, "owner")
    clip = torch.arange(3 * 3 * 16 * 16).reshape(3, 3, 16, 16).to(torch.uint8)
    keyframes = [(slot, index, clip[index]) for index, slot in enumerate(slots)]
    files = ClipFiles(clip=clip, keyframes=keyframes, tail=clip[-2:], fps=16)
    stored = shot.save_attempt(attempt_id, files, VideoSettings(preset="ultrafast"))
    record = make_record(
        fingerprint=fingerprint,
        files=stored,
        keyframes=tuple(
            StoredKeyframe(slot=slot, frame_index=i, file=keyframe_name(slot)) for i, slot in enumerate(slots)
        ),
        tail=(tail_name(0), tail_name(1)),
        host={"attempt_id": attempt_id},
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


@pytest.fixture
def shot(tmp_path: Path) -> ShotFolder:
    return ShotFolder(tmp_path / "ocean", "shot_01")


def test_a_published_record_and_its_images_come_back(shot: ShotFolder) -> None:
    record = save(shot)
    assert not shot.is_committed(FINGERPRINT) and shot.read_record(FINGERPRINT) is None
    assert shot.publish(record, may_publish=yes)
    assert shot.is_committed(FINGERPRINT)
    assert shot.read_record(FINGERPRINT, check_contents=True) == record
    keyframes, tail = shot.read_images(record)
    assert len(keyframes) == 2 and tail is not None and tail.shape == (2, 3, 16, 16)
    assert torch.equal(tail[1], read_png(shot.files_of(record) / "tail_1.png"))


def test_the_second_attempt_is_not_published_and_its_files_are_removed(shot: ShotFolder) -> None:
    first, second = save(shot), save(shot)
    assert shot.publish(first, may_publish=yes) and not shot.publish(second, may_publish=yes)
    assert shot.read_record(FINGERPRINT) == first
    assert not shot.files_of(second).exists() and shot.files_of(first).exists()


def test_an_attempt_without_its_lease_is_not_published(shot: ShotFolder) -> None:
    record = save(shot)
    assert not shot.publish(record, may_publish=lambda: False)
    assert not shot.is_committed(FINGERPRINT) and not shot.files_of(record).exists()


def test_records_of_other_inputs_live_side_by_side_and_the_newest_is_found(shot: ShotFolder) -> None:
    other = "cd" * 32
    assert shot.newest_other_record(FINGERPRINT) is None
    for fingerprint, when in ((FINGERPRINT, 1.0), (other, 3.0), ("ef" * 32, 2.0)):
        assert shot.publish(save(shot, fingerprint=fingerprint, timing={"committed_at": when}), may_publish=yes)
    assert len(shot.record_names()) == 3
    newest = shot.newest_other_record(FINGERPRINT)
    assert newest is not None and newest.fingerprint == other


def test_a_published_attempt_cannot_be_discarded_even_when_it_was_published_in_that_moment(shot: ShotFolder) -> None:
    record = save(shot)
    shot.publish(record, may_publish=yes)
    shot.discard_attempt(record.attempt_id)
    assert shot.read_record(FINGERPRINT, check_contents=True) == record
    assert (shot.files_of(record) / "record.json").exists(), "its own name is put back"


def test_after_its_attempt_is_discarded_a_late_owner_cannot_publish(shot: ShotFolder) -> None:
    late = save(shot)

    def discarded_meanwhile() -> bool:
        shot.discard_orphans(FINGERPRINT)
        return True

    with pytest.raises(FileNotFoundError):
        shot.publish(late, may_publish=discarded_meanwhile)
    assert not shot.is_committed(FINGERPRINT)


def test_orphans_of_one_fingerprint_are_removed_and_nothing_else(shot: ShotFolder) -> None:
    kept = save(shot)
    shot.publish(kept, may_publish=yes)
    orphan, foreign = save(shot), save(shot, fingerprint="cd" * 32)
    assert shot.discard_orphans(FINGERPRINT) == [orphan.attempt_id]
    assert shot.files_of(kept).exists() and shot.files_of(foreign).exists()
    assert shot.discard_orphans(FINGERPRINT) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', b"\xff\xfe"])
def test_a_record_that_cannot_be_read_is_set_aside(shot: ShotFolder, text: str | bytes) -> None:
    shot.publish(save(shot), may_publish=yes)
    path = shot.folder / "records" / f"{FINGERPRINT[:16]}.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedRecord, match="was set aside"):
        shot.read_record(FINGERPRINT)
    assert shot.read_record(FINGERPRINT) is None and shot.record_names() == []
    assert len(list((shot.folder / "records").glob("*.damaged-*"))) == 1
    again = save(shot)
    assert shot.publish(again, may_publish=yes) and shot.read_record(FINGERPRINT) == again


def test_a_record_of_another_shot_under_this_name_is_set_aside(shot: ShotFolder) -> None:
    shot.publish(save(shot), may_publish=yes)
    path = shot.folder / "records" / f"{FINGERPRINT[:16]}.json"
    record = ShotRecord.from_json(json.loads(path.read_text()))
    path.unlink()
    path.write_bytes(dataclasses.replace(record, fingerprint=FINGERPRINT[:16] + "0" * 48).to_json())
    with pytest.raises(DamagedRecord, match="of fingerprint"):
        shot.read_record(FINGERPRINT)


def test_setting_aside_spares_a_good_record_that_has_just_replaced_the_bad_one(
    shot: ShotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shot.publish(save(shot), may_publish=yes)
    path = shot.folder / "records" / f"{FINGERPRINT[:16]}.json"
    path.unlink()
    path.write_text("{")
    good = save(shot)

    parse = shot_folder._parse

    def parse_late(data: bytes) -> ShotRecord:
        path.unlink()
        assert shot.publish(good, may_publish=yes)
        return parse(data)

    monkeypatch.setattr(shot_folder, "_parse", parse_late)
    with pytest.raises(DamagedRecord):
        shot.read_record(FINGERPRINT)
    monkeypatch.undo()
    assert shot.read_record(FINGERPRINT) == good
    assert not list((shot.folder / "records").glob("*.damaged-*"))


def test_an_image_that_cannot_be_decoded_sets_the_record_aside(shot: ShotFolder) -> None:
    record = save(shot)
    shot.publish(record, may_publish=yes)
    (shot.files_of(record) / "tail_0.png").write_bytes(b"not an image")
    with pytest.raises(DamagedRecord, match=r"set aside: the contents of tail_0\.png have changed"):
        shot.read_images(record)
    assert not shot.is_committed(FINGERPRINT)


@pytest.mark.parametrize("name", ["clip.mp4", "tail_0.png", "keyframe_0.png"])
def test_a_file_that_became_a_link_is_not_followed(shot: ShotFolder, tmp_path: Path, name: str) -> None:
    record = save(shot)
    shot.publish(record, may_publish=yes)
    path = shot.files_of(record) / name
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name)
    with pytest.raises(DamagedRecord, match=f"{name} is a link or not a regular file"):
        shot.read_record(FINGERPRINT)


def test_a_changed_bit_of_an_image_is_found_when_it_is_read(shot: ShotFolder) -> None:
    record = save(shot)
    shot.publish(record, may_publish=yes)
    path = shot.files_of(record) / "keyframe_0.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert shot.read_record(FINGERPRINT) == record, "images are compared when they are read"
    with pytest.raises(DamagedRecord, match=r"set aside: the contents of keyframe_0\.png have changed"):
        shot.read_images(record)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"format": ' + b"1" * 5000 + b"}", b'{"format": NaN}', b"\xff"]
)
def test_a_hostile_record_is_a_damaged_one(shot: ShotFolder, content: bytes) -> None:
    shot.publish(save(shot), may_publish=yes)
    path = shot.folder / "records" / f"{FINGERPRINT[:16]}.json"
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(DamagedRecord, match="set aside: it is not JSON"):
        shot.read_record(FINGERPRINT)
    assert shot.newest_other_record("f" * 64) is None


def test_a_record_that_is_a_pipe_is_a_damaged_one_and_nothing_waits(shot: ShotFolder) -> None:
    shot.publish(save(shot), may_publish=yes)
    path = shot.folder / "records" / f"{FINGERPRINT[:16]}.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedRecord, match="not a regular file"):
        shot.read_record(FINGERPRINT)


def test_a_file_in_place_of_the_attempts_is_a_damaged_record(shot: ShotFolder) -> None:
    record = save(shot)
    assert shot.publish(record, may_publish=yes)
    shutil.rmtree(shot.folder / "attempts")
    (shot.folder / "attempts").write_text("{}")
    with pytest.raises(DamagedRecord, match="cannot be used"):
        shot.read_images(record)
    assert shot.read_record(record.fingerprint) is None, "it was set aside"


def test_views_show_the_current_record_and_lose_what_it_does_not_have(shot: ShotFolder) -> None:
    story = shot.folder.parent
    many, few = save(shot, slots=(0, 1, 2)), save(shot, fingerprint="cd" * 32, slots=(1,))
    for record in (many, few):
        shot.publish(record, may_publish=yes)
    (story / "keyframes").mkdir()
    (story / "keyframes" / "shot_011_0.png").touch()
    for record, names in ((many, ["0", "1", "2"]), (few, ["1"]), (few, ["1"]), (many, ["0", "1", "2"])):
        shot.repair_views(record)
        assert (story / "shot_01.mp4").samefile(shot.files_of(record) / "clip.mp4")
        assert json.loads((story / "shot_01.json").read_text())["fingerprint"] == record.fingerprint
        shown = sorted(path.name for path in (story / "keyframes").glob("shot_01_*.png"))
        assert shown == [f"shot_01_{name}.png" for name in names]
    assert (story / "keyframes" / "shot_011_0.png").exists(), "views of another shot are not touched"
