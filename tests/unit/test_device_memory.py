"""What torch's allocators do on a GPU, set in one place before CUDA starts; and what is free on a device."""

from types import SimpleNamespace

import pytest
import torch

from storymem_dist.hardware import ALLOCATOR_VARIABLES, free_device_memory_bytes, set_allocator_defaults
from storymem_dist.parallel.session import choose_device

BOTH = "expandable_segments:True,pinned_max_round_threshold_mb:1"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that sets the allocators or starts CUDA, in order; no variable is set."""
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", calls.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"start {device}"))
    return calls


def test_every_way_to_start_sets_the_allocators_before_cuda(calls: list[str]) -> None:
    assert choose_device("auto", local_rank=0) == torch.device("cuda", 0)
    assert calls == [BOTH, "start cuda:0"]


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_a_variable_of_the_user_stays_as_it_is(calls: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    choose_device("cuda", local_rank=0)
    assert calls == ["start cuda:0"]


def test_a_cpu_needs_no_allocator(calls: list[str]) -> None:
    choose_device("cpu", local_rank=0)
    assert calls == []


def test_a_setting_that_torch_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    def refuse(settings: str) -> None:
        calls.append(settings)
        if "pinned_max_round" in settings:
            raise RuntimeError("Unrecognized key 'pinned_max_round_threshold_mb' in allocator config")

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", refuse, raising=False)
    set_allocator_defaults()
    assert calls == [BOTH, "expandable_segments:True"]


def test_a_torch_with_the_older_function_is_set_by_that(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings", raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", calls.append, raising=False)
    set_allocator_defaults()
    assert calls == [BOTH]


def test_free_is_what_no_process_holds_and_what_this_one_holds_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        mem_get_info=lambda device: (5000, 24_000),  # another process holds most of it
        memory_reserved=lambda device: 900,
        memory_allocated=lambda device: 200,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    assert free_device_memory_bytes(torch.device("cuda", 0)) == 5700
    assert free_device_memory_bytes(torch.device("cpu")) is None
