import dataclasses
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord, StoredFile, describe_file
from storymem_dist.files import parse_json, quick_digest
from tests.helpers.records import make_record

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run_of_70da1c0" / "run" / "stories" / "old_run" / "shot_01.json"
REQUIRED = [field.name for field in dataclasses.fields(ShotRecord) if field.name not in ("clip_sample", "own")]


def test_a_record_survives_json_and_its_text_is_canonical() -> None:
    record = make_record()
    assert ShotRecord.from_json(json.loads(record.to_json())) == record
    assert ShotRecord.from_json(json.loads(record.to_json())).to_json() == record.to_json()
    assert "“wave”" in record.to_json().decode()


def test_equal_shots_differ_in_timing_and_host_only() -> None:
    one = json.loads(make_record(timing={"committed_at": 1.0}, host={"attempt_id": "x"}).to_json())
    two = json.loads(make_record(timing={"committed_at": 2.0}, host={"attempt_id": "y"}).to_json())
    assert {key for key in one if one[key] != two[key]} == {"timing", "host"}


@pytest.mark.parametrize("field", REQUIRED)
def test_a_record_that_lacks_a_part_is_damaged_and_the_message_names_it(field: str) -> None:
    value = json.loads(make_record().to_json())
    del value[field]
    with pytest.raises(DamagedRecord, match=f"lacks.*{field}"):
        ShotRecord.from_json(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format=99"),
        ({"files": []}, "wrong type"),
        ({"files": {"clip.mp4": {"num_bytes": 3}}}, "wrong type"),
        ({"keyframes": [{"slot": 0}]}, "wrong type"),
        ({"keyframes": None}, "wrong type"),
        ({"host": {}}, "wrong type"),
        ({"shot_index": "0"}, "shot_index is a str"),
        ({"width": True}, "width is a bool"),
        ({"seed": 10**40}, "seed is out of range"),
        ({"prompt": None}, "prompt is a NoneType"),
        ({"tail": [["tail_0.png"]]}, "wrong type"),
        ({"story_id": "../../etc"}, "outside its folder"),
        ({"shot_id": "/tmp/x"}, "outside its folder"),
        ({"tail": ["tail_7.png"]}, r"without size: tail_7\.png"),
        ({"clip": "../../other.mp4", "files": {"../../other.mp4": {"num_bytes": 1, "sha256": ""}}}, "names files"),
        ({"host": {"attempt_id": "../elsewhere"}}, "outside its folder"),
    ],
)
def test_a_record_with_a_wrong_part_is_damaged_and_the_message_names_it(
    changes: dict[str, object], message: str
) -> None:
    value = json.loads(make_record().to_json())
    with pytest.raises(DamagedRecord, match=message):
        ShotRecord.from_json(value | changes)
    with pytest.raises(DamagedRecord, match="not an object"):
        ShotRecord.from_json([value])


def test_a_changed_bit_anywhere_in_a_record_is_found() -> None:
    record, random = make_record(clip_sample="0" * 64), Random(0)
    data = record.to_json()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << random.randrange(8)
        try:
            read = ShotRecord.from_json(parse_json(bytes(changed)))
        except (ValueError, DamagedRecord):
            continue
        assert read == record, f"byte {position}: {bytes(changed[position - 10 : position + 10])!r}"


def test_a_record_of_an_earlier_version_has_no_checksum_and_is_read() -> None:
    value = json.loads(FIXTURE.read_text())
    record = ShotRecord.from_json(value)
    assert record.clip_sample is None
    assert set(json.loads(record.to_json())) - set(value) == {"clip_sample"}, "earlier versions ignore it"
    with pytest.raises(DamagedRecord, match="lacks its checksum and has clip_sample"):
        ShotRecord.from_json(value | {"clip_sample": None})


def test_a_changed_clip_is_found_by_its_sample_without_reading_it_whole(tmp_path: Path) -> None:
    data = Random(0).randbytes(3 * 2**20)
    record = make_record(
        clip="clip.mp4",
        keyframes=(),
        tail=(),
        files={"clip.mp4": StoredFile(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())},
    )
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(data)
    record = dataclasses.replace(record, clip_sample=quick_digest(clip))
    record.check_files(tmp_path, contents=False)
    for position, found in ((1000, True), (len(data) - 1000, True), (3 * 2**19 + 2**18, False)):
        clip.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(DamagedRecord, match=r"contents of clip\.mp4 have changed") if found else nullcontext():
            record.check_files(tmp_path, contents=False)
        with pytest.raises(DamagedRecord, match=r"contents of clip\.mp4 have changed"):
            record.check_files(tmp_path, contents=True)


def test_files_are_checked_by_size_and_on_demand_by_content(tmp_path: Path) -> None:
    record = make_record()
    for name in record.files:
        (tmp_path / name).write_bytes(b"abc")
    record.check_files(tmp_path, contents=True)
    (tmp_path / "clip.mp4").write_bytes(b"abd")
    record.check_files(tmp_path, contents=False)
    with pytest.raises(DamagedRecord, match=r"contents of clip\.mp4 have changed"):
        record.check_files(tmp_path, contents=True)
    (tmp_path / "clip.mp4").write_bytes(b"ab")
    with pytest.raises(DamagedRecord, match=r"clip\.mp4 has 2 bytes instead of 3"):
        record.check_files(tmp_path, contents=False)
    (tmp_path / "clip.mp4").unlink()
    with pytest.raises(DamagedRecord, match=r"clip\.mp4 is missing"):
        record.check_files(tmp_path, contents=False)


def test_a_file_is_described_by_size_and_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert describe_file(tmp_path / "a") == make_record().files["clip.mp4"]


def test_what_a_storyboard_sets_for_a_shot_is_kept_and_nothing_is_written_where_it_sets_nothing() -> None:
    plain = make_record()
    assert "own" not in json.loads(plain.to_json()), "records of stories in StoryMem's form stay as they were"
    own = dataclasses.replace(plain, own={"duration": 1.5, "given": {"notes": ["its sound is not used"]}})
    assert ShotRecord.from_json(json.loads(own.to_json())) == own
    changed = json.loads(own.to_json()) | {"own": {"duration": 2.0}}
    with pytest.raises(DamagedRecord, match="checksum"):
        ShotRecord.from_json(changed)
    with pytest.raises(DamagedRecord, match="own is a list"):
        ShotRecord.from_json(json.loads(plain.to_json()) | {"own": []})
