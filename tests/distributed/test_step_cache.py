"""Caches on every layout: steps are reused exactly where one device reuses them, kept text keys change no bit."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from storymem_dist.diffusion.denoise import PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import Guidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.solver import Solver
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.diffusion.text_cache import attach_text_cache, text_cache_of
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.mesh import ReplicaMesh, lone_mesh
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import CONFIG, largest_error, make_dit

TOLERANCE = 1e-5
THRESHOLD = 0.2
M2V = replace(CONFIG, in_dim=36, num_layers=4)
CASES = {
    2: [
        ParallelSettings(ulysses=2, weights="fsdp"),
        ParallelSettings(ring=2, weights="replicated"),
        ParallelSettings(cfg=2, weights="fsdp"),
    ],
    4: [ParallelSettings(cfg=2, ulysses=2, weights="fsdp"), ParallelSettings(ring=2, ulysses=2, weights="replicated")],
}


@dataclass(frozen=True)
class Rendered:
    latents: Tensor
    reused: list[bool]


def render(
    mesh: ReplicaMesh, settings: ParallelSettings, guidance: Guidance, threshold: float, *, keep_text: bool = False
) -> Rendered:
    """Eight steps, some of each expert, of 45 tokens (one memory keyframe): 45 divides by neither 2 nor 4."""
    grid = LatentGrid(num_frames=5, height=48, width=80, num_memory=1)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(grid.latent_shape, generator=generator)
    condition = torch.randn(20, *grid.latent_shape[1:], generator=generator)
    embeds = [torch.randn(length, M2V.text_dim, generator=generator) for length in (9, 4)]
    dits = [expert(seed, mesh, settings, keep_text=keep_text) for seed in (0, 1)]
    experts = ExpertPair(
        high_noise=dits[0],
        low_noise=dits[1],
        boundary_ratio=0.9,
        guidance_scale_high=3.5,
        guidance_scale_low=3.0,
        step_cache_threshold=threshold,
    )
    infos: list[StepInfo] = []
    latents = denoise(
        experts,
        guidance,
        Solver("unipc", num_steps=8, flow_shift=4.0),
        noise,
        condition,
        PromptEmbeds(prompt_LE=embeds[0], negative_LE=embeds[1]),
        grid,
        device="cpu",
        on_step=infos.append,
    )
    kept = text_cache_of(dits[1])
    assert (kept is not None and kept.num_bytes > 0) == keep_text
    return Rendered(latents=latents, reused=[info.reused for info in infos])


def expert(seed: int, mesh: ReplicaMesh, settings: ParallelSettings, *, keep_text: bool) -> WanDiT:
    dit = make_dit(M2V, seed=seed)
    attach_step_cache(dit, mesh.shard.sum)
    if keep_text:
        attach_text_cache(dit)
    return parallelize(dit, mesh, settings)


def _render_on_layouts(cases: list[ParallelSettings]) -> list[Rendered]:
    dist.init_process_group("gloo")
    results = []
    for settings in cases:
        with start_session(settings, num_heads=M2V.num_heads) as session:
            results.append(render(session.mesh, settings, make_guidance(session.mesh), THRESHOLD))
    return results


@pytest.fixture(scope="module")
def one_device() -> Rendered:
    mesh = lone_mesh()
    return render(mesh, ParallelSettings(weights="replicated"), make_guidance(mesh), THRESHOLD)


@pytest.mark.parametrize("world_size", CASES)
def test_every_rank_of_every_layout_reuses_the_steps_that_one_device_reuses(
    one_device: Rendered, world_size: int
) -> None:
    assert any(one_device.reused) and not all(one_device.reused)
    for rank, results in enumerate(run_ranks(_render_on_layouts, world_size, (CASES[world_size],))):
        for settings, result in zip(CASES[world_size], results, strict=True):
            assert result.reused == one_device.reused, f"rank {rank}, {settings}"
            assert largest_error(result.latents, one_device.latents) <= TOLERANCE, f"rank {rank}, {settings}"


def test_reuse_shows_in_the_latents(one_device: Rendered) -> None:
    mesh = lone_mesh()
    exact = render(mesh, ParallelSettings(weights="replicated"), make_guidance(mesh), 0.0)
    assert largest_error(one_device.latents, exact.latents) > 10 * TOLERANCE


def _render_with_and_without_kept_text(cases: list[ParallelSettings]) -> list[bool]:
    dist.init_process_group("gloo")
    equal = []
    for settings in cases:
        with start_session(settings, num_heads=M2V.num_heads) as session:
            with_and_without = [
                render(session.mesh, settings, make_guidance(session.mesh), 0.0, keep_text=keep_text).latents
                for keep_text in (True, False)
            ]
            equal.append(torch.equal(*with_and_without))
    return equal


def test_kept_text_keys_change_no_bit_on_any_layout() -> None:
    cases = [*CASES[2], ParallelSettings(ulysses=2, weights="fsdp_offload")]
    for equal in run_ranks(_render_with_and_without_kept_text, 2, args=(cases,)):
        assert equal == [True] * len(cases)
