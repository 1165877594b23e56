"""LoRA files: every accepted key style, every refusal, the scales. Oracles: peft and the original code's fixtures."""

import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError, ConfigError, StoryMemError, WeightsNotFound
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import TINY
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.loading import StateDictSource, load_dit_weights
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_lora, open_loras, storymem_lora
from storymem_dist.weights.tiny_checkpoint import LORA_TARGETS, ModelFolders
from tests.helpers.golden import load_golden, strip_prefix

RANK, WIDTH, FFN = 4, 64, 128


def halves(style: Callable[[str, str], str], targets: tuple[str, ...] = ("self_attn.q", "ffn.0")) -> dict[str, Tensor]:
    """A small LoRA on block 0 whose keys are ``style(module, "A" or "B")``."""
    torch.manual_seed(3)
    out = {"self_attn.q": WIDTH, "cross_attn.o": WIDTH, "ffn.0": FFN, "ffn.2": WIDTH}
    inner = {"ffn.2": FFN}
    tensors = {}
    for target in targets:
        tensors[style(f"blocks.0.{target}", "A")] = torch.randn(RANK, inner.get(target, WIDTH))
        tensors[style(f"blocks.0.{target}", "B")] = torch.randn(out[target], RANK)
    return tensors


def native_style(module: str, half: str) -> str:
    return f"{module}.lora_{half}.weight"


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


DIFFUSERS = {
    "self_attn.q": "attn1.to_q",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
KOHYA = {"A": "lora_down", "B": "lora_up"}


def diffusers_style(module: str, half: str) -> str:
    _, block, target = module.split(".", 2)
    return f"transformer.blocks.{block}.{DIFFUSERS[target]}.lora_{half}.weight"


@pytest.mark.parametrize(
    "style",
    [
        native_style,
        lambda module, half: f"base_model.model.{module}.lora_{half}.weight",
        lambda module, half: f"base_model.model.{module}.lora_{half}.default.weight",
        lambda module, half: f"diffusion_model.{module}.lora_{half}.weight",
        lambda module, half: f"model.diffusion_model.{module}.{KOHYA[half]}.weight",
        lambda module, half: f"lora_unet_{module.replace('.', '_')}.{KOHYA[half]}.weight",
        diffusers_style,
    ],
)
def test_every_key_style_gives_the_same_weights(tmp_path: Path, style: Callable[[str, str], str]) -> None:
    targets = tuple(DIFFUSERS)
    expected = ScaledLora(open_lora(write(tmp_path / "native.safetensors", halves(native_style, targets))))
    found = ScaledLora(open_lora(write(tmp_path / "other.safetensors", halves(style, targets))))
    assert found.shapes() == expected.shapes()
    for key, shape in expected.shapes().items():
        ours, theirs = torch.zeros(shape), torch.zeros(shape)
        found.add_to(ours, key, 0)
        expected.add_to(theirs, key, 0)
        assert ours.abs().sum() > 0
        assert torch.equal(ours, theirs)


def test_a_pth_file_is_read_without_running_code(tmp_path: Path) -> None:
    torch.save(halves(native_style), tmp_path / "lora.pth")
    assert set(open_lora(tmp_path / "lora.pth").modules) == {"blocks.0.self_attn.q", "blocks.0.ffn.0"}


@pytest.mark.parametrize(
    ("rule", "alpha", "stored_alpha", "strength", "scale"),
    [
        ("rslora", None, None, 1.0, math.sqrt(RANK)),
        ("rslora", 16.0, None, 0.5, 0.5 * 16 / math.sqrt(RANK)),
        ("alpha", None, None, 1.0, 1.0),
        ("alpha", None, 2.0, 1.0, 2.0 / RANK),
        ("alpha", 8.0, 2.0, 1.0, 8.0 / RANK),
        ("none", 8.0, 2.0, -0.75, -0.75),
    ],
)
def test_the_scale_follows_rule_alpha_and_strength(
    tmp_path: Path, rule: str, alpha: float | None, stored_alpha: float | None, strength: float, scale: float
) -> None:
    tensors = halves(native_style)
    if stored_alpha is not None:
        tensors |= {f"blocks.0.{target}.alpha": torch.tensor(stored_alpha) for target in ("self_attn.q", "ffn.0")}
    lora = ScaledLora(
        open_lora(write(tmp_path / "x.safetensors", tensors)), scale_rule=rule, alpha=alpha, strength=strength
    )
    assert lora.scale("blocks.0.self_attn.q") == pytest.approx(scale)
    merged = torch.ones(WIDTH, WIDTH)
    lora.add_to(merged, "blocks.0.self_attn.q.weight", 0)
    product = tensors["blocks.0.self_attn.q.lora_B.weight"] @ tensors["blocks.0.self_attn.q.lora_A.weight"]
    torch.testing.assert_close(merged, 1 + scale * product)


def test_the_published_storymem_scale_is_that_of_rank_128(tmp_path: Path) -> None:
    tensors = {f"patch_embedding.lora_{half}.weight": torch.zeros(128, 128) for half in "AB"}
    lora = ScaledLora(open_lora(write(tmp_path / "x.safetensors", tensors)), scale_rule="rslora")
    assert lora.scale("patch_embedding") == pytest.approx(11.3137, abs=1e-4)


class OneLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(weight.shape[1], weight.shape[0])  # a LoRA's targets have names of the DiT
        self.patch_embedding.load_state_dict({"weight": weight, "bias": bias})


@pytest.mark.parametrize("case", load_golden("lora")[1]["cases"], ids=lambda case: case["id"])
def test_a_merged_linear_equals_the_original_codes(case: dict, tmp_path: Path) -> None:
    tensors, manifest = load_golden("lora")
    case_tensors = strip_prefix(tensors, f"case.{case['id']}.")
    base = strip_prefix(case_tensors, "base.")
    stored = strip_prefix(case_tensors, "lora.")
    path = write(
        tmp_path / "lora.safetensors", {key.replace("lin.", "patch_embedding."): value for key, value in stored.items()}
    )
    lora = ScaledLora(open_lora(path), scale_rule="rslora" if case["rs"] else "alpha", alpha=case["alpha"])
    assert lora.scale("patch_embedding") == pytest.approx(case["scaling"])
    model = OneLinear(torch.zeros_like(base["weight"]), torch.zeros_like(base["bias"]))
    load_dit_weights(
        model, StateDictSource("base", {f"patch_embedding.{name}": value for name, value in base.items()}), [lora]
    )
    tolerance = manifest["tolerance"]
    torch.testing.assert_close(
        model.patch_embedding.weight, case_tensors["merged.weight"], atol=tolerance["merged.weight"]["atol"], rtol=0
    )
    torch.testing.assert_close(
        model.patch_embedding(case_tensors["x"]), case_tensors["y"], atol=tolerance["y"]["atol"], rtol=0
    )


@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_merged_experts_of_the_whole_runs_are_reproduced(expert: str, tmp_path: Path) -> None:
    tensors, manifest = load_golden("end_to_end")
    with torch.device("meta"):
        dit = WanDiT(DiTConfig.from_json(manifest["config"]["m2v"]), dtype=torch.float32)
    dit.to_empty(device="cpu")
    path = write(tmp_path / "lora.safetensors", strip_prefix(tensors, f"lora.{expert}."))
    source = StateDictSource("golden", strip_prefix(tensors, f"m2v.{expert}."))
    load_dit_weights(dit, source, [ScaledLora(open_lora(path), scale_rule="rslora")])
    expected = strip_prefix(tensors, f"merged.{expert}.")
    assert len(expected) == 2
    for key, merged in expected.items():
        torch.testing.assert_close(dit.get_parameter(key), merged, atol=manifest["tolerance"]["merged"]["atol"], rtol=0)


@pytest.mark.parametrize("use_rslora", [True, False])
def test_our_merge_equals_pefts_own(tmp_path: Path, use_rslora: bool) -> None:
    torch.manual_seed(4)
    weights = {name: torch.randn(p.shape) * 0.1 for name, p in WanDiT(TINY.t2v, dtype=torch.float32).named_parameters()}

    def empty() -> WanDiT:
        with torch.device("meta"):
            dit = WanDiT(TINY.t2v, dtype=torch.float32)
        return dit.to_empty(device="cpu")

    theirs = empty()
    load_dit_weights(theirs, StateDictSource("base", weights))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=6, use_rslora=use_rslora, target_modules=list(LORA_TARGETS), init_lora_weights=False
    )
    wrapped = peft.get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload()
    ours = empty()
    lora = ScaledLora(
        open_lora(tmp_path / "adapter_model.safetensors"), scale_rule="rslora" if use_rslora else "alpha", alpha=6
    )
    assert len(lora.shapes()) == len(LORA_TARGETS) * TINY.t2v.num_layers
    load_dit_weights(ours, StateDictSource("base", weights), [lora])
    for (name, expected), parameter in zip(merged.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-6, msg=name)
    changed = dict(ours.named_parameters())["blocks.1.ffn.2.weight"]
    assert not torch.allclose(changed, weights["blocks.1.ffn.2.weight"], atol=1e-2)


def _drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("blocks.0.ffn.0.lora_B.weight"), "lora_B (lora_up) is missing for: blocks.0.ffn.0.lora_A.weight"),
        (_drop("blocks.0.ffn.0.lora_A.weight"), "lora_A (lora_down) is missing for: blocks.0.ffn.0.lora_B.weight"),
        (
            lambda tensors: tensors.update({f"blocks.{i}.cross_attn.k.scale": torch.zeros(2) for i in range(5)}),
            "5 keys are not understood, or have no place in Wan2.2-A14B's transformer: blocks.0.cross_attn.k.scale, "
            "blocks.1.cross_attn.k.scale, blocks.2.cross_attn.k.scale and 2 more; to leave them out",
        ),
        (
            lambda tensors: tensors.update({"blocks.9.ffn.0.alpha": torch.tensor(1.0)}),
            "alphas belong to no target: blocks.9.ffn.0",
        ),
        (
            lambda tensors: tensors.update({"blocks.0.ffn.0.lora_A.style.weight": torch.zeros(RANK, WIDTH)}),
            "are for the same weight, blocks.0.ffn.0",
        ),
        (
            lambda tensors: tensors.update({"blocks.0.ffn.0.lora_A.weight": torch.zeros(RANK + 1, WIDTH)}),
            "do not form a product",
        ),
        (
            lambda tensors: [tensors.clear(), tensors.update({"blocks.0.ffn.0.weight": torch.zeros(2)})],
            "not a LoRA: none of its 1 keys ends in lora_A.weight",
        ),
    ],
)
def test_a_lora_that_is_not_fully_understood_is_refused(tmp_path: Path, change, message: str) -> None:
    tensors = halves(native_style)
    change(tensors)
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        open_lora(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.update({"blocks.0.ffn.0.lora_A.weight": torch.zeros(RANK, 2 * WIDTH)}),
            "made for another width: its blocks.0.ffn.0.weight is [128, 128], this model's is [128, 64]",
        ),
        (
            lambda tensors: tensors.update(
                {f"blocks.7.ffn.0.lora_{half}.weight": torch.zeros(RANK, RANK) for half in "AB"}
            ),
            "the model has no such weights: blocks.7.ffn.0.weight",
        ),
    ],
)
def test_a_lora_for_another_model_is_refused_before_loading(tiny: ModelFolders, tmp_path, change, message) -> None:
    tensors = halves(native_style)
    change(tensors)
    lora = ScaledLora(open_lora(write(tmp_path / "other.safetensors", tensors)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tiny.i2v_dir, "i2v").check_loras([lora])
    assert message in str(caught.value)


def test_a_missing_lora_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match="no such file"):
        open_lora(tmp_path / "nowhere.safetensors")


def test_a_list_of_loras_is_opened_for_the_expert_it_names(tmp_path: Path) -> None:
    path = str(write(tmp_path / "x.safetensors", halves(native_style)))
    settings = [
        LoraSettings(path=path, expert="high_noise", strength=0.5),
        LoraSettings(path=path, expert="low_noise", scale_rule="none"),
        LoraSettings(path=path, scale_rule="rslora"),
    ]
    scales = {
        expert: [lora.scale("blocks.0.ffn.0") for lora in open_loras(settings, expert)]
        for expert in ("high_noise", "low_noise")
    }
    assert scales == {"high_noise": [0.5, 2.0], "low_noise": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_rule": "peft"}, "model.loras.scale_rule='peft' is not allowed; use one of: auto, rslora, alpha, none"),
        ({"expert": "high"}, "model.loras.expert='high' is not allowed"),
        ({"strength": math.nan}, "model.loras.strength=nan is not allowed"),
        ({"alpha": -1.0}, "model.loras.alpha=-1.0 is not allowed"),
    ],
)
def test_lora_settings_refuse_what_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraSettings(path="x", **values)
    assert message in str(caught.value)


@pytest.mark.parametrize(("continuation", "folder"), [("none", "MI2V"), ("mi2v", "MI2V"), ("mm2v", "MM2V")])
def test_the_continuation_mode_picks_the_storymem_lora(tiny: ModelFolders, continuation: str, folder: str) -> None:
    found = storymem_lora(tiny.lora_dir, continuation)
    assert set(found) == {"high_noise", "low_noise"}
    for expert, lora in found.items():
        assert lora.file.path == tiny.lora_dir / f"Wan2.2-{folder}-A14B" / f"backbone_{expert}.safetensors"
        assert lora.scale("blocks.0.ffn.0") == pytest.approx(math.sqrt(RANK))
    direct = storymem_lora(tiny.lora_dir / f"Wan2.2-{folder}-A14B", continuation)
    assert direct["high_noise"].identity == found["high_noise"].identity
    assert found["high_noise"].identity != found["low_noise"].identity


def test_older_releases_with_pth_files_are_found(tiny: ModelFolders, tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.2-MI2V-A14B"
    folder.mkdir()
    for expert in ("high_noise", "low_noise"):
        torch.save(
            halves(lambda module, half: f"base_model.model.{module}.lora_{half}.weight"),
            folder / f"backbone_{expert}.pth",
        )
    assert storymem_lora(tmp_path, "mi2v")["low_noise"].file.path == folder / "backbone_low_noise.pth"


@pytest.mark.parametrize(
    ("relative", "continuation", "error", "message"),
    [
        (
            "Wan2.2-MM2V-A14B",
            "mi2v",
            CheckpointError,
            "this is Wan2.2-MM2V-A14B, but continuation=mi2v needs Wan2.2-MI2V-A14B",
        ),
        (
            "Wan2.2-MI2V-A14B",
            "mm2v",
            CheckpointError,
            "this is Wan2.2-MI2V-A14B, but continuation=mm2v needs Wan2.2-MM2V-A14B",
        ),
        (
            "nowhere",
            "mm2v",
            WeightsNotFound,
            'hf download Kevin-thu/StoryMem --include "Wan2.2-MM2V-A14B/*" --local-dir ',
        ),
        (".", "ti2v", ConfigError, "sampler.continuation='ti2v' is not allowed"),
    ],
)
def test_a_storymem_folder_that_does_not_fit_is_refused(
    tiny: ModelFolders, relative: str, continuation: str, error: type[StoryMemError], message: str
) -> None:
    with pytest.raises(error) as caught:
        storymem_lora(tiny.lora_dir / relative, continuation)
    assert message in str(caught.value)


def test_the_identity_of_a_lora_changes_with_its_scale_and_its_content(tmp_path: Path) -> None:
    file = open_lora(write(tmp_path / "x.safetensors", halves(native_style)))
    other = open_lora(write(tmp_path / "y.safetensors", halves(native_style, ("ffn.2",))))
    identities = {
        ScaledLora(file).identity,
        ScaledLora(file, strength=0.5).identity,
        ScaledLora(file, scale_rule="rslora").identity,
        ScaledLora(other).identity,
    }
    assert len(identities) == 4
    assert ScaledLora(file).identity == ScaledLora(open_lora(tmp_path / "x.safetensors")).identity
