"""Kept text keys change no bit, are computed once per prompt, branch and expert, and are freed in time."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion.denoise import PromptEmbeds, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.solver import Solver
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.diffusion.text_cache import attach_text_cache, text_cache_of
from storymem_dist.models.wan.dit import WanDiT
from tests.helpers.tiny_dit import CONFIG, make_dit, make_inputs

NUM_STEPS = 8
BYTES_PER_BRANCH = CONFIG.num_layers * 2 * CONFIG.text_len * CONFIG.dim * 4


def make_experts(*, keep_text: bool) -> list[WanDiT]:
    dits = [make_dit(seed=seed) for seed in (0, 1)]
    for dit in dits:
        attach_step_cache(dit)
        if keep_text:
            attach_text_cache(dit)
    return dits


def pair_of(dits: Sequence[WanDiT], *, step_cache_threshold: float = 0.0) -> ExpertPair:
    return ExpertPair(
        high_noise=dits[0],
        low_noise=dits[1],
        boundary_ratio=0.9,
        guidance_scale_high=3.5,
        guidance_scale_low=3.0,
        step_cache_threshold=step_cache_threshold,
    )


def render(pair: ExpertPair, *, prompt_seed: int = 0) -> Tensor:
    grid = LatentGrid(num_frames=5, height=32, width=48, num_memory=0)
    noise = torch.randn(grid.latent_shape, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(prompt_seed)
    embeds = [torch.randn(length, CONFIG.text_dim, generator=generator) for length in (9, 4)]
    prompt = PromptEmbeds(prompt_LE=embeds[0], negative_LE=embeds[1])
    solver = Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0)
    return denoise(pair, LocalGuidance(), solver, noise, None, prompt, grid, device="cpu")


class Projections:
    """Counts how often each expert projects a text, in its last block."""

    def __init__(self, dits: Sequence[WanDiT]) -> None:
        self.counts = [0 for _ in dits]
        for index, dit in enumerate(dits):
            dit.blocks[-1].cross_attn.v.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index: int) -> None:
        self.counts[index] += 1


@pytest.mark.parametrize("step_cache_threshold", [0.0, 0.2])
def test_a_denoise_with_kept_text_keys_is_the_same_bit_by_bit(step_cache_threshold: float) -> None:
    kept, computed = (
        render(pair_of(make_experts(keep_text=keep_text), step_cache_threshold=step_cache_threshold))
        for keep_text in (True, False)
    )
    assert torch.equal(kept, computed)


def test_a_text_is_projected_once_per_branch_and_expert_of_a_shot() -> None:
    kept, computed = make_experts(keep_text=True), make_experts(keep_text=False)
    of_kept, of_computed = Projections(kept), Projections(computed)
    render(pair_of(kept))
    render(pair_of(computed))
    assert of_kept.counts == [2, 2]
    assert sum(of_computed.counts) == 2 * NUM_STEPS


def test_another_shot_is_rendered_with_its_own_text() -> None:
    dits = make_experts(keep_text=True)
    pair = pair_of(dits)
    first, second = render(pair, prompt_seed=0), render(pair, prompt_seed=1)
    assert not torch.equal(first, second)
    assert torch.equal(second, render(pair_of(make_experts(keep_text=False)), prompt_seed=1))


def test_only_the_working_expert_holds_text_keys_and_none_after_idling() -> None:
    dits = make_experts(keep_text=True)
    pair = pair_of(dits)
    render(pair)  # ends with the low-noise expert
    assert [text_cache_of(dit).num_bytes for dit in dits] == [0, 2 * BYTES_PER_BRANCH]
    pair.idle()
    assert text_cache_of(dits[1]).num_bytes == 0


def test_a_forward_must_say_its_branch() -> None:
    dit = make_dit()
    attach_text_cache(dit)
    with pytest.raises(RuntimeError, match="needs its guidance branch"), torch.no_grad():
        dit(*make_inputs())


def test_a_model_without_a_cache_has_none() -> None:
    dit = make_dit()
    attach_step_cache(dit)
    assert text_cache_of(dit) is None
    assert text_cache_of(torch.nn.Linear(2, 2)) is None
