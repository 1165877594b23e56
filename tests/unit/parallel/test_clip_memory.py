"""A shot that no memory of this machine can hold is refused by its sizes, before anything is allocated."""

from dataclasses import replace

import pytest
import torch

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel import clip_memory
from storymem_dist.parallel.clip_memory import check_clip_memory
from storymem_dist.parallel.settings import ParallelSettings

A14B, CPU = WAN22_A14B.i2v, torch.device("cpu")


def check(monkeypatch: pytest.MonkeyPatch, sampler: SamplerSettings, *, gib: float, ranks: int = 1, **parallel) -> None:
    monkeypatch.setattr(clip_memory, "host_memory_bytes", lambda: int(gib * GIB))
    check_clip_memory(sampler, ParallelSettings(**parallel), A14B, torch.bfloat16, device=CPU, ranks_per_node=ranks)


def test_a_layer_of_a14b_has_the_size_that_its_tensors_have() -> None:
    needed = clip_memory.clip_memory(SamplerSettings(), ParallelSettings(), A14B, torch.bfloat16)
    tokens = 21 * 30 * 52
    stream, qkv = torch.empty(tokens, 5120, dtype=torch.bfloat16), torch.empty(tokens, 3 * 5120, dtype=torch.bfloat16)
    assert needed.forward == stream.nbytes + qkv.nbytes
    assert needed.frames == torch.empty(81, 3, 480, 832, dtype=torch.uint8).nbytes
    assert needed.decoded == 4 * needed.frames


def test_published_sizes_fit_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, SamplerSettings(), gib=16)
    check(monkeypatch, SamplerSettings(height=720, width=1280), gib=16)


def test_what_does_not_fit_is_refused_with_setting_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        check(monkeypatch, SamplerSettings(num_frames=2001, height=2160, width=3840), gib=64)
    assert "sampler.num_frames=2001, height=2160 and width=3840 need at least" in str(caught.value)
    assert "which has 64.0 GiB" in str(caught.value)


def test_ranks_that_share_a_node_share_its_memory_and_those_of_a_replica_share_a_shot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = replace(SamplerSettings(), num_frames=401)
    check(monkeypatch, sampler, gib=8)
    with pytest.raises(ConfigError, match="each of 8 replicas"):
        check(monkeypatch, sampler, gib=8, ranks=8)
    check(monkeypatch, sampler, gib=8, ranks=8, ulysses=8)


@pytest.mark.gpu
def test_the_memory_of_a_gpu_counts() -> None:
    with pytest.raises(ConfigError, match="GiB on each device for one shot"):
        check_clip_memory(
            SamplerSettings(num_frames=10_001, height=2160, width=3840),
            ParallelSettings(),
            A14B,
            torch.bfloat16,
            device=torch.device("cuda"),
            ranks_per_node=1,
        )
