"""The step cache: when a step is reused, and that ranks and guidance passes decide together."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion.branch import COND, UNCOND
from storymem_dist.diffusion.denoise import PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.solver import Solver
from storymem_dist.diffusion.step_cache import attach_step_cache, step_cache_of
from storymem_dist.errors import ConfigError
from storymem_dist.models.wan.dit import WanDiT
from tests.helpers.fake_experts import fake_experts
from tests.helpers.tiny_dit import CONFIG, make_dit, make_inputs

M2V = replace(CONFIG, in_dim=36, num_layers=4)
EVERYTHING_PASSES = 1e9


class BlockCounter:
    """Counts how often the first block and the last one run."""

    def __init__(self, dit: WanDiT) -> None:
        self.first = self.last = 0
        dit.blocks[0].register_forward_hook(self._on_first)
        dit.blocks[-1].register_forward_hook(self._on_last)

    def _on_first(self, *_: object) -> None:
        self.first += 1

    def _on_last(self, *_: object) -> None:
        self.last += 1


def make_experts(threshold: float, *, guidance_scale: float = 3.5, attach: bool = True) -> tuple[ExpertPair, ...]:
    dits = [make_dit(M2V, seed=seed) for seed in (0, 1)]
    if attach:
        for dit in dits:
            attach_step_cache(dit)
    pair = ExpertPair(
        high_noise=dits[0],
        low_noise=dits[1],
        boundary_ratio=0.9,
        guidance_scale_high=guidance_scale,
        guidance_scale_low=guidance_scale,
        step_cache_threshold=threshold,
    )
    return pair, dits


def render(pair: ExpertPair, *, seed: int = 5, infos: list[StepInfo] | None = None) -> Tensor:
    """Eight steps, some of each expert, with one memory keyframe."""
    grid = LatentGrid(num_frames=5, height=32, width=48, num_memory=1)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(grid.latent_shape, generator=generator)
    condition = torch.randn(20, *grid.latent_shape[1:], generator=generator)
    embeds = [torch.randn(length, M2V.text_dim, generator=generator) for length in (9, 4)]
    prompt = PromptEmbeds(prompt_LE=embeds[0], negative_LE=embeds[1])
    solver = Solver("unipc", num_steps=8, flow_shift=4.0)
    on_step = None if infos is None else infos.append
    return denoise(pair, LocalGuidance(), solver, noise, condition, prompt, grid, device="cpu", on_step=on_step)


@torch.no_grad()
def run_pass(dit: WanDiT, branch: str, inputs: tuple[Tensor, ...]) -> Tensor:
    cache = step_cache_of(dit)
    assert cache is not None
    with cache.during(branch):
        return dit(*inputs)


def test_attaching_a_cache_changes_neither_names_nor_numbers_while_it_is_off() -> None:
    plain, cached = make_dit(), make_dit()
    attach_step_cache(cached)
    assert list(cached.state_dict()) == list(plain.state_dict())
    inputs = make_inputs()
    assert torch.equal(cached(*inputs), plain(*inputs))
    without, with_cache = (render(make_experts(0.0, attach=attach)[0]) for attach in (False, True))
    assert torch.equal(without, with_cache)


def test_a_threshold_that_nothing_meets_gives_the_exact_latents() -> None:
    infos: list[StepInfo] = []
    latents = render(make_experts(1e-12)[0], infos=infos)
    torch.testing.assert_close(latents, render(make_experts(0.0)[0]), atol=1e-5, rtol=1e-5)
    assert not any(info.reused for info in infos)


def test_unchanged_inputs_reuse_the_whole_pass() -> None:
    dit, inputs = make_dit(M2V), make_inputs(M2V)
    attach_step_cache(dit).begin_shot(1e-6)
    counter = BlockCounter(dit)
    full = run_pass(dit, COND, inputs)
    step_cache_of(dit).begin_step()
    torch.testing.assert_close(run_pass(dit, COND, inputs), full, atol=1e-5, rtol=1e-5)
    assert (counter.first, counter.last) == (2, 1)


def test_a_change_beyond_the_threshold_is_computed_and_becomes_the_new_reference() -> None:
    dit, inputs = make_dit(M2V), make_inputs(M2V)
    cache = attach_step_cache(dit)
    cache.begin_shot(0.01)
    counter = BlockCounter(dit)
    exact = make_dit(M2V)
    for scale, runs in ((1.0, 1), (2.0, 2), (2.0, 2), (1.0, 3)):
        scaled = (inputs[0] * scale, *inputs[1:])
        cache.begin_step()
        torch.testing.assert_close(run_pass(dit, COND, scaled), exact(*scaled), atol=1e-5, rtol=1e-5)
        assert counter.last == runs


def test_small_changes_do_not_add_up_unseen() -> None:
    """Each step differs from the one before by less than the threshold, but not from the last full step."""
    dit, inputs = make_dit(M2V), make_inputs(M2V)
    cache = attach_step_cache(dit)
    cache.begin_shot(0.1)
    elsewhere = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9))
    reused = []
    for step in range(20):
        cache.begin_step()
        turned = math.cos(0.05 * step) * inputs[0] + math.sin(0.05 * step) * elsewhere
        run_pass(dit, COND, (turned, *inputs[1:]))
        reused.append(cache.reused)
    assert not reused[0]
    assert any(reused[1:]) and not all(reused[1:])


def test_each_guidance_branch_has_its_own_memory_and_the_conditional_pass_decides() -> None:
    dit, inputs = make_dit(M2V), make_inputs(M2V)
    cache = attach_step_cache(dit)
    cache.begin_shot(1e-3)
    other = (*inputs[:2], inputs[2] * 3.0, inputs[3])
    full = {branch: run_pass(dit, branch, args) for branch, args in ((COND, inputs), (UNCOND, other))}
    assert not torch.allclose(full[COND], full[UNCOND], atol=1e-3)
    cache.begin_step()
    for branch, args in ((COND, inputs), (UNCOND, other)):
        torch.testing.assert_close(run_pass(dit, branch, args), full[branch], atol=1e-5, rtol=1e-5)
    counter = BlockCounter(dit)
    cache.begin_step()
    run_pass(dit, COND, (inputs[0] * 2, *inputs[1:]))
    run_pass(dit, UNCOND, other)
    assert (counter.first, counter.last) == (2, 2), "the conditional pass changed, so both are computed"


def test_a_denoise_with_reuse_is_near_the_exact_one_and_skips_both_passes_of_a_step() -> None:
    infos: list[StepInfo] = []
    pair, dits = make_experts(0.2)
    counters = [BlockCounter(dit) for dit in dits]
    latents, exact = render(pair, infos=infos), render(make_experts(0.0)[0])
    num_reused = sum(info.reused for info in infos)
    assert 0 < num_reused < 8
    assert sum(counter.first for counter in counters) == 2 * 8
    assert sum(counter.last for counter in counters) == 2 * (8 - num_reused)
    error = ((latents - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.1


def test_the_first_step_of_each_expert_and_of_each_shot_is_computed() -> None:
    pair, _ = make_experts(EVERYTHING_PASSES)
    infos: list[StepInfo] = []
    render(pair, infos=infos)
    firsts = [infos[0], next(info for info in infos if info.expert == "low_noise")]
    assert [info for info in infos if not info.reused] == firsts
    second: list[StepInfo] = []
    latents = render(pair, seed=6, infos=second)
    assert [info.reused for info in second] == [info.reused for info in infos]
    assert torch.equal(latents, render(make_experts(EVERYTHING_PASSES)[0], seed=6))


def test_an_expert_that_is_not_at_work_remembers_nothing() -> None:
    pair, dits = make_experts(EVERYTHING_PASSES)
    render(pair)
    two_branches = 2 * 2 * (3 * 2 * 3) * M2V.dim * 4
    assert [step_cache_of(dit).num_bytes for dit in dits] == [0, two_branches]
    pair.idle()
    assert step_cache_of(dits[1]).num_bytes == 0


def test_without_guidance_only_the_conditional_pass_is_remembered() -> None:
    pair, dits = make_experts(EVERYTHING_PASSES, guidance_scale=1.0)
    counter = BlockCounter(dits[1])
    render(pair)
    assert counter.last == 1 < counter.first
    assert step_cache_of(dits[1]).num_bytes == 2 * (3 * 2 * 3) * M2V.dim * 4


def test_ranks_that_see_parts_of_a_step_decide_together() -> None:
    """One part hardly changes, the other changes a lot; the sum over both parts decides for both."""
    dit, inputs = make_dit(M2V), make_inputs(M2V)
    asked: list[Tensor] = []

    def with_a_rank_whose_tokens_changed(sums: Tensor) -> Tensor:
        asked.append(sums.clone())
        return sums + torch.tensor([1e6, 1e6])

    cache = attach_step_cache(dit, with_a_rank_whose_tokens_changed)
    cache.begin_shot(0.1)
    counter = BlockCounter(dit)
    for _ in range(2):
        cache.begin_step()
        run_pass(dit, COND, inputs)
    assert asked[0][0] < 1e-3 * asked[0][1]
    assert counter.last == 2


def test_a_rank_of_the_unconditional_pass_takes_part_without_deciding() -> None:
    dit, inputs = make_dit(M2V), make_inputs(M2V)
    asked: list[list[float]] = []

    def with_a_conditional_rank_that_did_not_change(sums: Tensor) -> Tensor:
        asked.append(sums.tolist())
        return sums + torch.tensor([0.0, 1.0])

    cache = attach_step_cache(dit, with_a_conditional_rank_that_did_not_change)
    cache.begin_shot(0.1)
    for scale in (1.0, 5.0):
        cache.begin_step()
        run_pass(dit, UNCOND, (inputs[0] * scale, *inputs[1:]))
    assert asked == [[0.0, 0.0]]
    assert cache.reused


def test_what_is_remembered_has_the_experts_matmul_type() -> None:
    dit, inputs = make_dit(M2V, dtype=torch.bfloat16), make_inputs(M2V)
    cache = attach_step_cache(dit)
    cache.begin_shot(0.01)
    run_pass(dit, COND, inputs)
    assert cache.num_bytes == 2 * (3 * 3 * 5) * M2V.dim * 2
    cache.begin_step()
    run_pass(dit, COND, inputs)
    assert cache.reused, "rounding what is remembered must not look like a change of one percent"


def test_a_forward_that_does_not_say_its_branch_is_refused_only_while_steps_may_be_reused() -> None:
    dit, inputs = make_dit(), make_inputs()
    cache = attach_step_cache(dit)
    dit(*inputs)
    cache.begin_shot(0.1)
    with pytest.raises(RuntimeError, match="needs its guidance branch"):
        dit(*inputs)


def test_a_cache_cannot_be_attached_under_hooks_that_would_stay_behind() -> None:
    dit = make_dit()
    dit.blocks.register_forward_pre_hook(lambda _module, _args: None)
    with pytest.raises(RuntimeError, match="before hooks"):
        attach_step_cache(dit)


def test_a_threshold_for_experts_without_a_cache_is_refused() -> None:
    experts = fake_experts().with_sampling(
        boundary_ratio=0.9, guidance_scale_high=1.0, guidance_scale_low=1.0, step_cache_threshold=0.1
    )
    with pytest.raises(ConfigError, match=r"step_cache_threshold=0\.1 needs experts with a step cache"):
        experts.begin_shot()
