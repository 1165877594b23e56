"""Packagings that lack something, cannot be told apart or are of another format: refused with the way out."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from storymem_dist.errors import CheckpointError, StoryMemError, WeightsNotFound
from storymem_dist.weights.checkpoints import ModelFolders, open_checkpoint
from storymem_dist.weights.inspection import inspect_weights
from storymem_dist.weights.single_files import CheckpointFiles
from storymem_dist.weights.text_encoder import load_text_encoder
from tests.helpers import packagings
from tests.helpers.packagings import E4M3, EXPERT_FOLDERS, Tensors, expert_tensors


def native_with(change: Callable[[Tensors], Tensors]) -> Callable[[ModelFolders, Path], Path]:
    def make(tiny: ModelFolders, root: Path) -> Path:
        packagings.in_native_folder(tiny.t2v_dir, root / "t2v", change)
        return root / "t2v"

    return make


def comfyui_with(change: Callable[[Path], object]) -> Callable[[ModelFolders, Path], Path]:
    def make(tiny: ModelFolders, root: Path) -> Path:
        packagings.comfyui_models(tiny.t2v_dir, root, packagings.cast(torch.float16))
        change(root)
        return root

    return make


def without_a_scale(tensors: Tensors) -> Tensors:
    stored = packagings.scaled()(tensors)
    del stored["blocks.1.ffn.0.scale_weight"]
    return stored


def without_scales(tensors: Tensors) -> Tensors:
    return packagings.unscaled(E4M3)(tensors) | {"scaled_fp8": torch.empty(2, dtype=E4M3)}


def in_blocks(tensors: Tensors) -> Tensors:
    stored = packagings.scaled()(tensors)
    stored["blocks.0.ffn.0.scale_weight"] = torch.ones(4, 2)
    return stored


def packed(tensors: Tensors) -> Tensors:
    return tensors | {"blocks.0.ffn.0.weight": torch.zeros(128, 32, dtype=torch.uint8)}


def nvfp4(tensors: Tensors) -> Tensors:
    text = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    return tensors | {"blocks.0.ffn.0.comfy_quant": text}


def remove(pattern: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in list(root.rglob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in list(root.rglob(f"*{old}*.safetensors")):
            path.rename(path.with_name(path.name.replace(old, new)))

    return change


def same_experts(root: Path) -> None:
    high = next(root.rglob("*high_noise*.safetensors"))
    shutil.copy(high, high.with_name(high.name.replace("high", "low")))


def second_file(part: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = next(root.rglob(f"*{part}*.safetensors"))
        tensors = load_file(file)
        save_file(packagings.cast(torch.float32)(tensors), file.with_name("another_" + file.name))

    return change


def truncated_expert(root: Path) -> None:
    file = next(root.rglob("*low_noise*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def gguf_file(tiny: ModelFolders, root: Path) -> Path:
    (root / "wan2.2_t2v_high_noise_14B_Q8_0.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(64))
    return root / "wan2.2_t2v_high_noise_14B_Q8_0.gguf"


def damaged_gguf(tiny: ModelFolders, root: Path) -> Path:
    path = comfyui_with(remove("*low_noise*"))(tiny, root)
    (root / "wan2.2_t2v_low_noise.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\x09" * 64)
    return path


def gguf_text_encoder(tiny: ModelFolders, root: Path) -> Path:
    path = comfyui_with(remove("umt5_xxl*.safetensors"))(tiny, root)
    packagings.write_gguf(root / "umt5-xxl-encoder-Q8_0.gguf", {"enc.blk.0.attn_q.weight": torch.zeros(32, 32)}, "Q8_0")
    return path


def two_tokenizers(root: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(root / "text_encoders/umt5-xxl", root / "text_encoders" / name)
    shutil.rmtree(root / "text_encoders/umt5-xxl")


def animate(root: Path) -> None:
    for file in list(root.rglob("*_noise_14B*.safetensors")):
        save_file(load_file(file) | {"face_adapter.fuser_blocks.0.linear1_q.bias": torch.zeros(2)}, file)


def lora_as_expert(tiny: ModelFolders, root: Path) -> Path:
    path = shutil.copytree(tiny.t2v_dir, root / "t2v")
    for file in [*path.glob("high_noise_model/*.safetensors"), *path.glob("high_noise_model/*.index.json")]:
        file.unlink()
    halves = {"lora_down": torch.zeros(4, 64), "lora_up": torch.zeros(64, 4)}
    lora = {f"diffusion_model.blocks.0.self_attn.q.{name}.weight": half for name, half in halves.items()}
    save_file(lora, path / "high_noise_model/lightning_HIGH.safetensors")
    return path


def hub_cache(tiny: ModelFolders, root: Path) -> Path:
    shutil.copytree(tiny.t2v_dir, root / "models--Wan-AI--Wan2.2-T2V-A14B/snapshots/0123abc")
    (root / "models--Wan-AI--Wan2.2-T2V-A14B/blobs").mkdir()
    return root / "models--Wan-AI--Wan2.2-T2V-A14B"


def one_file(tiny: ModelFolders, root: Path) -> Path:
    save_file({"x": torch.zeros(1)}, root / "one.safetensors")
    return root / "one.safetensors"


REFUSALS: dict[str, tuple[Callable[[ModelFolders, Path], Path], str, str]] = {
    "a scale is missing": (native_with(without_a_scale), "without the scales of: blocks.1.ffn.0.weight", "fp8_scaled"),
    "a marker without scales": (native_with(without_scales), "without the scales of: blocks.", "fp8_scaled file"),
    "scales of blocks": (native_with(in_blocks), "blocks.0.ffn.0.scale_weight is float32 of shape [4, 2]", "per row"),
    "packed in uint8": (native_with(packed), "an 8-bit file (uint8) without the scales", "use a bf16, fp16"),
    "nvfp4": (native_with(nvfp4), "blocks.0.ffn.0 is stored as nvfp4, which is not read", "use a bf16, fp16"),
    "one file": (one_file, "a single file, and a base model has two experts", "model.t2v_high_noise=FILE"),
    "one gguf file": (gguf_file, "a single file, and a base model has two experts", "model.t2v_low_noise=FILE"),
    "a damaged gguf": (damaged_gguf, "wan2.2_t2v_low_noise.gguf: a GGUF file that is damaged", "truncated"),
    "a cache folder": (hub_cache, "a folder of Hugging Face's cache", "snapshots/0123abc"),
    "a gguf text encoder": (
        gguf_text_encoder,
        "umt5-xxl-encoder-Q8_0.gguf: a text encoder as GGUF",
        ".safetensors file",
    ),
    "no text encoder": (comfyui_with(remove("umt5_xxl*")), "no text encoder there", "--include 'models_t5*'"),
    "two tokenizers": (comfyui_with(two_tokenizers), "2 folders could be the tokenizer", "model.tokenizer=FOLDER"),
    "Animate alone": (comfyui_with(animate), "(in_dim 16: an Animate model)", "get one with"),
    "a LoRA as an expert": (lora_as_expert, "not a transformer, but a LoRA", "model.loras"),
    "one expert": (comfyui_with(remove("*low_noise*")), "the low-noise expert of T2V is missing", "model.t2v_high"),
    "experts of no name": (
        comfyui_with(lambda root: [rename("high_noise", "a")(root), rename("low_noise", "b")(root)]),
        "is the high-noise or the low-noise expert, only its name could say",
        "model.t2v_high_noise=FILE",
    ),
    "the same twice": (comfyui_with(same_experts), "both experts are the same file", "a low-noise one"),
    "two of one expert": (comfyui_with(second_file("high_noise")), "2 files could be the high-noise", "say which with"),
    "two text encoders": (
        comfyui_with(second_file("umt5")),
        "2 files could be the text encoder",
        "model.text_encoder=",
    ),
    "two VAEs": (comfyui_with(second_file("vae")), "2 files could be the VAE", "model.vae=FILE"),
    "no VAE": (comfyui_with(remove("wan_2.1_vae*")), "no VAE there", "--include 'Wan2.1_VAE.pth'"),
    "no tokenizer": (comfyui_with(remove("umt5-xxl")), "no tokenizer there; set model.tokenizer", "'google/*'"),
    "no sizes": (comfyui_with(remove("config.json")), "how many attention heads", "put the model's config.json next"),
    "a truncated expert": (comfyui_with(truncated_expert), "safetensors: truncated", "download it again"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_refusal_names_the_fault_and_the_way_out(tiny: ModelFolders, tmp_path: Path, case: str) -> None:
    make, says, way_out = REFUSALS[case]
    with pytest.raises(StoryMemError) as refusal:
        open_checkpoint(make(tiny, tmp_path), "t2v")
    assert says in str(refusal.value) and way_out in str(refusal.value)


def test_names_with_high_and_low_alone_are_enough(tiny: ModelFolders, tmp_path: Path) -> None:
    root = comfyui_with(rename("_noise", ""))(tiny, tmp_path)
    assert "_high_" in open_checkpoint(root, "t2v").expert("high_noise").name


def test_the_other_kind_is_refused_with_what_is_there(tiny: ModelFolders, tmp_path: Path) -> None:
    root = comfyui_with(lambda root: None)(tiny, tmp_path)
    with pytest.raises(CheckpointError, match=r"no I2V transformer \(in_dim 36\); there are: wan2.2_t2v_.*16: T2V"):
        open_checkpoint(root, "i2v")
    files = {name: next(root.rglob(f"*{name}*.safetensors")) for name in EXPERT_FOLDERS}
    with pytest.raises(CheckpointError, match=r"these are T2V weights \(in_dim 16\); here I2V weights are needed"):
        open_checkpoint(root, "i2v", CheckpointFiles(**files))
    with pytest.raises(WeightsNotFound, match=r"neither a folder nor the files of both experts are given"):
        open_checkpoint(None, "t2v")
    with pytest.raises(StoryMemError, match=r"model.t2v_high_noise is set without model.t2v_low_noise"):
        open_checkpoint(root, "t2v", CheckpointFiles(high_noise=files["high_noise"]))
    with pytest.raises(WeightsNotFound, match=r"model.vae=.*nowhere: no such file"):
        open_checkpoint(root, "t2v", CheckpointFiles(vae=root / "nowhere"))
    with pytest.raises(CheckpointError, match=r"not the VAE of Wan2.2-A14B, but a text encoder; set model.vae"):
        open_checkpoint(root, "t2v", CheckpointFiles(vae=root / "text_encoders/umt5_xxl_fp16.safetensors"))


def test_gguf_without_its_package_names_the_command(
    tiny: ModelFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = comfyui_with(remove("*low_noise*"))(tiny, tmp_path)
    packagings.write_gguf(root / "wan2.2_t2v_low_noise_Q8_0.gguf", expert_tensors(tiny.t2v_dir, "low_noise"), "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"not installed: pip install 'storymem_dist\[gguf\]'"):
        open_checkpoint(root, "t2v")


def foreign_tokenizer(folder: Path, num_tokens: int = 500, end: str = "<|im_end|>") -> Path:
    """The tokenizer of a language model, as other programs keep it in the same models folder."""
    folder.mkdir(parents=True)
    vocabulary = {"t0": 0, end: 1} | {f"t{number}": number for number in range(2, num_tokens)}
    Tokenizer(BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": "t0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_files_of_other_models_next_to_ours_are_left_alone(tiny: ModelFolders, tmp_path: Path) -> None:
    packagings.comfyui_models(tiny.t2v_dir, tmp_path, packagings.cast(torch.float16))
    expected = open_checkpoint(tmp_path, "t2v")
    foreign_tokenizer(tmp_path / "LLM")
    hunyuan = {"encoder.conv_in.conv.weight": (8, 3, 3, 3, 3), "post_quant_conv.weight": (16, 16, 1, 1, 1)}
    save_file(
        {key: torch.zeros(shape) for key, shape in hunyuan.items()}, tmp_path / "vae/hunyuan_video_vae.safetensors"
    )
    (tmp_path / "loras/style_HIGH.safetensors").write_bytes(bytes(30))
    s2v = expert_tensors(tiny.t2v_dir, "high_noise") | {"casual_audio_encoder.weights": torch.zeros(2)}
    save_file(s2v, tmp_path / "diffusion_models/wan2.2_s2v_14B_high_noise.safetensors")
    assert open_checkpoint(tmp_path, "t2v").identity == expected.identity


@pytest.mark.parametrize(
    ("num_tokens", "end", "says"),
    [
        (500, "<|im_end|>", "texts end with '<|im_end|>'"),
        (60, "</s>", "60 tokens, but"),
        (600, "</s>", "600 tokens, but"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(
    tiny: ModelFolders, tmp_path: Path, num_tokens: int, end: str, says: str
) -> None:
    folder = foreign_tokenizer(tmp_path / "another", num_tokens, end)
    checkpoint = open_checkpoint(tiny.t2v_dir, "t2v", CheckpointFiles(tokenizer=folder))
    with pytest.raises(CheckpointError) as refusal:
        load_text_encoder(checkpoint)
    assert says in str(refusal.value) and "model.tokenizer=FOLDER" in str(refusal.value)


def test_parts_may_be_named_by_their_folder(tiny: ModelFolders, tmp_path: Path) -> None:
    packagings.comfyui_models(tiny.t2v_dir, tmp_path, packagings.cast(torch.float16))
    folders = CheckpointFiles(vae=tmp_path / "vae", text_encoder=tmp_path / "text_encoders")
    assert open_checkpoint(tmp_path, "t2v", folders).vae_path == tmp_path / "vae/wan_2.1_vae.safetensors"
    with pytest.raises(CheckpointError, match=r"loras: a folder without the VAE .* set model\.vae=FILE"):
        open_checkpoint(tmp_path, "t2v", CheckpointFiles(vae=tmp_path / "loras"))
    tokenizer = tmp_path / "text_encoders/umt5-xxl/tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a file; the tokenizer is the folder that holds it"):
        open_checkpoint(tmp_path, "t2v", CheckpointFiles(tokenizer=tokenizer))


@pytest.mark.parametrize("role", ["transformer", "text encoder"])
def test_scales_do_not_make_a_model_a_lora(tiny: ModelFolders, tmp_path: Path, role: str) -> None:
    encoder = packagings.scaled_text_encoder(tiny.t2v_dir)
    tensors = encoder if role == "text encoder" else packagings.scaled()(expert_tensors(tiny.t2v_dir, "high_noise"))
    save_file(tensors, tmp_path / "x.safetensors")
    assert role in inspect_weights(tmp_path / "x.safetensors")["what"]


def test_a_native_folder_needs_no_config_of_files_that_tell_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: ModelFolders
) -> None:
    packagings.in_native_folder(tiny.t2v_dir, tmp_path / "t2v", packagings.cast(torch.float16))
    for file in (tmp_path / "t2v").glob("*/config.json"):
        file.unlink()
    monkeypatch.setattr("storymem_dist.weights.single_files._HEAD_DIM", 16)
    assert open_checkpoint(tmp_path / "t2v", "t2v").dit_config == open_checkpoint(tiny.t2v_dir, "t2v").dit_config
