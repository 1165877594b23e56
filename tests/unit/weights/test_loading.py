"""The streaming loader: every row once, cast once, the same bits however a weight is cut."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError
from storymem_dist.weights import loading
from storymem_dist.weights.loading import (
    LocalPart,
    SafetensorsSource,
    StateDictSource,
    load_dit_weights,
)
from storymem_dist.weights.lora import ScaledLora, open_lora
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.torch_file import read_state_dict

ROWS, WIDTH = 700, 64


class TwoDtypes(nn.Module):
    """Like a block: a matmul weight in one dtype, a norm in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(WIDTH, ROWS, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(WIDTH)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(parameter.shape) for name, parameter in TwoDtypes().named_parameters()}


@pytest.fixture
def source(weights: Mapping[str, Tensor], tmp_path: Path) -> SafetensorsSource:
    names = sorted(weights)
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: weights[name] for name in part}, tmp_path / f"{number}.safetensors")
    return SafetensorsSource("shards", [SafetensorsFile(path) for path in sorted(tmp_path.glob("*.safetensors"))])


@pytest.fixture
def lora(tmp_path: Path) -> ScaledLora:
    torch.manual_seed(1)
    names = ("patch_embedding.lora_A.weight", "patch_embedding.lora_B.weight")
    halves = {names[0]: torch.randn(8, WIDTH), names[1]: torch.randn(ROWS, 8)}
    path = tmp_path / "lora" / "lora.safetensors"
    path.parent.mkdir()
    save_file(halves, path)
    return ScaledLora(open_lora(path), scale_rule="rslora")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts a small weight into many chunks."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1)


def test_each_parameter_gets_the_stored_values_in_its_own_dtype(
    source: SafetensorsSource, weights: Mapping[str, Tensor], small_chunks: None
) -> None:
    model = TwoDtypes()
    report = load_dit_weights(model, source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].to(parameter.dtype)), name
    assert model.patch_embedding.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    assert report.num_tensors == 4
    assert report.bytes_read == sum(weight.nbytes for weight in weights.values())


def test_progress_counts_every_byte_up_to_the_total(
    source: SafetensorsSource, weights: Mapping[str, Tensor], small_chunks: None
) -> None:
    seen: list[tuple[int, int]] = []
    load_dit_weights(TwoDtypes(), source, progress=lambda done, total: seen.append((done, total)))
    total = sum(weight.nbytes for weight in weights.values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)
    assert len(seen) == 3 + 3 + 1 + 1  # 700 rows are three chunks of at most 256


@pytest.mark.parametrize("cuts", [(0, 700), (0, 350, 700), (0, 100, 100, 511, 513, 700)])
def test_a_merged_weight_has_the_same_bits_however_its_rows_are_cut(
    source: SafetensorsSource, lora: ScaledLora, cuts: tuple[int, ...], small_chunks: None
) -> None:
    whole = TwoDtypes()
    load_dit_weights(whole, source, [lora])
    parts = []
    for start, stop in pairwise(cuts):
        local = torch.empty(stop - start, WIDTH, dtype=torch.bfloat16)

        def local_part(name: str, parameter: nn.Parameter, start: int = start, local: Tensor = local) -> LocalPart:
            if name == "patch_embedding.weight":
                return LocalPart(tensor=local, row_offset=start, num_rows=len(local))
            return LocalPart(tensor=parameter.data[:0], row_offset=0, num_rows=0)

        bytes_before = source.bytes_read
        load_dit_weights(TwoDtypes(), source, [lora], local_part=local_part)
        assert source.bytes_read - bytes_before == (stop - start) * WIDTH * 4
        parts.append(local)
    assert torch.equal(torch.cat(parts).view(torch.int16), whole.patch_embedding.weight.view(torch.int16))


def test_a_merge_is_done_in_fp32_and_rounded_once(
    source: SafetensorsSource, weights: Mapping[str, Tensor], lora: ScaledLora
) -> None:
    model = TwoDtypes()
    load_dit_weights(model, source, [lora])
    down, up = (lora.file.source.read(f"patch_embedding.lora_{half}.weight") for half in "AB")
    expected = weights["patch_embedding.weight"].double() + 8 / 8**0.5 * (up.double() @ down.double())
    error = (model.patch_embedding.weight.double() - expected).abs() / expected.abs().clamp_min(1e-2)
    assert error.max() < 2**-8  # half a unit in the last place of bfloat16; two roundings would exceed it
    wrong_scale = weights["patch_embedding.weight"] + up @ down
    assert not torch.allclose(model.patch_embedding.weight.float(), wrong_scale, atol=0.1)


def test_merging_ignores_a_lowered_matmul_precision(source: SafetensorsSource) -> None:
    seen: list[str] = []

    class Watching:
        name = "watching"

        def shapes(self) -> dict[str, torch.Size]:
            return {"patch_embedding.weight": torch.Size((ROWS, WIDTH))}

        def add_to(self, rows: Tensor, key: str, first_row: int) -> None:
            seen.append(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision("medium")
    try:
        load_dit_weights(TwoDtypes(), source, [Watching()])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_several_loras_add_up_in_order(
    source: SafetensorsSource, weights: Mapping[str, Tensor], lora: ScaledLora
) -> None:
    model = TwoDtypes().float()
    half = ScaledLora(lora.file, scale_rule="none", strength=-0.5)
    load_dit_weights(model, source, [lora, half])
    down, up = (lora.file.source.read(f"patch_embedding.lora_{half_name}.weight") for half_name in "AB")
    expected = weights["patch_embedding.weight"] + (8**0.5 - 0.5) * (up @ down)
    torch.testing.assert_close(model.patch_embedding.weight, expected, atol=1e-4, rtol=1e-5)


def test_an_error_in_a_reading_thread_reaches_the_caller(source: SafetensorsSource, tmp_path: Path) -> None:
    with (tmp_path / "1.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match="became shorter while it was being read"):
        load_dit_weights(TwoDtypes(), source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.bias"), "here: weights are missing: norm.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "here: weights have no place in the model: extra"),
        (
            lambda w: w.update({"norm.bias": torch.zeros(3)}),
            "here: norm.bias has shape [3]; the configuration asks for [64]",
        ),
    ],
)
def test_a_source_that_does_not_fit_the_model_is_refused(weights, change, message) -> None:
    change(weights)
    with pytest.raises(CheckpointError) as caught:
        load_dit_weights(TwoDtypes(), StateDictSource("here", weights))
    assert str(caught.value) == message


def test_a_model_with_buffers_is_refused(weights: dict[str, Tensor]) -> None:
    model = TwoDtypes()
    model.register_buffer("table", torch.zeros(2))
    with pytest.raises(ValueError, match="has buffers, which would stay unset: table"):
        load_dit_weights(model, StateDictSource("here", weights))


def test_a_pth_file_can_be_wrapped_in_a_state_dict_key(tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.ones(2)}}, tmp_path / "a.pth")
    assert torch.equal(read_state_dict(tmp_path / "a.pth")["x"], torch.ones(2))


def test_an_old_pickle_style_pth_file_is_read(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(tmp_path / "a.pth")["x"], torch.ones(2))


class _RunsCode:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"x": _RunsCode()}, "cannot be read as a state dict"),
        ([torch.ones(1)], "not a state dict (a list without named tensors)"),
        ({"epoch": 3}, "not a state dict (a dict without named tensors)"),
        ({}, "not a state dict"),
    ],
)
def test_a_pth_file_that_is_not_a_state_dict_is_refused(tmp_path: Path, capsys, stored, message: str) -> None:
    torch.save(stored, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(tmp_path / "a.pth")
    assert message in str(caught.value)
    assert str(tmp_path / "a.pth") in str(caught.value)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"hello"])
def test_a_damaged_pth_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a state dict"):
        read_state_dict(tmp_path / "a.pth")
