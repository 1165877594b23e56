from pathlib import Path

import pytest

from storymem_dist.artifacts.fingerprint import differences, fingerprint, hash_of, reference_image_digest
from storymem_dist.errors import StoryboardError
from storymem_dist.files import file_digest


def test_a_fingerprint_depends_on_every_input_and_on_the_predecessor_but_not_on_the_order_of_keys() -> None:
    base = fingerprint({"prompt": "a", "seed": 1}, None)
    assert base == fingerprint({"seed": 1, "prompt": "a"}, None)
    assert len(base) == 64
    others = {
        fingerprint({"prompt": "b", "seed": 1}, None),
        fingerprint({"prompt": "a", "seed": 2}, None),
        fingerprint({"prompt": "a", "seed": 1, "x": None}, None),
        fingerprint({"prompt": "a", "seed": 1}, base),
    }
    assert len(others | {base}) == 5


def test_a_fingerprint_is_the_same_in_every_release_until_its_format_changes() -> None:
    """Run folders of earlier versions must resume: this value changes only with FINGERPRINT_FORMAT."""
    value = fingerprint({"prompt": "naïve “quotes”", "seed": 7, "sizes": {"height": 480, "ratio": 0.875}}, "ab")
    assert value == "6bf60dbb3daaba65de2f1dd2022c585af4e65581022bd46b204d838ad4c6ef31"


def test_differences_are_described_in_words() -> None:
    before = {"prompt": "a cat", "seed": 3, "sampler": {"steps": 40, "shift": 4.0}, "gone": 1}
    after = {"prompt": "a dog", "seed": 3, "sampler": {"steps": 20, "shift": 4.0}, "new": [1]}
    assert differences(before, after) == [
        "gone was 1 and is gone",
        "new=[1] is new",
        "prompt changed from 'a cat' to 'a dog'",
        "sampler.steps changed from 40 to 20",
    ]
    assert differences(before, before) == []


def test_long_values_are_cut_and_shown_only_where_they_differ() -> None:
    phrases = differences({"prompt": "x" * 500}, {"prompt": "x" * 500 + "y"})
    assert phrases == ["prompt changed"]


def test_hashes_of_files_and_values(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_of({"a": 1}) != hash_of({"a": 2})
    with pytest.raises(StoryboardError, match=r"reference image .*absent\.png cannot be read: No such file"):
        reference_image_digest(tmp_path / "absent.png")
