"""LoRAs of one shot: the same files and scales as merged ones, as adapters; what they are in a fingerprint; folders."""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.errors import CheckpointError, ConfigError, StoryMemError, WeightsNotFound
from storymem_dist.models.adapters import Adapter
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS, TINY
from storymem_dist.weights.lora import (
    LoraSettings,
    adapter_bytes,
    lora_inputs,
    lora_key,
    lora_list,
    open_loras,
    read_adapters,
)
from tests.helpers.lora_layouts import SHAPES, LoraCase, lora_cases

ANYTIME = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
RANK = 16
LAYER = "blocks.0.ffn.0"


def meta_dit(dtype: torch.dtype = torch.float32) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(TINY.t2v, dtype=dtype)


def as_changes(adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """What adapters change, by parameter."""
    found: dict[str, Tensor] = {}
    for name, one in adapters.items():
        if one.down is not None and one.up is not None:
            found[f"{name}.weight"] = (one.up @ one.down).view(SHAPES[f"{name}.weight"])
        for kind in ("weight", "bias", "modulation"):
            if (change := getattr(one, kind)) is not None:
                found[f"{name}.{kind}"] = found.get(f"{name}.{kind}", 0) + change
    return found


def backbone(folder: Path, *experts: str, metadata: dict[str, str] | None = None) -> Path:
    """A folder of LoRAs as people train them for StoryMem's model; each expert's changes are its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for expert in experts or EXPERTS:
        halves = {
            f"base_model.model.{LAYER}.lora_A.weight": torch.ones(RANK, 64),
            f"base_model.model.{LAYER}.lora_B.weight": torch.full((128, RANK), 1.0 + EXPERTS.index(expert)),
        }
        save_file(halves, folder / f"backbone_{expert}.safetensors", metadata=metadata)
    return folder


# -- adapters ----------------------------------------------------------------------------------------------------------


@ANYTIME
@given(lora_cases())
def test_adapters_of_every_layout_equal_its_truth(case: LoraCase) -> None:
    dit = meta_dit()
    with TemporaryDirectory() as folder:
        path = case.write(Path(folder) / "lora")
        for expert in EXPERTS:
            loras = open_loras([LoraSettings(path=str(path))], expert, SHAPES)
            adapters = read_adapters(loras, dit)
            found = as_changes(adapters)
            expected = case.truth.get("both", case.truth.get(expert, {}))
            assert found.keys() == expected.keys()
            for key, change in expected.items():
                torch.testing.assert_close(found[key].double(), change, atol=1e-4, rtol=1e-5, msg=f"{expert} {key}")
            assert sum(one.num_bytes for one in adapters.values()) == adapter_bytes(loras, dit)


@ANYTIME
@given(lora_cases(damaged=True))
def test_adapters_of_every_damaged_file_are_refused_with_one_sentence(case: LoraCase) -> None:
    with TemporaryDirectory() as folder, pytest.raises(StoryMemError) as caught:
        path = case.write(Path(folder) / "lora")
        for expert in EXPERTS:
            read_adapters(open_loras([LoraSettings(path=str(path))], expert, SHAPES), meta_dit())
    assert "\n" not in str(caught.value)


def test_several_loras_become_one_product_and_a_strength_of_zero_adds_nothing(tmp_path: Path) -> None:
    folder, dit = backbone(tmp_path / "walk"), meta_dit()
    high = str(folder / "backbone_high_noise.safetensors")
    low = str(folder / "backbone_low_noise.safetensors")
    given = lora_list([{"path": high, "strength": 2.0}, {"path": low, "strength": -1.0}, {"path": low, "strength": 0}])
    loras = open_loras(given, "high_noise", SHAPES)
    adapters = read_adapters(loras, dit)
    assert adapters[LAYER].down.shape == (2 * RANK, 64)
    expected = torch.full((128, 64), (2.0 * 1 - 1.0 * 2) * RANK)
    torch.testing.assert_close(as_changes(adapters)[f"{LAYER}.weight"], expected)
    assert adapter_bytes(loras, dit) == adapters[LAYER].num_bytes
    assert adapter_bytes(loras, dit, compiled=True) == adapters[LAYER].num_bytes, "32 is a multiple of 16"
    assert read_adapters(loras[2:], dit) == {}
    assert adapter_bytes(loras[2:], dit) == 0


def test_adapters_have_the_dtype_in_which_the_layer_computes(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    names = (LAYER, "head.head", "patch_embedding", "time_projection.1")
    halves = {}
    for name in names:
        rows, *columns = SHAPES[f"{name}.weight"]
        halves[f"{name}.lora_A.weight"] = torch.ones(2, *columns)
        halves[f"{name}.lora_B.weight"] = torch.ones(rows, 2, *[1] * (len(columns) - 1))
    save_file(halves, path)
    adapters = read_adapters(open_loras(lora_list(str(path)), "low_noise", SHAPES), meta_dit(torch.bfloat16))
    found = {name: adapters[name].up.dtype for name in names}
    assert found == dict(zip(names, [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32], strict=True))


def test_values_that_the_layers_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    halves = {f"{LAYER}.lora_A.weight": torch.ones(2, 64), f"{LAYER}.lora_B.weight": torch.full((128, 2), 3e38)}
    save_file(halves, path)
    given = lora_list([{"path": str(path), "strength": 1e5}])
    with pytest.raises(CheckpointError, match=r"lora_B.weight times its scale is too large for torch.float32"):
        read_adapters(open_loras(given, "low_noise", SHAPES), meta_dit())


# -- folders like StoryMem's -------------------------------------------------------------------------------------------


def test_a_folder_of_backbones_is_one_lora_with_storymems_scale(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "walk")
    for expert in EXPERTS:
        (lora,) = open_loras(lora_list(str(folder)), expert, SHAPES)
        assert lora.file.path.name == f"backbone_{expert}.safetensors"
        assert lora.scale(LAYER) == math.sqrt(RANK)
    (plain,) = open_loras(lora_list([{"path": str(folder), "scale_rule": "alpha"}]), "low_noise", SHAPES)
    assert plain.scale(LAYER) == 1.0
    said = backbone(tmp_path / "run", metadata={"alpha": "8", "use_rslora": "false"})
    (lora,) = open_loras(lora_list(str(said)), "low_noise", SHAPES)
    assert lora.scale(LAYER) == 0.5, "a file that says its rule is believed"


def test_a_folder_of_one_backbone_is_for_one_expert_and_must_say_so(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "walk", "high_noise")
    for expert in EXPERTS:
        for chosen in ("both", "low_noise"):
            with pytest.raises(WeightsNotFound, match=r"has backbone_high_noise and no backbone_low_noise") as caught:
                open_loras(lora_list([{"path": str(folder), "expert": chosen}]), expert)
            assert "give this LoRA expert: high_noise" in str(caught.value)
        found = open_loras(lora_list([{"path": str(folder), "expert": "high_noise"}]), expert, SHAPES)
        assert len(found) == (expert == "high_noise")


def test_a_backbone_whose_keys_name_the_other_expert_is_refused(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "walk")
    keys = {f"transformer_2.{LAYER}.lora_A.weight": torch.ones(2, 64)}
    keys[f"transformer_2.{LAYER}.lora_B.weight"] = torch.ones(128, 2)
    save_file(keys, folder / "backbone_high_noise.safetensors")
    with pytest.raises(CheckpointError, match="its keys name the low_noise expert, its file name high_noise"):
        open_loras(lora_list(str(folder)), "high_noise", SHAPES)


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_fingerprints_hold_settings_and_contents_and_no_places(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "walk")
    inputs = lora_inputs([{"path": str(folder), "strength": 0.5}])
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert lora_inputs([{"path": str(copy), "strength": 0.5}]) == inputs
    assert "walk" not in json.dumps(inputs)
    assert lora_inputs([{"path": str(copy)}]) == lora_inputs([{"path": str(copy), "strength": 1.0, "expert": "both"}])
    others = [
        [{"path": str(folder)}],
        [{"path": str(folder), "strength": 0.5, "expert": "low_noise"}],
        [{"path": str(folder), "strength": 0.5, "scale_rule": "alpha"}],
        [{"path": str(folder / "backbone_low_noise.safetensors"), "strength": 0.5}],
        [{"path": str(folder), "strength": 0.5}] * 2,
    ]
    keys = [lora_key(lora_inputs(other)) for other in others]
    assert len({*keys, lora_key(inputs)}) == len(others) + 1
    assert all(len(key) == 12 for key in keys)
    assert lora_key(lora_inputs(None)) == lora_key(lora_inputs(())) == ""


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "walk")
    before = lora_inputs([{"path": str(folder)}])
    assert lora_inputs([{"path": str(folder)}]) == before
    file = folder / "backbone_low_noise.safetensors"
    save_file({f"{LAYER}.lora_A.weight": torch.ones(2, 64), f"{LAYER}.lora_B.weight": torch.ones(128, 2)}, file)
    assert lora_inputs([{"path": str(folder)}]) != before
    peft = tmp_path / "peft"
    peft.mkdir()
    shutil.copy(file, peft / "adapter_model.safetensors")
    plain = lora_inputs([{"path": str(peft)}])
    (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    assert lora_inputs([{"path": str(peft)}]) != plain, "the file next to it gives the scale"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"path": "/nowhere/walk.safetensors"}, WeightsNotFound, "LoRA /nowhere/walk.safetensors: no such file"),
        ({"path": "someone/walk-lora"}, WeightsNotFound, "hf download someone/walk-lora"),
        ({"weight": 1.0, "path": "x"}, ConfigError, "did you mean strength"),
    ],
)
def test_a_lora_that_is_not_there_is_refused_with_one_sentence(
    given: dict[str, object], error: type[StoryMemError], message: str
) -> None:
    with pytest.raises(error) as caught:
        lora_inputs([given])
    assert message in str(caught.value) and "\n" not in str(caught.value)
