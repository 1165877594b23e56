"""FSDP2 without a backward pass: what it keeps for one is dropped between shots; streams are shared from the start."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.loading import place_experts
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import CONFIG, make_dit, make_inputs

NAMES = ("high_noise", "low_noise")
SETTINGS = ParallelSettings(ulysses=2, weights="fsdp")
THREE_BLOCKS = replace(CONFIG, num_layers=3)


def _groups(module: nn.Module) -> list[Any]:
    states = {id(m._get_fsdp_state()): m._get_fsdp_state() for m in module.modules() if isinstance(m, FSDPModule)}
    return [state._fsdp_param_group for state in states.values() if state._fsdp_param_group is not None]


def _num_gathered(module: nn.Module) -> int:
    return sum(group._all_gather_result is not None or not group.is_sharded for group in _groups(module))


def _num_kept_for_backward(module: nn.Module) -> int:
    groups = _groups(module)
    return len(groups[0].comm_ctx.post_forward_order) + sum(len(group._post_forward_indices) for group in groups)


def _experts(session: Session, *, swap: bool) -> tuple[dict[str, nn.Module], ExpertPair]:
    def build() -> list[tuple[str, WanDiT]]:
        built = []
        for seed, name in enumerate(NAMES):
            dit = make_dit(THREE_BLOCKS, seed=seed)
            attach_step_cache(dit, session.mesh.shard.sum)
            built.append((name, parallelize(dit, session.mesh, SETTINGS)))
        return built

    modules, residency = place_experts(build(), device=session.device, weights="fsdp", swap=swap)
    pair = ExpertPair(
        high_noise=modules["high_noise"],
        low_noise=modules["low_noise"],
        boundary_ratio=0.5,
        guidance_scale_high=1.0,
        guidance_scale_low=1.0,
        residency=residency,
        step_cache_threshold=100.0,
    )
    return modules, pair


@torch.no_grad()
def _two_shots(swap: bool, has_reset: bool) -> dict[str, list[Any]]:
    """Each shot: two steps of each expert, the second one reused."""
    found: dict[str, list[Any]] = {"gathered by a reused step": [], "after": [], "kept": [], "equal": [], "streams": []}
    inputs = make_inputs(THREE_BLOCKS)
    single = {name: make_dit(THREE_BLOCKS, seed=seed) for seed, name in enumerate(NAMES)}
    if not has_reset and hasattr(FSDPModule, "reset_iter_state"):
        del FSDPModule.reset_iter_state  # as before torch 2.13
    with start_session(SETTINGS) as session:
        modules, pair = _experts(session, swap=swap)
        contexts = [_groups(module)[0].comm_ctx for module in modules.values()]
        assert len({id(group.comm_ctx) for module in modules.values() for group in _groups(module)}) == 1
        streams = vars(contexts[0])["all_gather_stream"]
        for _ in range(2):
            pair.begin_shot()
            for timestep, name in ((900, "high_noise"), (100, "low_noise")):
                for step in range(2):
                    expert = pair.select(timestep)
                    velocity = expert.run("cond", *inputs)
                    if step == 0:
                        found["equal"].append(torch.allclose(velocity, single[name](*inputs), atol=1e-5))
                    assert expert.reused == (step == 1)
                found["gathered by a reused step"].append(_num_gathered(modules[name]))
                others = [modules[other] for other in NAMES if other != name]
                found["after"] += [_num_gathered(other) for other in others]
            pair.end_shot()
            found["after"] += [_num_gathered(module) for module in modules.values()]
            found["kept"] += [_num_kept_for_backward(module) for module in modules.values()]
            found["streams"].append(vars(contexts[0])["all_gather_stream"] is streams)
        pair.release()
    return found


@pytest.mark.parametrize("has_reset", [True, False], ids=["torch 2.13", "before it"])
@pytest.mark.parametrize("swap", [False, True], ids=["resident", "swap"])
def test_nothing_stays_gathered_and_no_list_grows(swap: bool, has_reset: bool) -> None:
    for found in run_ranks(_two_shots, 2, (swap, has_reset)):
        assert found["equal"] == [True] * 4
        assert found["gathered by a reused step"] == [1] * 4, "the step must leave what is to be dropped"
        assert found["after"] == [0] * 8
        assert found["kept"] == [0] * 4
        assert found["streams"] == [True, True]


@torch.no_grad()
def _after_a_forward_that_failed() -> bool:
    inputs = make_inputs(THREE_BLOCKS)
    with start_session(SETTINGS) as session:
        modules, pair = _experts(session, swap=False)
        module = modules["high_noise"]
        expected = module(*inputs)
        with (
            patch.object(module.blocks[1].ffn, "forward", side_effect=torch.OutOfMemoryError("no memory")),
            pytest.raises(torch.OutOfMemoryError),
        ):
            module(*inputs)
        pair.idle()
        assert _num_gathered(module) == 0
        return torch.equal(module(*inputs), expected)


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="torch before 2.13 cannot start again")
def test_a_forward_that_failed_leaves_nothing_behind() -> None:
    assert run_ranks(_after_a_forward_that_failed, 2) == [True, True]
