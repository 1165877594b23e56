"""Where the scale of a LoRA stands: every place, agreement, contradiction, identity. Oracle: peft."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError, StoryMemError
from storymem_dist.models.wan.presets import HIGH_NOISE
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_lora, open_lora_by_expert, open_loras
from tests.helpers.lora_layouts import SHAPES
from tests.helpers.tiny_dit import make_dit

RANK = 8
Q, CROSS, FFN = "blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.2"


def tensors(prefix: str = "diffusion_model.", alpha: float | None = None, rank: int = RANK) -> dict[str, Tensor]:
    found = {}
    for name in (Q, CROSS):
        found[f"{prefix}{name}.lora_A.weight"] = torch.ones(rank, 64)
        found[f"{prefix}{name}.lora_B.weight"] = torch.ones(64, rank)
        if alpha is not None:
            found[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return found


def scale(
    folder: Path,
    stored: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    config: dict | None = None,
    **rule,
) -> float:
    save_file(stored, folder / "adapter_model.safetensors", metadata=metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    lora = ScaledLora(open_lora(folder), **rule)
    values = {lora.scale(name) for name in (Q, CROSS)}
    assert len(values) == 1
    return values.pop()


ADAPTER = {"transformer.r": RANK, "transformer.lora_alpha": 32, "transformer.use_rslora": False}
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32}
RS_ARGS = json.dumps({"algo": "lora", "rs_lora": "True"})


@pytest.mark.parametrize(
    ("alpha", "metadata", "config", "expected"),
    [
        (None, None, None, 1.0),
        (2.0, None, None, 0.25),
        (None, {"alpha": "2"}, None, 0.25),
        (None, {"lora_alpha": "2", "lora_rank": "8"}, None, 0.25),
        (None, {"network_alpha": "2.0", "network_dim": "8"}, None, 0.25),
        (None, {"ss_network_alpha": "4.0", "ss_network_dim": "8"}, None, 0.5),
        (4.0, {"ss_network_alpha": "4.0", "ss_network_dim": "8"}, None, 0.5),
        (4.0, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, None, 0.5),
        (None, {"alpha": "2", "use_rslora": "true"}, None, 2 / math.sqrt(8)),
        (2 * math.sqrt(8), {"ss_network_alpha": "2", "ss_network_args": RS_ARGS}, None, 2 / math.sqrt(8)),
        (None, {"lora_adapter_metadata": json.dumps(ADAPTER)}, None, 4.0),
        (
            None,
            {"lora_adapter_metadata": json.dumps({"r": 8, "lora_alpha": 16, "use_rslora": True})},
            None,
            16 / 8**0.5,
        ),
        (None, {"lora_adapter_metadata": json.dumps({"transformer": {"r": 8, "lora_alpha": 16}})}, None, 2.0),
        (None, None, PEFT, 4.0),
        (None, None, {**PEFT, "use_rslora": True}, 32 / math.sqrt(8)),
        (None, None, {"peft_type": "LORA", "r": 8}, 1.0),
        (None, None, {**PEFT, "alpha_pattern": {r".*attn\.(q|o)": 2}}, 0.25),
        (None, None, {**PEFT, "r": 4, "rank_pattern": {"q": 8, r"blocks\.1\..*o": 8}}, 4.0),
        (32.0, {"alpha": "32", "rank": "8"}, PEFT, 4.0),
    ],
)
def test_the_scale_is_read_from_every_place(tmp_path: Path, alpha, metadata, config, expected: float) -> None:
    assert scale(tmp_path, tensors(alpha=alpha), metadata, config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("alpha", "metadata", "config", "messages"),
    [
        (4.0, {"ss_network_alpha": "8"}, None, ("is 4 in its .alpha tensors", "8 in its header")),
        (4.0, None, PEFT, ("is 4 in its .alpha tensors", "32 in adapter_config.json")),
        (None, {"alpha": "2"}, PEFT, ("is 2 in its header", "32 in adapter_config.json")),
        (None, {"alpha": "2", "lora_alpha": "4"}, None, ("alpha=2", "lora_alpha=4")),
        (None, {"rank": "16"}, None, ("its header gives rank 16", "have rank 8")),
        (None, None, {**PEFT, "r": 4}, ("adapter_config.json gives rank 4", "have rank 8")),
        (
            None,
            {"use_rslora": "true"},
            {**PEFT, "use_rslora": False},
            ("its header asks for the scale rule rslora", "alpha"),
        ),
        (None, {"lora_adapter_metadata": json.dumps({"transformer_2.r": 8})}, None, ("an expert that no key",)),
    ],
)
def test_places_that_contradict_each_other_are_refused_naming_both(
    tmp_path: Path, alpha, metadata, config, messages: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        scale(tmp_path, tensors(alpha=alpha), metadata, config)
    assert all(message in str(caught.value) for message in messages), caught.value


@pytest.mark.parametrize(
    ("metadata", "config", "message"),
    [
        ({"alpha": "nan"}, None, "alpha='nan'; it must be a finite number"),
        ({"rank": "4.5"}, None, "its header has the rank 4.5"),
        ({"lora_adapter_metadata": "{"}, None, "lora_adapter_metadata that is not JSON"),
        ({"lora_adapter_metadata": "[1]"}, None, "not a JSON object"),
        ({"use_rslora": "maybe"}, None, "use_rslora='maybe'; it must be true or false"),
        (None, {"peft_type": "LOHA"}, "peft_type=LOHA: not a LoRA"),
        (None, {**PEFT, "use_dora": True}, "use_dora: DoRA"),
        (None, {**PEFT, "rank_pattern": {"(": 4}}, "has the pattern '('"),
    ],
)
def test_a_place_that_cannot_be_read_is_refused(tmp_path: Path, metadata, config, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        scale(tmp_path, tensors(), metadata, config)
    assert message in str(caught.value)


def test_each_expert_has_the_scale_of_its_own_part_of_the_metadata(tmp_path: Path) -> None:
    metadata = json.dumps({**ADAPTER, "transformer_2.r": RANK, "transformer_2.lora_alpha": 2})
    path = tmp_path / "x.safetensors"
    save_file(tensors("transformer.") | tensors("transformer_2."), path, metadata={"lora_adapter_metadata": metadata})
    scales = {name: ScaledLora(part).scale(Q) for name, part in open_lora_by_expert(path).items()}
    assert scales == {"high_noise": 4.0, "low_noise": 0.25}


@pytest.mark.parametrize("nested", ["state_dict", "module", "lora", None])
def test_values_next_to_the_tensors_of_a_pt_file_count(tmp_path: Path, nested: str | None) -> None:
    stored = (
        {nested: tensors(), "lora_alpha": 2, "epoch": 7} if nested else {**tensors(), "network_alpha": torch.tensor(2)}
    )
    torch.save(stored, tmp_path / "x.pt")
    assert ScaledLora(open_lora(tmp_path / "x.pt")).scale(Q) == 0.25


@pytest.mark.parametrize(
    ("rule", "alpha", "expected"),
    [("alpha", None, 4.0), ("rslora", None, 32 / math.sqrt(8)), ("none", None, 1.0), ("auto", 16.0, 16 / math.sqrt(8))],
)
def test_what_the_settings_say_comes_before_what_the_file_says(tmp_path: Path, rule: str, alpha, expected) -> None:
    config = {**PEFT, "use_rslora": True}
    assert scale(tmp_path, tensors(), None, config, scale_rule=rule, alpha=alpha) == pytest.approx(expected)


def test_what_was_found_is_described(tmp_path: Path) -> None:
    save_file(tensors(alpha=4.0), tmp_path / "x.safetensors", metadata={"ss_network_alpha": "4"})
    lora = ScaledLora(open_lora(tmp_path / "x.safetensors"))
    described = lora.describe()
    assert described["scale_found_in"] == ["its .alpha tensors", "its header"]
    assert (described["scale"], described["rank"], described["rule_used"]) == ("0.5", "8", "alpha")
    assert "2 targets of rank 8, scale 0.5" in lora.summary()


# -- identity ----------------------------------------------------------------------------------------------------------


def identity(path: Path, **values) -> str:
    return ScaledLora(open_lora(path), **values).identity


def test_auto_keeps_the_identity_of_the_rule_that_it_finds(tmp_path: Path) -> None:
    """Runs that were rendered with ``scale_rule: alpha`` are not rendered again."""
    path = tmp_path / "x.safetensors"
    save_file(tensors(alpha=4.0), path)
    assert identity(path) == identity(path, scale_rule="alpha") != identity(path, scale_rule="rslora")


def test_the_identity_covers_what_lies_next_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors(), path)
    found = {identity(path)}
    for config in (PEFT, {**PEFT, "use_rslora": True}, {**PEFT, "lora_alpha": 16}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found.add(identity(path))
    assert len(found) == 4


# -- peft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q": 2, r".*\.ffn\.2": 5}, "alpha_pattern": {"blocks.1.cross_attn.o": 3, r"ffn\.\d": 9}},
        {"lora_bias": True, "use_rslora": True},
        {"target_modules": ["q", "time_projection.1", "head.head", "text_embedding.0"]},
    ],
)
def test_a_peft_folder_merges_as_peft_merges_it(tmp_path: Path, options: dict) -> None:
    torch.manual_seed(4)
    base = make_dit()
    before = {name: value.detach().clone() for name, value in base.named_parameters()}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "o", "ffn.2"], "init_lora_weights": False, **options}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload()
    shapes = {name: value.shape for name, value in before.items()}
    (ours,) = open_loras([LoraSettings(path=str(tmp_path))], HIGH_NOISE, shapes)
    assert ours.shapes()
    for name, expected in merged.named_parameters():
        found = before[name].clone()
        if name in ours.shapes():
            ours.add_to(found, name, 0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=name)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_peft_or_diffusers_is_a_lora(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "own.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors(), folder / name)
        assert open_lora(folder).path == folder / name
    torch.save(tensors(), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    assert ScaledLora(open_lora(tmp_path)).scale(Q) == 4.0


def test_a_configuration_counts_for_the_file_that_it_describes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "other.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    assert ScaledLora(open_lora(tmp_path / "other.safetensors")).scale(Q) == 4.0
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    assert ScaledLora(open_lora(tmp_path / "other.safetensors")).scale(Q) == 1.0


@pytest.mark.parametrize(
    ("names", "message"), [((), "holds no LoRA"), (("a", "b"), r"holds several \(a.safetensors, b")]
)
def test_a_folder_without_one_lora_is_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(StoryMemError, match=message):
        open_lora(tmp_path)


def test_the_shapes_of_these_tests_are_those_of_the_tiny_model() -> None:
    assert [SHAPES[f"{name}.weight"] for name in (Q, CROSS, FFN)] == [(64, 64), (64, 64), (64, 128)]
