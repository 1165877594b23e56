"""Weights in the packagings that people have on disk: each means what it says."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.errors import CheckpointError
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.weights.checkpoints import WanCheckpoint, dit_shapes, open_checkpoint
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.lora import storymem_lora
from storymem_dist.weights.single_files import CheckpointFiles, config_from_shapes
from storymem_dist.weights.text_encoder import load_text_encoder, text_encoder_bytes
from storymem_dist.weights.tiny_checkpoint import ModelFolders
from storymem_dist.weights.vae import load_vae
from tests.helpers import packagings
from tests.helpers.checkpoints import write_diffusers_layout
from tests.helpers.packagings import E4M3, E5M2, EXPERT_FOLDERS, Tensors, expert_tensors

EXPERTS = tuple(EXPERT_FOLDERS)


def loaded(checkpoint: WanCheckpoint, expert: str, linears: str = "exact", loras: tuple = ()) -> dict[str, Tensor]:
    with torch.device("meta"):
        dit = WanDiT(checkpoint.dit_config, dtype=torch.float32)
    quantize_linears(dit.blocks, linears)
    dit.to_empty(device="cpu")
    load_dit_weights(dit, checkpoint.expert(expert), loras)
    return dict(dit.named_parameters())


def assert_means(checkpoint: WanCheckpoint, meaning: dict[str, Tensors]) -> None:
    for expert in EXPERTS:
        found = loaded(checkpoint, expert)
        assert found.keys() == meaning[expert].keys()
        for key, value in found.items():
            assert torch.equal(value, meaning[expert][key].float()), key


PACKAGINGS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "fp16": (packagings.cast(torch.float16), ""),
    "bf16 with a prefix": (packagings.cast(torch.bfloat16), "model.diffusion_model."),
    "fp8": (packagings.unscaled(E4M3), ""),
    "fp8 e5m2 with a prefix": (packagings.unscaled(E5M2), "diffusion_model."),
    "fp8_scaled": (packagings.scaled(), ""),
    "fp8_scaled with a prefix": (packagings.scaled(), "model.diffusion_model."),
    "fp8_scaled e5m2": (packagings.scaled(E5M2), ""),
    "scales per row": (packagings.scaled(name="weight_scale", by_row=True, marker=False), ""),
    "int8 with scales per row": (packagings.scaled(torch.int8, name="weight_scale", by_row=True, marker=False), ""),
}


@pytest.mark.parametrize("name", PACKAGINGS)
def test_a_file_in_a_native_folder_means_what_it_says(tiny: ModelFolders, tmp_path: Path, name: str) -> None:
    change, prefix = PACKAGINGS[name]
    stored = packagings.in_native_folder(tiny.t2v_dir, tmp_path / "t2v", change, prefix)
    meaning = {expert: packagings.as_numbers(stored[expert]) for expert in EXPERTS}
    assert_means(open_checkpoint(tmp_path / "t2v", "t2v"), meaning)


@pytest.mark.parametrize("name", PACKAGINGS)
def test_a_models_folder_of_comfyui_is_a_checkpoint(tiny: ModelFolders, tmp_path: Path, name: str) -> None:
    change, prefix = PACKAGINGS[name]
    stored = packagings.comfyui_models(tiny.t2v_dir, tmp_path, change, prefix=prefix)
    packagings.comfyui_models(tiny.i2v_dir, tmp_path, change, "i2v", prefix)
    checkpoint = open_checkpoint(tmp_path, "t2v")
    assert_means(checkpoint, {expert: packagings.as_numbers(stored[expert]) for expert in EXPERTS})
    assert checkpoint.layout == "single files"
    assert open_checkpoint(tmp_path, "i2v").dit_config.in_dim == 36
    native = open_checkpoint(tiny.t2v_dir, "t2v")
    pixels = torch.rand(3, 5, 16, 16) * 2 - 1
    assert torch.equal(load_vae(native.vae_path).encode(pixels), load_vae(checkpoint.vae_path).encode(pixels))
    texts = [load_text_encoder(one, dtype=torch.float32).encode(["a boat"])[0] for one in (native, checkpoint)]
    assert torch.equal(*texts)


def test_rows_are_read_and_scaled_alone(tiny: ModelFolders, tmp_path: Path) -> None:
    by_row = packagings.scaled(name="weight_scale", by_row=True)
    packagings.in_native_folder(tiny.t2v_dir, tmp_path / "t2v", by_row)
    source = open_checkpoint(tmp_path / "t2v", "t2v").expert("high_noise")
    key, before = "blocks.1.ffn.0.weight", source.bytes_read
    rows = source.read(key, slice(40, 72))
    assert source.bytes_read - before == 32 * 64 + 32 * 4
    assert torch.equal(rows, source.read(key)[40:72])
    assert source.dtype(key) == torch.float32


@pytest.mark.float8
@pytest.mark.parametrize("by_row", [False, True])
def test_float8_layers_keep_stored_values_without_rounding_them_again(
    tiny: ModelFolders, tmp_path: Path, by_row: bool
) -> None:
    stored = packagings.in_native_folder(tiny.t2v_dir, tmp_path / "t2v", packagings.scaled(by_row=by_row))["high_noise"]
    checkpoint = open_checkpoint(tmp_path / "t2v", "t2v")
    found = loaded(checkpoint, "high_noise", linears="float8")
    for key in (key for key, value in stored.items() if value.dtype == E4M3 and key != "scaled_fp8"):
        scale = stored[key.replace(".weight", ".scale_weight")].flatten()
        assert torch.equal(found[key].view(torch.uint8), stored[key].view(torch.uint8)), key
        assert torch.equal(found[key.replace(".weight", ".row_scale")], scale.expand(len(found[key]))), key


def test_int8_layers_keep_stored_values_too(tiny: ModelFolders, tmp_path: Path) -> None:
    change = packagings.scaled(torch.int8, name="weight_scale", by_row=True, marker=False)
    stored = packagings.in_native_folder(tiny.t2v_dir, tmp_path / "t2v", change)["low_noise"]
    found = loaded(open_checkpoint(tmp_path / "t2v", "t2v"), "low_noise", linears="int8")
    for key in (key for key, value in stored.items() if value.dtype == torch.int8):
        assert torch.equal(found[key], stored[key]), key
        row_scale = found[key.replace(".weight", ".row_scale")]
        assert torch.equal(row_scale, stored[key.replace(".weight", ".weight_scale")].flatten()), key


@pytest.mark.float8
def test_a_lora_is_merged_before_float8_layers_are_rounded(tiny: ModelFolders, tmp_path: Path) -> None:
    packagings.in_native_folder(tiny.i2v_dir, tmp_path / "i2v", packagings.scaled())
    checkpoint, lora = open_checkpoint(tmp_path / "i2v", "i2v"), storymem_lora(tiny.lora_dir, "mi2v")["high_noise"]
    exact = loaded(checkpoint, "high_noise", loras=(lora,))
    found = loaded(checkpoint, "high_noise", "float8", (lora,))
    key = "blocks.0.self_attn.q.weight"
    values = found[key].float() * found["blocks.0.self_attn.q.row_scale"][:, None]
    largest = exact[key].abs().amax(1, keepdim=True)
    assert ((values - exact[key]).abs() <= torch.maximum(exact[key].abs() * 2**-4, largest * 2**-15)).all()


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_gguf_means_what_its_package_says(tiny: ModelFolders, tmp_path: Path, quantization: str) -> None:
    meaning = {}
    for expert in EXPERTS:
        file = tmp_path / f"Wan2.2-T2V-A14B-{expert.title().replace('_N', 'N')}-{quantization}.gguf"
        tensors = expert_tensors(tiny.t2v_dir, expert)
        meaning[expert] = packagings.write_gguf(file, tensors, quantization, reshaped=expert == "low_noise")
    shutil.copytree(tiny.t2v_dir / "google", tmp_path / "google")
    for part in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        shutil.copy(tiny.t2v_dir / part, tmp_path)
    shutil.copy(tiny.t2v_dir / "high_noise_model/config.json", tmp_path)
    checkpoint = open_checkpoint(tmp_path, "t2v")
    assert_means(checkpoint, meaning)
    source, key = checkpoint.expert("high_noise"), "blocks.0.ffn.0.weight"
    assert torch.equal(source.read(key, slice(3, 90)), source.read(key)[3:90])
    assert source.shape("patch_embedding.weight") == (64, 16, 1, 2, 2)


def test_files_may_be_named_one_by_one(tiny: ModelFolders, tmp_path: Path) -> None:
    packagings.comfyui_models(tiny.t2v_dir, tmp_path / "models", packagings.cast(torch.bfloat16))
    models, renamed = tmp_path / "models", tmp_path / "elsewhere"
    renamed.mkdir()
    shutil.copy(models / "diffusion_models/wan/config.json", renamed)
    for expert, name in zip(EXPERTS, "ab", strict=True):
        next(models.rglob(f"*{expert}*.safetensors")).rename(renamed / f"{name}.safetensors")
    files = CheckpointFiles(
        high_noise=renamed / "a.safetensors",
        low_noise=renamed / "b.safetensors",
        vae=models / "vae/wan_2.1_vae.safetensors",
        text_encoder=models / "text_encoders/umt5_xxl_fp16.safetensors",
        tokenizer=models / "text_encoders/umt5-xxl",
    )
    found = open_checkpoint(None, "t2v", files)
    for expert in EXPERTS:
        expected = expert_tensors(tiny.t2v_dir, expert)
        assert all(torch.equal(v, expected[k].bfloat16().float()) for k, v in loaded(found, expert).items())
    swapped = CheckpointFiles(**files.given() | {"high_noise": files.low_noise, "low_noise": files.high_noise})
    assert open_checkpoint(None, "t2v", swapped).identity != found.identity
    (renamed / "a.safetensors").rename(renamed / "c.safetensors")
    moved = CheckpointFiles(**files.given() | {"high_noise": renamed / "c.safetensors"})
    assert open_checkpoint(None, "t2v", moved).identity == found.identity, "content counts, names do not"


def test_experts_that_are_named_may_replace_those_of_a_native_folder(tiny: ModelFolders, tmp_path: Path) -> None:
    packagings.comfyui_models(tiny.t2v_dir, tmp_path, packagings.cast(torch.float16))
    (tmp_path / "diffusion_models/wan/config.json").unlink()
    experts = {expert: next(tmp_path.rglob(f"*{expert}*.safetensors")) for expert in EXPERTS}
    found = open_checkpoint(tiny.t2v_dir, "t2v", CheckpointFiles(**experts))
    assert found.dit_config == open_checkpoint(tiny.t2v_dir, "t2v").dit_config
    assert found.vae_path == tiny.t2v_dir / "Wan2.1_VAE.pth"
    for expert in EXPERTS:
        expected = expert_tensors(tiny.t2v_dir, expert)
        assert all(torch.equal(value, expected[key].half().float()) for key, value in loaded(found, expert).items())


def test_the_sizes_of_a14b_follow_from_a_file_alone(tiny: ModelFolders) -> None:
    for config in (WAN22_A14B.t2v, WAN22_A14B.i2v):
        assert config_from_shapes(dit_shapes(config), "a file") == config
    with pytest.raises(CheckpointError, match=r"put the model's config\.json next to the file"):
        config_from_shapes(dit_shapes(open_checkpoint(tiny.t2v_dir, "t2v").dit_config), "a file")


@pytest.mark.parametrize("scaled", [False, True])
def test_text_encoder_and_vae_of_a_native_folder_may_be_safetensors(
    tiny: ModelFolders, tmp_path: Path, scaled: bool
) -> None:
    root = shutil.copytree(tiny.t2v_dir, tmp_path / "t2v")
    encoder = torch.load(root / "models_t5_umt5-xxl-enc-bf16.pth")
    save_file(packagings.vae_tensors(root), root / "Wan2.1_VAE.safetensors")
    encoder = packagings.scaled_text_encoder(root) if scaled else encoder
    save_file({key: value.contiguous() for key, value in encoder.items()}, root / "umt5.safetensors")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (root / name).unlink()
    native, checkpoint = open_checkpoint(tiny.t2v_dir, "t2v"), open_checkpoint(root, "t2v")
    pixels = torch.rand(3, 5, 16, 16) * 2 - 1
    assert torch.equal(load_vae(native.vae_path).encode(pixels), load_vae(checkpoint.vae_path).encode(pixels))
    expected, found = (
        load_text_encoder(one, dtype=torch.float32).encode(["a boat"])[0] for one in (native, checkpoint)
    )
    needed, on_disk = text_encoder_bytes(checkpoint, torch.bfloat16), text_encoder_bytes(native, torch.bfloat16)
    assert needed == pytest.approx(on_disk, rel=0.2), "8-bit files take 16 bits in memory"
    if scaled:
        error = (found - expected).norm() / expected.norm()
        assert 0 < error < 0.1
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("prefix", ["model.", "first_stage_model."])
def test_a_vae_file_may_have_a_prefix_and_16_bits(tiny: ModelFolders, tmp_path: Path, prefix: str) -> None:
    weights = packagings.vae_tensors(tiny.t2v_dir)
    save_file(packagings.prefixed(prefix, packagings.cast(torch.bfloat16)(weights)), tmp_path / "vae.safetensors")
    torch.save(packagings.cast(torch.bfloat16)(weights), tmp_path / "vae.pth")
    pixels = torch.rand(3, 1, 16, 16)
    assert torch.equal(*(load_vae(tmp_path / f"vae.{end}").encode(pixels) for end in ("safetensors", "pth")))


def fp16_variant(folder: Path, name: str) -> None:
    """Rename the files of a folder of diffusers as its variant ``fp16`` has them."""
    for file in sorted(folder.glob(f"{name}*.safetensors")):
        file.rename(folder / file.name.replace(name, f"{name}.fp16"))
    index = folder / f"{name}.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace(f"{name}-", f"{name}.fp16-")
        index.unlink()
        (folder / f"{name}.safetensors.index.fp16.json").write_text(text)


def test_a_variant_of_a_diffusers_folder_is_read(tiny: ModelFolders, tmp_path: Path) -> None:
    root = write_diffusers_layout(tiny.t2v_dir, "t2v", tmp_path / "diffusers")
    expected = loaded(open_checkpoint(root, "t2v"), "low_noise")
    for folder in ("transformer", "transformer_2", "vae"):
        fp16_variant(root / folder, "diffusion_pytorch_model")
    fp16_variant(root / "text_encoder", "model")
    checkpoint = open_checkpoint(root, "t2v")
    assert all(torch.equal(value, expected[key]) for key, value in loaded(checkpoint, "low_noise").items())
    assert load_vae(checkpoint.vae_path).encode(torch.zeros(3, 1, 16, 16)).shape == (16, 1, 2, 2)
    assert load_text_encoder(checkpoint).encode(["a boat"])[0].shape[1] == 32
