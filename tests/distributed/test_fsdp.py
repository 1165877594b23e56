"""FSDP2 keeps every bit: parameters in their own dtypes, forwards as on one device, shards that move and come back."""

import torch
from torch import Tensor, nn

from storymem_dist.parallel.fsdp import ShardResidency
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
def _two_experts_that_share_streams() -> list[bool]:
    settings = ParallelSettings(cfg=2, weights="fsdp")
    with start_session(settings) as session:
        single = {name: _make_precise_dit(seed) for seed, name in enumerate(("high_noise", "low_noise"))}
        many = {name: _shard_over_guidance(session, settings, seed) for seed, name in enumerate(single)}
        residency = place_experts(many, device=session.device, weights="fsdp", swap=True)
        inputs = make_inputs()
        equal = []
        for name in ("high_noise", "low_noise", "high_noise"):
            residency.activate(name)
            equal.append(torch.equal(many[name](*inputs), single[name](*inputs)))
            residency.idle()
        residency.release()
        return equal


def test_experts_take_turns_on_the_device() -> None:
    assert run_ranks(_two_experts_that_share_streams, 2) == [[True] * 3] * 2


class MovesRecorded(nn.Module):
    """Notes where it is sent."""

    def __init__(self, name: str, moves: list[tuple[str, str]]) -> None:
        super().__init__()
        self._name, self._moves = name, moves

    def to(self, device: torch.device | str) -> "MovesRecorded":  # type: ignore[override]
        self._moves.append((self._name, str(device)))
        return self


def _moves(swap: bool) -> list[tuple[str, str]]:
    moves: list[tuple[str, str]] = []
    experts = {name: MovesRecorded(name, moves) for name in ("high", "low")}
    residency = ShardResidency(experts, torch.device("cuda", 3), swap=swap)
    moves.sort()
    for name in ("high", "high", "low"):
        residency.activate(name)
    moves.append(("idle", ""))
    residency.idle()
    residency.activate("low")
    return moves


def test_with_swap_only_the_working_expert_has_shards_on_the_device() -> None:
    assert _moves(swap=True) == [
        ("high", "cpu"),
        ("low", "cpu"),
        ("high", "cuda:3"),
        ("high", "cpu"),
        ("low", "cuda:3"),
        ("idle", ""),
        ("low", "cpu"),
        ("low", "cuda:3"),
    ]


def test_without_swap_shards_stay_until_they_are_asked_to_idle() -> None:
    moves = _moves(swap=False)
    assert moves[0] == ("idle", "")
    assert sorted(moves[1:3]) == [("high", "cpu"), ("low", "cpu")]
    assert moves[3:] == [("low", "cuda:3")]


def _offloaded_shards() -> tuple[bool, set[str]]:
    settings = ParallelSettings(weights="fsdp_offload")
    with start_session(settings) as session, torch.no_grad():
        many = parallelize(_make_precise_dit(), session.mesh, settings)
        inputs = make_inputs()
        velocity: Tensor = many(*inputs)
        where = {str(parameter.device) for parameter in many.parameters()}
        return torch.equal(velocity, _make_precise_dit()(*inputs)), where


def test_one_rank_may_keep_its_weights_in_host_memory() -> None:
    assert run_ranks(_offloaded_shards, 1) == [(True, {"cpu"})]
