"""The prompts of a job are encoded once, by as few encoders as needed, on one rank or several."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from storymem_dist.artifacts.prompt_cache import PromptCache
from storymem_dist.errors import WeightsNotFound
from storymem_dist.parallel.text import encode_prompts
from tests.helpers.ranks import run_ranks

PROMPTS = ["a fox", "a hare", "a bear", "an owl", "blurry, low quality"]


@dataclass(frozen=True)
class Place:
    rank: int = 0
    world_size: int = 1


class LengthEncoder:
    """Encodes a text as its length, and remembers what it was given."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.itself = self  # a cycle, as modules have

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        self.encoded += texts
        return [torch.full((len(text), 4), float(len(text))) for text in texts]


def refuse_to_load() -> LengthEncoder:
    raise AssertionError("nothing is missing: no encoder is needed")


def test_every_prompt_is_encoded_once_and_a_second_job_loads_no_encoder(tmp_path: Path) -> None:
    cache, encoder = PromptCache(tmp_path, "e"), LengthEncoder()
    encode_prompts([*PROMPTS, "a fox", " a  fox "], cache, lambda: encoder, place=Place())
    assert encoder.encoded == PROMPTS
    for prompt in PROMPTS:
        assert cache.find(prompt) is not None
    encode_prompts(PROMPTS, cache, refuse_to_load, place=Place())


def test_a_damaged_entry_alone_is_encoded_again(tmp_path: Path) -> None:
    cache, encoder = PromptCache(tmp_path, "e"), LengthEncoder()
    encode_prompts(PROMPTS, cache, LengthEncoder, place=Place())
    cache.path("a hare").write_bytes(b"not an entry")
    encode_prompts(PROMPTS, cache, lambda: encoder, place=Place())
    assert encoder.encoded == ["a hare"]
    assert cache.find("a hare") is not None


def test_the_encoder_is_gone_when_the_prompts_are_encoded(tmp_path: Path) -> None:
    loaded: list[weakref.ref[LengthEncoder]] = []

    def load() -> LengthEncoder:
        encoder = LengthEncoder()
        loaded.append(weakref.ref(encoder))
        return encoder

    encode_prompts(PROMPTS, PromptCache(tmp_path, "e"), load, place=Place())
    assert [reference() for reference in loaded] == [None]


def test_progress_counts_the_prompts_that_were_missing(tmp_path: Path) -> None:
    cache, progress = PromptCache(tmp_path, "e"), []
    encode_prompts(PROMPTS[:2], cache, LengthEncoder, place=Place())
    encode_prompts(
        PROMPTS, cache, LengthEncoder, place=Place(), on_progress=lambda done, total: progress.append((done, total))
    )
    assert progress == [(1, 3), (2, 3), (3, 3)]


def encode_on_ranks(folder: Path, num_prompts: int, min_prompts_per_rank: int) -> tuple[list[str], int]:
    dist.init_process_group("gloo")
    encoder, num_loads = LengthEncoder(), 0

    def load() -> LengthEncoder:
        nonlocal num_loads
        num_loads += 1
        return encoder

    cache = PromptCache(folder, "e")
    prompts = [f"prompt {index}" for index in range(num_prompts)]
    place = Place(dist.get_rank(), dist.get_world_size())
    encode_prompts(prompts, cache, load, place=place, min_prompts_per_rank=min_prompts_per_rank)
    assert all(cache.find(prompt) is not None for prompt in prompts), "all entries are there when the call returns"
    return encoder.encoded, num_loads


def test_missing_prompts_are_spread_evenly_and_each_is_encoded_by_one_rank(tmp_path: Path) -> None:
    PromptCache(tmp_path, "e").store("prompt 3", torch.zeros(1, 4))
    results = run_ranks(encode_on_ranks, 3, args=(tmp_path, 8, 1))
    encoded = [prompt for prompts, _ in results for prompt in prompts]
    assert sorted(encoded) == sorted(f"prompt {index}" for index in range(8) if index != 3)
    assert sorted(len(prompts) for prompts, _ in results) == [2, 2, 3]


def test_no_more_ranks_load_the_encoder_than_have_enough_to_do(tmp_path: Path) -> None:
    results = run_ranks(encode_on_ranks, 3, args=(tmp_path, 5, 3))
    assert [num_loads for _, num_loads in results] == [1, 1, 0]
    assert sorted(len(prompts) for prompts, _ in results) == [0, 2, 3]


def fail_on_one_rank(folder: Path) -> str:
    dist.init_process_group("gloo")

    def load() -> LengthEncoder:
        if dist.get_rank() == 1:
            raise WeightsNotFound("t5.pth: no text encoder here")
        return LengthEncoder()

    place = Place(dist.get_rank(), dist.get_world_size())
    with pytest.raises(WeightsNotFound) as caught:
        encode_prompts(PROMPTS, PromptCache(folder, "e"), load, place=place, min_prompts_per_rank=1)
    return str(caught.value)


def test_when_one_rank_cannot_load_the_encoder_every_rank_says_why(tmp_path: Path) -> None:
    assert run_ranks(fail_on_one_rank, 3, args=(tmp_path,)) == ["t5.pth: no text encoder here"] * 3
