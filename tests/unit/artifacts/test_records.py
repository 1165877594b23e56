import dataclasses
import json
from pathlib import Path

import pytest

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord, describe_file
from tests.helpers.records import make_record


def test_a_record_survives_json_and_its_text_is_canonical() -> None:
    record = make_record()
    assert ShotRecord.from_json(json.loads(record.to_json())) == record
    assert ShotRecord.from_json(json.loads(record.to_json())).to_json() == record.to_json()
    assert "“wave”" in record.to_json().decode()


def test_equal_shots_differ_in_timing_and_host_only() -> None:
    one = json.loads(make_record(timing={"committed_at": 1.0}, host={"attempt_id": "x"}).to_json())
    two = json.loads(make_record(timing={"committed_at": 2.0}, host={"attempt_id": "y"}).to_json())
    assert {key for key in one if one[key] != two[key]} == {"timing", "host"}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ShotRecord)])
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
