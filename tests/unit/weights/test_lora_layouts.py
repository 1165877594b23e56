"""Every row of the table of LoRA layouts, experts in keys, exact changes, and what is refused. Oracle: diffusers."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.errors import CheckpointError
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, LOW_NOISE
from storymem_dist.weights.loading import StateDictSource, load_dit_weights
from storymem_dist.weights.lora import LoraSettings, ScaledLora, layouts, open_lora, open_loras
from storymem_dist.weights.lora.layouts import HIGH_WITH_LOW, PREFIXES, UNSUPPORTED, WRAPPERS, read_key
from tests.helpers.lora_layouts import LINEARS, PATCHED, SHAPES, product, spell_module
from tests.helpers.tiny_dit import make_dit

RANK = 4
TARGETS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.0", "blocks.1.ffn.2")


def halves(targets: tuple[str, ...] = TARGETS, seed: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tuple(
            torch.randn(size, generator=generator) * 0.2
            for size in ((RANK, *SHAPES[f"{name}.weight"][1:]), (SHAPES[f"{name}.weight"][0], RANK))
        )
        for name in targets
    }


def lora_tensors(spell, down: str = "lora_A.weight", up: str = "lora_B.weight", sign: float = 1) -> dict[str, Tensor]:
    tensors = {}
    for name, (down_half, up_half) in halves().items():
        tensors[f"{spell(name)}.{down}"], tensors[f"{spell(name)}.{up}"] = down_half.clone(), sign * up_half
    return tensors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return str(path)


def added(path: str, into: str = HIGH_NOISE, /, **settings) -> dict[str, Tensor]:
    """What rendering adds to each weight of an expert."""
    found: dict[str, Tensor] = {}
    for lora in open_loras([LoraSettings(path=path, **settings)], into, SHAPES):
        for key in lora.shapes():
            found.setdefault(key, torch.zeros(SHAPES[key]))
            lora.add_to(found[key], key, 0)
    return found


def assert_is_the_lora(found: dict[str, Tensor], scale: float = 1.0) -> None:
    assert found.keys() == {f"{name}.weight" for name in TARGETS}
    for name, (down, up) in halves().items():
        expected = (scale * product(down, up)).float()
        torch.testing.assert_close(found[f"{name}.weight"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix.text)
def test_each_prefix_is_understood_and_names_its_expert(tmp_path: Path, prefix) -> None:
    is_kohya = prefix.text.startswith("lora_") or prefix.text == "lycoris_"
    between = "_" if is_kohya else "$$" if "$" in prefix.text else "."
    path = write(tmp_path / "x.safetensors", lora_tensors(lambda name: prefix.text + name.replace(".", between)))
    experts = {None: EXPERTS, HIGH_WITH_LOW: EXPERTS}.get(prefix.expert, (prefix.expert,))
    for expert in EXPERTS:
        if expert in experts:
            assert_is_the_lora(added(path, expert))
        else:
            assert added(path, expert) == {}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_each_wrapper_inside_a_name_is_understood(tmp_path: Path, wrapper: str) -> None:
    spell = lambda name: re.sub(r"(blocks\.\d+)\.", rf"\1.{wrapper}.", name)  # noqa: E731
    assert_is_the_lora(added(write(tmp_path / "x.safetensors", lora_tensors(spell))))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A", "lora_B"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
def test_each_name_of_the_halves_is_understood(tmp_path: Path, down: str, up: str) -> None:
    assert_is_the_lora(added(write(tmp_path / "x.safetensors", lora_tensors(str, down, up))))


def mixed(name: str) -> str:
    _, block, rest = name.split(".", 2)
    return f"lora_unet_blocks_{block}.{rest}"


@pytest.mark.parametrize(
    "spell",
    [
        mixed,
        lambda name: f"diffusion_model.{spell_module(name, 'diffusers')}",
        lambda name: f"lora_unet_{spell_module(name, 'diffusers flat')}",
        lambda name: f"module._orig_mod.base_model.model.transformer.{name}",
        lambda name: f"lora_unet__{name.replace('.', '__')}",
    ],
)
def test_dots_underscores_prefixes_and_both_vocabularies_may_be_mixed(tmp_path: Path, spell) -> None:
    assert_is_the_lora(added(write(tmp_path / "x.safetensors", lora_tensors(spell))))


@pytest.mark.parametrize("native", [*LINEARS, "patch_embedding"])
@pytest.mark.parametrize("style", ["native", "diffusers", "native flat", "diffusers flat"])
def test_every_layer_of_the_transformer_can_be_a_target(native: str, style: str) -> None:
    prefix = "lora_unet_" if style.endswith("flat") else "diffusion_model."
    key = read_key(f"{prefix}{spell_module(native, style)}.lora_down.weight")
    assert key is not None and (key.module, key.role) == (native, layouts.DOWN)


@pytest.mark.parametrize(
    "other",
    [
        "transformer.transformer_blocks.0.attn1.to_q",  # LTX-Video
        "lora_unet_transformer_blocks_0_attn1_to_q",
        "transformer.single_transformer_blocks.0.attn.to_q",  # FLUX
        "diffusion_model.double_blocks.0.img_attn.qkv",  # HunyuanVideo
        "diffusion_model.vace_blocks.0.self_attn.q",  # Wan VACE
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q",
    ],
)
def test_a_lora_of_another_model_is_named_as_such(tmp_path: Path, other: str) -> None:
    tensors = {f"{other}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
    with pytest.raises(CheckpointError, match="a LoRA for another model: none of its 2 keys has a place") as caught:
        open_lora(write(tmp_path / "x.safetensors", tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("lokr_w1", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("oft_blocks", "OFT"),
        ("ia3_l", "IA3"),
        ("vera_lambda_b", "VeRA"),
        ("lora_mid.weight", "LoCon"),
        ("a1.weight", "GLoRA"),
        ("set_weight", "replaces weights"),
        ("scale_weight", "8-bit file"),
        ("lora_embedding_A", "embedding table"),
    ],
)
@pytest.mark.parametrize("unmatched", ["refuse", "skip"])
def test_other_adapters_are_named_and_never_half_applied(
    tmp_path: Path, ending: str, name: str, unmatched: str
) -> None:
    path = write(tmp_path / "x.safetensors", {**lora_tensors(str), f"blocks.0.self_attn.q.{ending}": torch.ones(2)})
    with pytest.raises(CheckpointError) as caught:
        open_lora(path, unmatched=unmatched)
    assert name in str(caught.value) and "not supported" in str(caught.value)


def test_stand_ins_halves_are_not_taken_for_deltas(tmp_path: Path) -> None:
    tensors = {f"blocks.0.self_attn.q_loras.{half}.weight": torch.ones(4, 4) for half in ("down", "up")}
    with pytest.raises(CheckpointError, match="Stand-In"):
        open_lora(write(tmp_path / "x.safetensors", tensors))


def test_every_row_of_the_table_has_a_source() -> None:
    assert all(prefix.source for prefix in PREFIXES) and all(source for _, _, source in layouts.ROLES)
    assert all(WRAPPERS.values()) and all(what for _, what in UNSUPPORTED)


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("transformer.", "transformer_2."),
        ("transformer_1.", "transformer_2."),
        ("high_noise_model.", "low_noise_model."),
        ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
        ("base_model.model.high_noise.", "base_model.model.low_noise."),
    ],
)
def test_a_file_for_both_experts_is_split_by_its_keys(tmp_path: Path, high: str, low: str) -> None:
    tensors = lora_tensors(lambda name: high + name) | lora_tensors(lambda name: low + name, sign=-2)
    path = write(tmp_path / "x.safetensors", tensors)
    assert_is_the_lora(added(path, HIGH_NOISE), 1)
    assert_is_the_lora(added(path, LOW_NOISE), -2)
    assert_is_the_lora(added(path, LOW_NOISE, expert=LOW_NOISE), -2)
    assert added(path, HIGH_NOISE, expert=LOW_NOISE) == {}


def test_a_file_that_names_one_expert_changes_that_one_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", lora_tensors(lambda name: f"transformer_2.{name}"))
    assert added(path, HIGH_NOISE) == {}
    assert_is_the_lora(added(path, LOW_NOISE))
    with pytest.raises(
        CheckpointError, match="its keys name the low_noise expert, its settings say expert: high_noise"
    ):
        added(path, HIGH_NOISE, expert=HIGH_NOISE)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("transformer.", "transformer_1.", "names the high-noise expert, and so may"),
        ("diffusion_model.", "transformer_2.", "names the low_noise expert"),
        ("transformer_1.transformer_2.", "", "names both experts"),
    ],
)
def test_keys_that_contradict_each_other_about_experts_are_refused(
    tmp_path: Path, first: str, second: str, message: str
) -> None:
    tensors = lora_tensors(lambda name: first + name) | lora_tensors(lambda name: second + name)
    with pytest.raises(CheckpointError, match=message):
        added(write(tmp_path / "x.safetensors", tensors))


# -- exact changes, biases, convolutions, what does not fit ------------------------------------------------------------


def test_exact_changes_are_added_once_in_fp32_and_follow_the_strength(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    changes = {parameter: torch.randn(SHAPES[parameter], generator=generator) for parameter in PATCHED}
    tensors = {f"diffusion_model.{PATCHED[parameter]}": value for parameter, value in changes.items()}
    for name in TARGETS:
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(8.0)
    tensors |= lora_tensors(lambda name: f"diffusion_model.{name}")
    found = added(write(tmp_path / "x.safetensors", tensors), strength=0.5)
    for parameter, change in changes.items():
        assert torch.equal(found[parameter], 0.5 * change), parameter
    down, up = halves()["blocks.0.self_attn.q"]
    expected = (0.5 * 8 / RANK * product(down, up)).float()
    torch.testing.assert_close(found["blocks.0.self_attn.q.weight"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("linears", ["exact", "float8", "int8"])
def test_exact_changes_are_merged_while_weights_are_read(tmp_path: Path, linears: str) -> None:
    """A weight and a modulation, through the loader, into plain and into 8-bit layers."""
    dit = make_dit()
    base = {name: value.detach().clone() for name, value in dit.named_parameters()}
    change = {"blocks.0.self_attn.q.weight": torch.randn(64, 64) * 0.1, "blocks.1.modulation": torch.randn(1, 6, 64)}
    tensors = {
        "blocks.0.self_attn.q.diff": change["blocks.0.self_attn.q.weight"],
        "blocks.1.diff_m": change["blocks.1.modulation"],
    }
    lora = ScaledLora(open_lora(write(tmp_path / "x.safetensors", tensors)))
    quantize_linears(dit.blocks, linears)
    load_dit_weights(dit, StateDictSource("base", base), [lora])
    plain = make_dit()
    quantize_linears(plain.blocks, linears)
    load_dit_weights(plain, StateDictSource("sum", base | {key: base[key] + value for key, value in change.items()}))
    for (name, expected), found in zip(plain.state_dict().items(), dit.state_dict().values(), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name


def test_the_lora_of_a_convolution_is_the_product_of_its_flattened_halves(tmp_path: Path) -> None:
    shape = SHAPES["patch_embedding.weight"]
    down, up = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, 1, 1, 1)
    tensors = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    found = added(write(tmp_path / "x.safetensors", tensors))["patch_embedding.weight"]
    torch.testing.assert_close(found, product(down, up).float(), atol=1e-5, rtol=1e-5)


I2V_KEYS = ("cross_attn.k_img.lora_A.weight", "cross_attn.v_img.lora_B.weight", "cross_attn.norm_k_img.diff")


def test_what_wan21_i2v_has_more_is_refused_with_the_way_out_or_left_out_and_listed(tmp_path: Path) -> None:
    extras = {f"diffusion_model.blocks.0.{key}": torch.ones(4, 4) for key in I2V_KEYS}
    path = write(tmp_path / "x.safetensors", {**lora_tensors(lambda name: f"diffusion_model.{name}"), **extras})
    with pytest.raises(CheckpointError, match=r"Wan2.1-I2V's attention to an image.*unmatched: skip"):
        added(path)
    assert_is_the_lora(added(path, unmatched="skip"))
    (lora,) = open_loras([LoraSettings(path=path, unmatched="skip")], HIGH_NOISE, SHAPES)
    assert sorted(lora.describe()["skipped_keys"]) == sorted(extras)
    assert "skipped 3 keys" in lora.summary()


def test_whole_weights_are_no_changes_of_weights(tmp_path: Path) -> None:
    tensors = {**lora_tensors(str), "blocks.0.norm3.weight": torch.ones(64)}
    path = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match="whole weights"):
        added(path)
    assert_is_the_lora(added(path, unmatched="skip"))


def test_a_block_that_the_model_has_not_is_refused_or_left_out(tmp_path: Path) -> None:
    beyond = {f"blocks.39.ffn.0.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    path = write(tmp_path / "x.safetensors", lora_tensors(str) | beyond)
    with pytest.raises(
        CheckpointError, match=r"the model has no such weights: blocks.39.ffn.0.weight; to leave them out"
    ):
        added(path)
    assert_is_the_lora(added(path, unmatched="skip"))
    with pytest.raises(CheckpointError, match="the model has no such weights"):
        added(write(tmp_path / "only.safetensors", beyond), unmatched="skip")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["blocks.0.ffn.0.lora_A.weight", "blocks.0.ffn.0.lora_B.weight", "blocks.0.norm3.diff"])
def test_nan_and_inf_are_refused_while_merging(tmp_path: Path, key: str, bad: float) -> None:
    tensors = lora_tensors(str) | {"blocks.0.norm3.diff": torch.ones(64)}
    tensors[key].view(-1)[-1] = bad
    path = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        added(path)
    assert str(caught.value).startswith(f"{path}: {key} holds NaN or Inf")


def test_a_product_that_overflows_is_refused(tmp_path: Path) -> None:
    down, up = halves()["blocks.0.ffn.0"]
    tensors = {"blocks.0.ffn.0.lora_A.weight": down * 1e30, "blocks.0.ffn.0.lora_B.weight": up * 1e30}
    with pytest.raises(CheckpointError, match="the product of"):
        added(write(tmp_path / "x.safetensors", tensors))


# -- diffusers as the oracle -------------------------------------------------------------------------------------------


def all_linears_of_blocks(spell) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in halves(tuple(name for name in LINEARS if name.startswith("blocks."))).items():
        tensors[f"{spell(name)}.lora_down.weight"], tensors[f"{spell(name)}.lora_up.weight"] = down, up
        tensors[f"{spell(name)}.alpha"] = torch.tensor(6.0)
    return tensors


@pytest.mark.parametrize(
    ("convert", "spell"),
    [
        (_convert_non_diffusers_wan_lora_to_diffusers, lambda name: f"diffusion_model.{name}"),
        (_convert_musubi_wan_lora_to_diffusers, lambda name: f"lora_unet_{name.replace('.', '_')}"),
    ],
)
def test_a_merge_equals_that_of_what_diffusers_converts(tmp_path: Path, convert, spell) -> None:
    tensors = all_linears_of_blocks(spell)
    if "diffusion_model" in next(iter(tensors)):
        tensors |= {f"{spell(name)}.diff_b": torch.randn(64) for name in TARGETS if SHAPES[f"{name}.bias"] == (64,)}
    ours = added(write(tmp_path / "ours.safetensors", tensors))
    converted = convert({key: value.clone() for key, value in tensors.items()})
    theirs = added(write(tmp_path / "theirs.safetensors", converted))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-5, msg=key)
