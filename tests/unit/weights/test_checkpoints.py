"""Folders of weights: both layouts hold the same, and everything that is wrong is refused before loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storymem_dist.errors import CheckpointError, ConfigError, StoryMemError, WeightsNotFound
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.weights.checkpoints import WanCheckpoint, dit_shapes, open_checkpoint
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.text_encoder import load_text_encoder
from storymem_dist.weights.tiny_checkpoint import ModelFolders
from storymem_dist.weights.vae import load_vae
from tests.helpers.checkpoints import edit_json, rewrite_safetensors, truncate, write_diffusers_layout

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD_4 = "diffusion_pytorch_model-00004-of-00006.safetensors"


@pytest.fixture(scope="session")
def diffusers_i2v(tiny: ModelFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_diffusers_layout(tiny.i2v_dir, "i2v", tmp_path_factory.mktemp("diffusers"))


@pytest.fixture
def diffusers_copy(diffusers_i2v: Path, tmp_path: Path) -> Path:
    return shutil.copytree(diffusers_i2v, tmp_path / "diffusers")


def loaded(checkpoint: WanCheckpoint, expert: str) -> WanDiT:
    with torch.device("meta"):
        dit = WanDiT(checkpoint.dit_config, dtype=torch.float32)
    dit.to_empty(device="cpu")
    load_dit_weights(dit, checkpoint.expert(expert))
    return dit


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_both_layouts_load_the_same_expert(tiny: ModelFolders, diffusers_i2v: Path, expert: str) -> None:
    native, diffusers = open_checkpoint(tiny.i2v_dir, "i2v"), open_checkpoint(diffusers_i2v, "i2v")
    assert (native.layout, diffusers.layout) == ("native", "diffusers")
    assert native.dit_config == diffusers.dit_config
    ours, theirs = loaded(native, expert), loaded(diffusers, expert)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_both_layouts_load_the_same_vae_and_text_encoder(tiny: ModelFolders, diffusers_i2v: Path) -> None:
    native, diffusers = open_checkpoint(tiny.i2v_dir, "i2v"), open_checkpoint(diffusers_i2v, "i2v")
    pixels = torch.rand(3, 5, 16, 16) * 2 - 1
    assert torch.equal(load_vae(native.vae_path).encode(pixels), load_vae(diffusers.vae_path).encode(pixels))
    embeddings = [load_text_encoder(checkpoint).encode(["a boat"])[0] for checkpoint in (native, diffusers)]
    assert torch.equal(*embeddings)


def test_the_two_experts_are_not_mixed_up(tiny: ModelFolders, diffusers_i2v: Path) -> None:
    high, low = (loaded(open_checkpoint(tiny.i2v_dir, "i2v"), expert) for expert in ("high_noise", "low_noise"))
    assert not torch.equal(high.head.head.weight, low.head.head.weight)
    stored = {
        key: value
        for file in (diffusers_i2v / "transformer_2").glob("*.safetensors")
        for key, value in load_file(file).items()
    }
    assert torch.equal(low.head.head.weight, stored["proj_out.weight"])


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_single_file_without_index_is_accepted(tiny: ModelFolders, tmp_path: Path, kind: str) -> None:
    root = shutil.copytree(getattr(tiny, f"{kind}_dir"), tmp_path / "w")
    expected = loaded(open_checkpoint(root, kind), "high_noise")
    folder = root / "high_noise_model"
    whole = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(whole, folder / "model.safetensors")
    found = loaded(open_checkpoint(root, kind), "high_noise")
    assert torch.equal(found.patch_embedding.weight, expected.patch_embedding.weight)


def test_every_key_of_the_full_size_model_has_a_shape() -> None:
    for config, parameters in ((WAN22_A14B.t2v, 14_288_491_584), (WAN22_A14B.i2v, 14_288_901_184)):
        shapes = dit_shapes(config)
        assert len(shapes) == 1095
        assert sum(shape.numel() for shape in shapes.values()) == parameters


def test_the_identity_notices_every_changed_file(i2v_copy: Path) -> None:
    before = open_checkpoint(i2v_copy, "i2v").identity
    assert open_checkpoint(i2v_copy, "i2v").identity == before
    seen = {before}
    for path in ("low_noise_model/" + SHARD_4, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        content = bytearray((i2v_copy / path).read_bytes())
        content[-60 if path.endswith("safetensors") else len(content) // 2] ^= 1
        (i2v_copy / path).write_bytes(content)
        seen.add(open_checkpoint(i2v_copy, "i2v").identity)
    edit_json(i2v_copy / "google/umt5-xxl/tokenizer_config.json", lambda config: config.update(extra=1))
    seen.add(open_checkpoint(i2v_copy, "i2v").identity)
    assert len(seen) == 5


def test_the_identity_does_not_depend_on_where_the_folder_is(tiny: ModelFolders, i2v_copy: Path) -> None:
    assert open_checkpoint(i2v_copy, "i2v").identity == open_checkpoint(tiny.i2v_dir, "i2v").identity


def _remove(relative: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / relative
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _remove_all(root: Path, pattern: str) -> None:
    for path in root.glob(pattern):
        path.unlink()


def _config(**values: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for folder in ("high_noise_model", "low_noise_model"):
            edit_json(root / folder / "config.json", lambda config: config.update(values))

    return change


def _make_5b(root: Path) -> None:
    shutil.copy(root / "high_noise_model" / "config.json", root / "config.json")
    edit_json(root / "config.json", lambda config: config.update(in_dim=48, dim=3072, model_type="ti2v"))
    for folder in ("high_noise_model", "low_noise_model"):
        shutil.rmtree(root / folder)


def _make_single_expert(root: Path) -> None:
    shutil.copy(root / "high_noise_model" / "config.json", root / "config.json")
    for folder in ("high_noise_model", "low_noise_model"):
        shutil.rmtree(root / folder)


def _rewrite_shard_4(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda root: rewrite_safetensors(root / "low_noise_model" / SHARD_4, change)


def _move_a_key_in_the_index(root: Path) -> None:
    index = root / "high_noise_model" / INDEX

    def change(values: dict) -> None:
        key = next(key for key, name in values["weight_map"].items() if name != SHARD_4)
        values["weight_map"][key] = SHARD_4

    edit_json(index, change)


def _drop_a_key_everywhere(root: Path) -> None:
    _rewrite_shard_4(lambda tensors: tensors.pop(sorted(tensors)[0]))(root)
    kept = set(load_file(root / "low_noise_model" / SHARD_4))
    edit_json(
        root / "low_noise_model" / INDEX,
        lambda index: index.update(
            weight_map={key: name for key, name in index["weight_map"].items() if name != SHARD_4 or key in kept}
        ),
    )


def _write(relative: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / relative).write_bytes(content)


NATIVE_REFUSALS = {
    "no folder": (
        shutil.rmtree,
        WeightsNotFound,
        "I2V weights: {root} is not a folder; get them with: hf download Wan-AI/Wan2.2-I2V-A14B --local-dir {root}",
    ),
    "an unrelated folder": (
        lambda root: [_remove(name.name)(root) for name in root.iterdir()],
        WeightsNotFound,
        "is not a Wan2.2-A14B folder (it holds: nothing; expected high_noise_model/",
    ),
    "one expert missing": (
        _remove("low_noise_model"),
        WeightsNotFound,
        "{root}: an expert is missing: low_noise_model/; Wan2.2-A14B has two",
    ),
    "shard missing": (
        _remove("low_noise_model/" + SHARD_4),
        WeightsNotFound,
        "shard 4 of 6 is missing: {root}/low_noise_model/" + SHARD_4 + "; complete it with: hf download",
    ),
    "all shards missing": (
        lambda root: _remove_all(root, "low_noise_model/*.safetensors*"),
        WeightsNotFound,
        "{root}/low_noise_model: there are no .safetensors files",
    ),
    "index missing": (
        _remove("low_noise_model/" + INDEX),
        WeightsNotFound,
        "{root}/low_noise_model: there are several shards but no index",
    ),
    "index is no index": (
        _write("low_noise_model/" + INDEX, b"{}"),
        CheckpointError,
        "not an index of safetensors files",
    ),
    "index is no JSON": (
        _write("low_noise_model/" + INDEX, b"<html>rate limit</html>"),
        CheckpointError,
        INDEX + ": not valid JSON",
    ),
    "index contradicts shard": (_move_a_key_in_the_index, CheckpointError, f"in {SHARD_4}, which does not hold it"),
    "truncated shard": (
        lambda root: truncate(root / "high_noise_model" / SHARD_4, 100),
        CheckpointError,
        "{root}/high_noise_model/" + SHARD_4 + ": truncated: its header describes",
    ),
    "T2V where I2V is needed": (
        _config(in_dim=16),
        CheckpointError,
        "{root}/high_noise_model: these are T2V weights (in_dim 16); here I2V weights are needed (in_dim 36)",
    ),
    "another in_dim": (_config(in_dim=32), CheckpointError, "these are other weights (in_dim 32)"),
    "5B": (_make_5b, CheckpointError, "this is Wan2.2-TI2V-5B (in_dim 48, one expert, another VAE)"),
    "a model with one expert": (_make_single_expert, CheckpointError, "a model with one expert"),
    "experts of different size": (
        lambda root: edit_json(root / "low_noise_model/config.json", lambda config: config.update(num_layers=3)),
        CheckpointError,
        "the two experts have different sizes",
    ),
    "another architecture": (_config(qk_norm=False), CheckpointError, "config.json: qk_norm=False is another"),
    "missing key": (
        _drop_a_key_everywhere,
        CheckpointError,
        "{root}/low_noise_model: weights are missing: blocks.",
    ),
    "leftover key": (
        _rewrite_shard_4(lambda tensors: tensors.update({"img_emb.proj.0.weight": torch.zeros(2)})),
        CheckpointError,
        "{root}/low_noise_model: weights have no place in the model: img_emb.proj.0.weight",
    ),
    "wrong shape": (
        _config(ffn_dim=256),
        CheckpointError,
        "has shape [128, 64]; the configuration asks for [256, 64]",
    ),
    "quantized": (
        _rewrite_shard_4(lambda tensors: tensors.update({key: value.to(torch.int8) for key, value in tensors.items()})),
        CheckpointError,
        "an 8-bit file (int8) without the scales of: ",
    ),
    "VAE missing": (_remove("Wan2.1_VAE.pth"), WeightsNotFound, "{root}: the vae is missing: {root}/Wan2.1_VAE.pth"),
    "text encoder missing": (
        _remove("models_t5_umt5-xxl-enc-bf16.pth"),
        WeightsNotFound,
        "the text encoder is missing",
    ),
    "tokenizer missing": (_remove("google"), WeightsNotFound, "the tokenizer is missing: {root}/google/umt5-xxl"),
    "tokenizer incomplete": (
        _remove("google/umt5-xxl/tokenizer.json"),
        WeightsNotFound,
        "neither tokenizer.json nor spiece.model",
    ),
    "truncated pth": (
        lambda root: truncate(root / "Wan2.1_VAE.pth", 100),
        CheckpointError,
        "{root}/Wan2.1_VAE.pth: truncated",
    ),
    "pth that is a web page": (
        _write("Wan2.1_VAE.pth", b"<!DOCTYPE html>"),
        CheckpointError,
        "{root}/Wan2.1_VAE.pth: a web page instead of the file",
    ),
}


@pytest.mark.parametrize("case", NATIVE_REFUSALS)
def test_a_native_folder_that_is_wrong_is_refused(i2v_copy: Path, case: str) -> None:
    damage, error, message = NATIVE_REFUSALS[case]
    _assert_refused(i2v_copy, damage, error, message)


DIFFUSERS_REFUSALS = {
    "one expert missing": (
        _remove("transformer_2"),
        WeightsNotFound,
        "{root}: an expert is missing: transformer_2/; Wan2.2-A14B has two",
    ),
    "5B": (
        lambda root: [
            _remove("transformer_2")(root),
            edit_json(root / "transformer/config.json", lambda config: config.update(in_channels=48)),
        ],
        CheckpointError,
        "this is Wan2.2-TI2V-5B",
    ),
    "T2V where I2V is needed": (
        lambda root: [
            edit_json(root / folder / "config.json", lambda config: config.update(in_channels=16))
            for folder in ("transformer", "transformer_2")
        ],
        CheckpointError,
        "{root}/transformer: these are T2V weights (in_dim 16)",
    ),
    "shard missing": (
        _remove("transformer_2/diffusion_pytorch_model-00002-of-00003.safetensors"),
        WeightsNotFound,
        "shard 2 of 3 is missing: {root}/transformer_2/",
    ),
    "truncated text encoder": (
        lambda root: truncate(root / "text_encoder/model.safetensors", 7),
        CheckpointError,
        "{root}/text_encoder/model.safetensors: truncated",
    ),
    "leftover key": (
        lambda root: rewrite_safetensors(
            root / "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
            lambda tensors: tensors.update({"condition_embedder.image_embedder.norm1.weight": torch.zeros(1)}),
        ),
        CheckpointError,
        "weights have no place in the model: condition_embedder.image_embedder.norm1.weight",
    ),
    "VAE missing": (_remove("vae"), WeightsNotFound, "the vae is missing: {root}/vae"),
}


@pytest.mark.parametrize("case", DIFFUSERS_REFUSALS)
def test_a_diffusers_folder_that_is_wrong_is_refused(diffusers_copy: Path, case: str) -> None:
    damage, error, message = DIFFUSERS_REFUSALS[case]
    _assert_refused(diffusers_copy, damage, error, message)


def test_i2v_weights_where_t2v_is_needed_are_refused(tiny: ModelFolders) -> None:
    with pytest.raises(CheckpointError, match=r"these are I2V weights \(in_dim 36\); here T2V weights are needed"):
        open_checkpoint(tiny.i2v_dir, "t2v")


def test_an_unknown_kind_is_refused(tiny: ModelFolders) -> None:
    with pytest.raises(ConfigError, match="kind='m2v' is not allowed; use one of: t2v, i2v"):
        open_checkpoint(tiny.i2v_dir, "m2v")


def test_nothing_but_headers_is_read_to_open_a_checkpoint(tiny: ModelFolders) -> None:
    checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
    assert [checkpoint.expert(name).bytes_read for name in ("high_noise", "low_noise")] == [0, 0]


def _assert_refused(root: Path, damage: Callable[[Path], object], error: type[StoryMemError], message: str) -> None:
    open_checkpoint(root, "i2v")
    damage(root)
    with pytest.raises(error) as caught:
        open_checkpoint(root, "i2v")
    assert message.format(root=root) in str(caught.value)
    assert type(caught.value) is error


def test_a_native_config_may_leave_out_what_all_published_ones_leave_out(i2v_copy: Path) -> None:
    for folder in ("high_noise_model", "low_noise_model"):
        config = json.loads((i2v_copy / folder / "config.json").read_text())
        assert config["text_dim"] == 32
        del config["text_dim"], config["patch_size"], config["text_len"]
        (i2v_copy / folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"text_embedding.0.weight has shape .* asks for \[64, 4096\]"):
        open_checkpoint(i2v_copy, "i2v")
