"""A whole denoise, both experts and guidance included, gives the same latents on any layout as on one device."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from storymem_dist.diffusion.denoise import PromptEmbeds, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import Guidance, LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.solver import Solver
from storymem_dist.errors import LayoutError
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.loading import place_experts
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import CONFIG, largest_error, make_dit

TOLERANCE = 1e-5
M2V = replace(CONFIG, in_dim=36)


@dataclass(frozen=True)
class Case:
    """A layout of the replica and where its weights are."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    weights: str = "replicated"
    swap: bool = False

    def settings(self) -> ParallelSettings:
        return ParallelSettings(cfg=self.cfg, ring=self.ring, ulysses=self.ulysses, weights=self.weights)


CASES = {
    1: [Case(weights="fsdp"), Case(weights="fsdp_offload")],
    2: [
        Case(ulysses=2),
        Case(ulysses=2, weights="fsdp"),
        Case(ring=2),
        Case(ring=2, weights="fsdp", swap=True),
        Case(cfg=2),
        Case(cfg=2, weights="fsdp"),
        Case(ulysses=2, weights="fsdp_offload"),
        Case(ulysses=2, swap=True),
    ],
    3: [Case(ring=3), Case(ring=3, weights="fsdp")],
    4: [
        Case(ulysses=4),
        Case(ulysses=4, weights="fsdp"),
        Case(ring=2, ulysses=2),
        Case(ring=2, ulysses=2, weights="fsdp"),
        Case(cfg=2, ulysses=2),
        Case(cfg=2, ulysses=2, weights="fsdp"),
        Case(cfg=2, ring=2),
    ],
    8: [Case(cfg=2, ring=2, ulysses=2, weights="fsdp")],
}


def run_denoise(high: WanDiT, low: WanDiT, guidance: Guidance, **options: object) -> Tensor:
    """Six steps, three per expert, of 45 tokens (one memory keyframe): 45 divides by neither 2 nor 4."""
    grid = LatentGrid(num_frames=5, height=48, width=80, num_memory=1)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(grid.latent_shape, generator=generator)
    condition = torch.randn(20, *grid.latent_shape[1:], generator=generator)
    prompt = PromptEmbeds(
        prompt_LE=torch.randn(9, CONFIG.text_dim, generator=generator),
        negative_LE=torch.randn(4, CONFIG.text_dim, generator=generator),
    )
    solver = Solver("unipc", num_steps=6, flow_shift=4.0)
    boundary = float(solver.timesteps[2:4].float().mean()) / 1000
    experts = ExpertPair(
        high_noise=high,
        low_noise=low,
        boundary_ratio=boundary,
        guidance_scale_high=3.5,
        guidance_scale_low=3.0,
        **options,  # type: ignore[arg-type]
    )
    return denoise(experts, guidance, solver, noise, condition, prompt, grid, device="cpu")


def _denoise_on_layouts(cases: list[Case]) -> list[Tensor]:
    if len(cases) > 1:
        dist.init_process_group("gloo")
    results = []
    for case in cases:
        settings = case.settings()
        with start_session(settings, num_heads=M2V.num_heads) as session:
            experts = {
                name: parallelize(make_dit(M2V, seed=seed), session.mesh, settings)
                for seed, name in enumerate(("high_noise", "low_noise"))
            }
            _, residency = place_experts(experts.items(), device=session.device, weights=case.weights, swap=case.swap)
            guidance = make_guidance(session.mesh)
            results.append(run_denoise(*experts.values(), guidance, residency=residency))
    return results


@pytest.fixture(scope="module")
def one_device() -> Tensor:
    return run_denoise(make_dit(M2V, seed=0), make_dit(M2V, seed=1), LocalGuidance())


@pytest.mark.parametrize("world_size", CASES)
def test_final_latents_equal_those_of_one_device(one_device: Tensor, world_size: int) -> None:
    by_rank = run_ranks(_denoise_on_layouts, world_size, (CASES[world_size],), timeout_seconds=200)
    for rank, latents_of_cases in enumerate(by_rank):
        for case, latents, of_leader in zip(CASES[world_size], latents_of_cases, by_rank[0], strict=True):
            assert largest_error(latents, one_device) <= TOLERANCE, f"rank {rank}, {case}"
            assert torch.equal(latents, of_leader), f"rank {rank} left the leader, {case}"


def test_both_experts_and_both_passes_matter(one_device: Tensor) -> None:
    swapped = run_denoise(make_dit(M2V, seed=1), make_dit(M2V, seed=0), LocalGuidance())
    assert largest_error(swapped, one_device) > 100 * TOLERANCE


def _guidance_of_scale_one() -> str:
    with start_session(ParallelSettings(cfg=2)) as session:
        guidance = make_guidance(session.mesh)
        dits = make_dit(M2V, seed=0), make_dit(M2V, seed=1)
        grid = LatentGrid(num_frames=1, height=16, width=16)
        experts = ExpertPair(
            high_noise=dits[0],
            low_noise=dits[1],
            boundary_ratio=0.5,
            guidance_scale_high=1.0,
            guidance_scale_low=3.5,
        )
        try:
            guidance.velocity(
                experts.select(900),
                torch.zeros(1, 36, *grid.latent_shape[1:]),
                torch.tensor([900]),
                torch.zeros(1, 2, CONFIG.text_dim),
                None,
                grid.temporal_positions(),
            )
        except LayoutError as error:
            return str(error)
    return "no error"


def test_side_by_side_guidance_refuses_an_expert_without_a_second_pass() -> None:
    for message in run_ranks(_guidance_of_scale_one, 2):
        assert message == "guidance_scale=1 of the high_noise expert cannot be combined with parallel.cfg=2"
