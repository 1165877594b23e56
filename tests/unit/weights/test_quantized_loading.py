"""Weights are quantized while they stream in: after merging, once, and the same however the rows are cut."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from storymem_dist.models.quantized_linear import QuantizedLinear, quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import TINY
from storymem_dist.weights import loading
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.loading import LocalPart, TensorSource, load_dit_weights, whole_parameter
from storymem_dist.weights.lora import ScaledLora, storymem_lora
from storymem_dist.weights.prepare import prepare_checkpoint
from storymem_dist.weights.tiny_checkpoint import ModelFolders

FORMATS = pytest.mark.parametrize("linears", ["float8", "int8"])


@pytest.fixture
def source(tiny: ModelFolders) -> TensorSource:
    return open_checkpoint(tiny.i2v_dir, "i2v").expert("high_noise")


@pytest.fixture
def lora(tiny: ModelFolders) -> ScaledLora:
    return storymem_lora(tiny.lora_dir, "mi2v")["high_noise"]


def loaded(
    source: TensorSource, loras: Sequence[ScaledLora], linears: str, dtype: torch.dtype = torch.bfloat16
) -> WanDiT:
    dit = WanDiT(TINY.i2v, dtype=dtype).requires_grad_(False)
    quantize_linears(dit.blocks, linears)
    load_dit_weights(dit, source, loras)
    return dit


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


@FORMATS
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_are_cut_from_the_same_bits(
    source: TensorSource, lora: ScaledLora, linears: str, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loaded(source, [lora], linears)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1)
    parts: dict[str, list[Tensor]] = {name: [] for name, _ in whole.named_parameters()}
    for index in range(num_parts):

        def local_part(name: str, parameter: nn.Parameter, index: int = index) -> LocalPart:
            """As FSDP2 cuts."""
            length = -(-parameter.shape[0] // num_parts)
            start = min(index * length, parameter.shape[0])
            stop = min(start + length, parameter.shape[0])
            tensor = torch.empty_like(parameter[start:stop])
            parts[name].append(tensor)
            return LocalPart(tensor=tensor, row_offset=start, num_rows=stop - start)

        empty = WanDiT(TINY.i2v).requires_grad_(False)
        quantize_linears(empty.blocks, linears)
        load_dit_weights(empty, source, [lora], local_part=local_part)
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([as_bytes(part) for part in parts[name]]), as_bytes(parameter)), name


@FORMATS
def test_a_lora_is_merged_before_quantizing(source: TensorSource, lora: ScaledLora, linears: str) -> None:
    """Equal to quantizing the merged fp32 weight by hand, and unlike the unmerged one."""
    merged = dict(loaded(source, [lora], "exact", torch.float32).named_parameters())
    found, without = loaded(source, [lora], linears), loaded(source, [], linears)
    layers = {name: layer for name, layer in found.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 10 * TINY.i2v.num_layers
    for name, layer in layers.items():
        values, scales = layer.quantize(merged[f"{name}.weight"])
        assert torch.equal(as_bytes(layer.weight), as_bytes(values)), name
        assert torch.equal(layer.row_scale, scales), name
        assert torch.equal(layer.bias, merged[f"{name}.bias"].bfloat16()), name
    name = "blocks.0.ffn.0.weight"
    assert not torch.equal(as_bytes(found.get_parameter(name)), as_bytes(without.get_parameter(name)))


@FORMATS
def test_what_is_not_quantized_keeps_its_bits(source: TensorSource, lora: ScaledLora, linears: str) -> None:
    exact = dict(loaded(source, [lora], "exact").named_parameters())
    for name, parameter in loaded(source, [lora], linears).named_parameters():
        if not name.endswith("row_scale") and parameter.dtype == exact[name].dtype:
            assert torch.equal(parameter, exact[name]), name


def test_weights_prepared_as_float8_are_those_quantized_while_loading(tiny: ModelFolders, tmp_path: Path) -> None:
    """The stored numbers themselves: they are not rounded a second time."""
    loras = {name: [lora] for name, lora in storymem_lora(tiny.lora_dir, "mi2v").items()}
    checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
    folder = tmp_path / "prepared"
    prepare_checkpoint(checkpoint, loras, folder, dtype="float8", storymem_folder="Wan2.2-MI2V-A14B")
    for expert in ("high_noise", "low_noise"):
        stored = loaded(open_checkpoint(folder, "i2v").expert(expert), [], "float8")
        direct = loaded(checkpoint.expert(expert), loras[expert], "float8")
        for (name, one), other in zip(stored.named_modules(), direct.modules(), strict=True):
            if isinstance(one, QuantizedLinear):
                kept = [layer.weight.float() * layer.row_scale[:, None] for layer in (one, other)]
                assert torch.equal(*kept), name


def test_scales_that_are_cut_unlike_their_weight_are_a_fault(source: TensorSource) -> None:
    dit = WanDiT(TINY.i2v).requires_grad_(False)
    quantize_linears(dit.blocks, "int8")

    def local_part(name: str, parameter: nn.Parameter) -> LocalPart:
        part = whole_parameter(name, parameter)
        return LocalPart(tensor=part.tensor[1:], row_offset=1, num_rows=part.num_rows - 1) if "scale" in name else part

    with pytest.raises(AssertionError, match=r"blocks.0.self_attn.q.weight and its scales are cut differently"):
        load_dit_weights(dit, source, local_part=local_part)
