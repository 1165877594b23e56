"""The generated checkpoint: complete, reproducible, made once for any number of processes, numerically well behaved."""

import multiprocessing
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from storymem_dist.files import folder_identity
from storymem_dist.models.wan.presets import TINY
from storymem_dist.weights import tiny_checkpoint
from storymem_dist.weights.cached_folder import MANIFEST
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.lora import storymem_lora
from storymem_dist.weights.text_encoder import load_text_encoder
from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_checkpoint, generate_tiny_checkpoint
from storymem_dist.weights.vae import load_vae


def everything(root: Path) -> str:
    return folder_identity(root, [path for path in root.rglob("*") if path.is_file()])


def test_it_is_complete_and_small(tiny: ModelFolders) -> None:
    for kind, folder in (("t2v", tiny.t2v_dir), ("i2v", tiny.i2v_dir)):
        checkpoint = open_checkpoint(folder, kind)
        for mode in ("mi2v", "mm2v"):
            checkpoint.check_loras(list(storymem_lora(tiny.lora_dir, mode).values()))
        assert load_text_encoder(checkpoint).encode(["a boat"])[0].isfinite().all()
        assert len(list((folder / "high_noise_model").glob("*.safetensors"))) == 6
    root = tiny.t2v_dir.parent
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 8e6


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny: ModelFolders, tmp_path: Path) -> None:
    same = generate_tiny_checkpoint(tmp_path / "same", seed=0)
    other = generate_tiny_checkpoint(tmp_path / "other", seed=1)
    assert everything(same.t2v_dir.parent) == everything(tiny.t2v_dir.parent)
    assert open_checkpoint(other.i2v_dir, "i2v").identity != open_checkpoint(tiny.i2v_dir, "i2v").identity


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    generate_tiny_checkpoint(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    generate_tiny_checkpoint(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize("stale", ["seed", "version", "interrupted"])
def test_a_folder_that_is_not_the_wanted_one_is_replaced(tmp_path: Path, stale: str, tiny: ModelFolders) -> None:
    root = tmp_path / "tiny"
    if stale == "seed":
        generate_tiny_checkpoint(root, seed=5)
    else:
        generate_tiny_checkpoint(root)
        manifest = root / MANIFEST
        if stale == "version":
            manifest.write_text(manifest.read_text().replace('"format_version": 3', '"format_version": 0'))
        else:
            manifest.write_text("")
        (root / "left over").touch()
    checkpoint = generate_tiny_checkpoint(root)
    assert everything(root) == everything(tiny.t2v_dir.parent)
    assert open_checkpoint(checkpoint.t2v_dir, "t2v").kind == "t2v"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_checkpoint, "_write_lora", disk_full)
    with pytest.raises(OSError, match="No space left"):
        generate_tiny_checkpoint(tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]


def test_of_processes_that_ask_at_once_one_writes_and_all_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = tiny_checkpoint.generate_checkpoint

    def counted(root: Path, *args: object, **kwargs: object) -> Path:
        (tmp_path / f"call-{uuid.uuid4().hex}").touch()
        return generate(root, *args, **kwargs)

    monkeypatch.setattr(tiny_checkpoint, "generate_checkpoint", counted)
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(3), fork.Queue()

    def ask() -> None:
        barrier.wait()
        answers.put(open_checkpoint(generate_tiny_checkpoint(tmp_path / "tiny").i2v_dir, "i2v").identity)

    processes = [fork.Process(target=ask) for _ in range(3)]
    for process in processes:
        process.start()
    identities = {answers.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(identities) == 1
    assert len(list(tmp_path.glob("call-*"))) == 2  # one for each base model


def test_no_weight_is_zero_or_one_throughout(tiny: ModelFolders) -> None:
    for path in (tiny.i2v_dir / "high_noise_model").glob("*.safetensors"):
        for key, value in load_file(path).items():
            assert value.isfinite().all() and value.std() > 1e-3, key
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        for key, value in torch.load(tiny.i2v_dir / name, weights_only=True).items():
            assert value.isfinite().all() and value.float().std() > 1e-4, key


@pytest.mark.parametrize("seed", [0, 1])
def test_random_latents_decode_to_visible_noise_whatever_the_seed(tmp_path: Path, seed: int) -> None:
    root = generate_checkpoint(tmp_path / "x", TINY, "t2v", seed=seed)
    vae = load_vae(root / "Wan2.1_VAE.pth")
    latents = torch.randn(16, 4, 8, 12, generator=torch.Generator().manual_seed(99))
    pixels = vae.decode(latents)
    assert pixels.std() > 0.3
    assert (pixels.abs() == 1).float().mean() < 0.5
    assert pixels.mean().abs() < 0.7
    encoded = vae.encode(pixels)
    assert 0.3 < encoded.std() < 3


def test_the_tokenizer_reads_any_text_and_ends_it(tiny: ModelFolders) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.t2v_dir / "google" / "umt5-xxl")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == TINY.text_encoder.vocab_size
    for text in ("A wide shot of a harbour.", "色调艳丽，过曝，静态", "🎬 naïve"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("word " * 2000, truncation=True, max_length=512)["input_ids"]) == 512


def test_too_many_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be cut into 500 non-empty shards"):
        generate_checkpoint(tmp_path / "x", TINY, "t2v", num_shards=500)
