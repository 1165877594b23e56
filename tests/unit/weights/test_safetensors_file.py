"""Reading and writing single safetensors files; safetensors' own library is the other side."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storymem_dist.errors import CheckpointError
from storymem_dist.weights.safetensors_file import DATA_ALIGNMENT, SafetensorsFile, write_safetensors
from tests.helpers.checkpoints import truncate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_file({"big": torch.arange(60.0).reshape(5, 4, 3), "small": torch.tensor([1.5, 2.5]).bfloat16()}, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_the_library_wrote_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (6, 5)).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    read = SafetensorsFile(tmp_path / "x.safetensors").read("x")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_rows_are_read_alone_and_only_their_bytes_are_counted(path: Path) -> None:
    file = SafetensorsFile(path)
    rows = file.read("big", slice(1, 3))
    assert torch.equal(rows, torch.arange(60.0).reshape(5, 4, 3)[1:3])
    assert file.bytes_read == 2 * 4 * 3 * 4
    assert file.read("big", slice(5, 5)).shape == (0, 4, 3)


def test_changing_what_was_read_does_not_change_what_is_read_next(path: Path) -> None:
    file = SafetensorsFile(path)
    file.read("big").zero_()
    assert torch.equal(file.read("big"), torch.arange(60.0).reshape(5, 4, 3))


def test_keys_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    entries = {key: (torch.float32, torch.Size((1,))) for key in ("z", "a", "m")}
    with write_safetensors(tmp_path / "x.safetensors", entries) as writer:
        for number, key in enumerate(entries):
            writer.write(key, torch.tensor([float(number)]))
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert list(file) == ["z", "a", "m"]
    assert [file.read(key).item() for key in file] == [0, 1, 2]


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is not a model, it is a letter to my aunt")


def _no_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 8) + b"{broken}")


def _wrong_size(path: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def _unknown_dtype(path: Path) -> None:
    header = b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1))


def _too_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"tail")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: truncate(path, 1), "truncated: its header describes"),
        (lambda path: truncate(path, path.stat().st_size - 20), "truncated: its header alone needs"),
        (lambda path: path.write_bytes(b"1234"), "truncated: it holds 4 bytes"),
        (_garbage, "not a safetensors file"),
        (_no_json, "its header is not a JSON object"),
        (_wrong_size, "'x' of shape [3] and type F32 needs 12 bytes; the header gives it 8"),
        (_unknown_dtype, "the header's entry for 'x' cannot be used"),
        (_too_long, "longer than its header says"),
    ],
)
def test_a_damaged_file_is_refused_by_name(path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_what_is_written_in_pieces_is_read_whole_by_the_library(tmp_path: Path) -> None:
    tensor = torch.randn(7, 3)
    path = tmp_path / "x.safetensors"
    entries = {"x": (torch.bfloat16, tensor.shape), "empty": (torch.float32, torch.Size((0, 2)))}
    with write_safetensors(path, entries, {"made by": "a test"}) as writer:
        for rows in tensor.bfloat16().split(2):
            writer.write("x", rows)
        assert not path.exists()
    assert torch.equal(load_file(path)["x"], tensor.bfloat16())
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + header_bytes) % DATA_ALIGNMENT == 0
    assert SafetensorsFile(path).metadata == {"made by": "a test"}


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        write_safetensors(tmp_path / "x.safetensors", {"x": (torch.float32, torch.Size((2,)))}),
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
