"""Prompt embeddings on disk: found by content, complete or not at all."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storymem_dist.artifacts import prompt_cache
from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.errors import MachineError
from storymem_dist.weights.text_encoder import text_encoder_identity


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "prompts", "encoder-1")


def embeds(dtype: torch.dtype = torch.bfloat16, fill: float = 0.5) -> Tensor:
    return torch.full((7, 12), fill, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_entry_comes_back_bit_by_bit(cache: PromptCache, dtype: torch.dtype) -> None:
    stored = torch.randn(7, 12).to(dtype)
    cache.store("A fox.", stored.t().contiguous().t())
    found = cache.find("A fox.")
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, stored)


def test_a_prompt_that_was_never_stored_is_missing(cache: PromptCache) -> None:
    assert cache.find("A fox.") is None


def test_prompts_that_clean_to_the_same_text_share_an_entry(cache: PromptCache) -> None:
    cache.store("A fox &amp; a hare", embeds())
    assert cache.find("  A fox &\n a hare ") is not None
    assert cache.find("A fox & a bear") is None


def test_entries_of_another_encoder_are_not_found(cache: PromptCache, tmp_path: Path) -> None:
    cache.store("A fox.", embeds())
    assert PromptCache(tmp_path / "prompts", "encoder-2").find("A fox.") is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_huge(path: Path) -> None:
    os.truncate(path, 2**30)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, make_a_pipe, make_huge])
def test_a_damaged_entry_counts_as_missing_and_can_be_written_again(
    cache: PromptCache, damage, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store("A fox.", embeds())
    damage(cache.path("A fox."))
    assert cache.find("A fox.") is None
    assert "damaged" in caplog.text
    cache.store("A fox.", embeds())
    assert cache.find("A fox.") is not None


def test_a_write_that_fails_leaves_no_entry_and_no_litter(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(MachineError, match=r"cannot be written.*No space left"):
        cache.store("A fox.", embeds())
    monkeypatch.undo()
    assert cache.find("A fox.") is None
    assert list(cache.path("A fox.").parent.iterdir()) == []


def test_writers_and_readers_of_one_entry_never_see_half_a_file(cache: PromptCache) -> None:
    problems: list[str] = []

    def write(fill: float) -> None:
        for _ in range(20):
            cache.store("A fox.", embeds(fill=fill))

    def read() -> None:
        for _ in range(100):
            found = cache.find("A fox.")
            if found is None or found.unique().numel() != 1:
                problems.append("half an entry")

    cache.store("A fox.", embeds())
    threads = [threading.Thread(target=write, args=(fill,)) for fill in (1.0, 2.0)] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(list(cache.path("A fox.").parent.iterdir())) == 1


def test_a_found_embedding_does_not_change_with_the_file(cache: PromptCache) -> None:
    cache.store("A fox.", embeds(fill=1.0))
    found = cache.find("A fox.")
    with cache.path("A fox.").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff" * 4)
    assert torch.equal(found, embeds(fill=1.0))


@dataclass(frozen=True, kw_only=True)
class Files:
    text_encoder_path: Path
    tokenizer_path: Path


def encoder_files(root: Path) -> Files:
    tokenizer = root / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    (root / "t5.pth").write_bytes(bytes(3000))
    return Files(text_encoder_path=root / "t5.pth", tokenizer_path=tokenizer)


def test_equal_encoders_have_one_identity_wherever_they_are(tmp_path: Path) -> None:
    first, second = encoder_files(tmp_path / "t2v"), encoder_files(tmp_path / "i2v")
    assert text_encoder_identity(first, torch.bfloat16) == text_encoder_identity(second, torch.bfloat16)


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "dtype"])
def test_the_identity_changes_with_weights_tokenizer_and_number_format(tmp_path: Path, changed: str) -> None:
    files = encoder_files(tmp_path)
    before = text_encoder_identity(files, torch.bfloat16)
    if changed == "weights":
        files.text_encoder_path.write_bytes(bytes(2999) + b"\x01")
    elif changed == "tokenizer":
        (files.tokenizer_path / "added_tokens.json").write_text("{}")
    assert text_encoder_identity(files, torch.float32 if changed == "dtype" else torch.bfloat16) != before


def test_entries_of_an_older_format_are_not_found(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store("A fox.", embeds())
    monkeypatch.setattr(prompt_cache, "FORMAT_VERSION", prompt_cache.FORMAT_VERSION + 1)
    assert cache.find("A fox.") is None
