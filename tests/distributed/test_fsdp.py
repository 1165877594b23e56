"""FSDP2 keeps every bit: parameters in their own dtypes, forwards as on one device, shards that move and come back."""

from functools import partialmethod

import pytest
import torch
from torch import Tensor, nn

from storymem_dist.parallel.loading import place_experts
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import make_dit, make_inputs


def _make_precise_dit(seed: int = 0) -> nn.Module:
    """A bf16 model whose fp32 parameters have values that bf16 cannot hold."""
    dit = make_dit(dtype=torch.bfloat16, seed=seed)
    for parameter in dit.parameters():
        if parameter.dtype == torch.float32:
            parameter.mul_(1 + 2**-12)
    return dit


def _round_to_bf16(dit: nn.Module) -> nn.Module:
    for name, parameter in dit.named_parameters():
        if "norm" in name or "modulation" in name:
            parameter.copy_(parameter.bfloat16())
    return dit


def _shard_over_guidance(session: Session, settings: ParallelSettings, seed: int = 0) -> nn.Module:
    return parallelize(_make_precise_dit(seed), session.mesh, settings)


@torch.no_grad()
def _forward_bits() -> dict[str, object]:
    settings = ParallelSettings(cfg=2, weights="fsdp", prefetch_blocks=1)
    with start_session(settings) as session:
        single = _make_precise_dit()
        many = _shard_over_guidance(session, settings)
        inputs = make_inputs()
        expected = single(*inputs)
        order = [block._get_fsdp_state()._states_to_forward_prefetch for block in many.blocks]
        found = [many(*inputs), many(*inputs)]
        moved = many._apply(torch.clone)(*inputs)  # what .to(another device) does to every tensor
        return {
            "equal": [torch.equal(velocity, expected) for velocity in (*found, moved)],
            "equal when norms are rounded": torch.equal(found[0], _round_to_bf16(_make_precise_dit())(*inputs)),
            "dtypes": [(name, p.dtype) for name, p in many.named_parameters()],
            "expected dtypes": [(name, p.dtype) for name, p in single.named_parameters()],
            "sharded": all(p.to_local().numel() < p.numel() or p.shape[0] == 1 for p in many.parameters()),
            "prefetches next": order == [[many.blocks[1]._get_fsdp_state()], []],
        }


def test_sharding_changes_no_bit_and_no_dtype() -> None:
    for outcome in run_ranks(_forward_bits, 2):
        assert outcome["equal"] == [True, True, True]
        assert not outcome["equal when norms are rounded"], "the inputs must tell fp32 norms from rounded ones"
        assert outcome["dtypes"] == outcome["expected dtypes"]
        assert outcome["sharded"], "a rank must hold its part only"
        assert outcome["prefetches next"]


@torch.no_grad()
def _is_away(module: nn.Module) -> bool:
    return not any(parameter.to_local().untyped_storage().nbytes() for parameter in module.parameters())


def _two_experts_that_share_streams(settings: ParallelSettings) -> list[tuple[bool, bool]]:
    """For each turn: whether a swapped expert computes what a resident one does, and is away when its turn is over."""
    if settings.compile:
        nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    names = ("high_noise", "low_noise")
    with start_session(settings) as session:
        many = {name: _shard_over_guidance(session, settings, seed) for seed, name in enumerate(names)}
        resident = {name: _shard_over_guidance(session, settings, seed) for seed, name in enumerate(names)}
        _, residency = place_experts(many.items(), device=session.device, weights="fsdp", swap=True)
        inputs = make_inputs()
        turns = []
        for name, other in ((*names,), names[::-1], (*names,)):
            residency.activate(name)
            equal = torch.equal(many[name](*inputs), resident[name](*inputs))
            residency.activate(other)
            turns.append((equal, _is_away(many[name])))
            residency.idle()
        residency.release()
        return turns


@pytest.mark.parametrize(
    ("settings", "num_ranks"),
    [
        (ParallelSettings(cfg=2, weights="fsdp"), 2),
        (ParallelSettings(cfg=2, weights="fsdp", compile=True), 2),
        (ParallelSettings(ring=3, weights="fsdp"), 3),
    ],
    ids=["even", "compiled", "uneven"],
)
def test_experts_take_turns_on_the_device(settings: ParallelSettings, num_ranks: int) -> None:
    for turns in run_ranks(_two_experts_that_share_streams, num_ranks, (settings,)):
        assert turns == [(True, True)] * 3


def _offloaded_shards() -> tuple[bool, set[str]]:
    settings = ParallelSettings(cfg=2, weights="fsdp_offload")
    with start_session(settings) as session, torch.no_grad():
        many = parallelize(_make_precise_dit(), session.mesh, settings)
        inputs = make_inputs()
        velocity: Tensor = many(*inputs)
        where = {str(parameter.device) for parameter in many.parameters()}
        return torch.equal(velocity, _make_precise_dit()(*inputs)), where


def test_ranks_may_keep_their_shards_in_host_memory() -> None:
    assert run_ranks(_offloaded_shards, 2) == [(True, {"cpu"})] * 2
