"""A shot that was left at any of its steps goes on in another parallel layout, from the file, to the same latents."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped, PromptEmbeds, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import Guidance, LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.solver import Solver
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.loading import place_experts
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import CONFIG, largest_error, make_dit

TOLERANCE = 1e-5
NUM_STEPS = 8
STEPS = range(NUM_STEPS)
SHOT = "the same in every layout"
M2V = replace(CONFIG, in_dim=36)
LAYOUTS = {
    "ulysses": {"ulysses": 2},
    "cfg": {"cfg": 2},
    "fsdp": {"ulysses": 2, "weights": "fsdp"},
}


class Shot:
    """One shot of eight steps, four per expert; 45 tokens, one memory keyframe among them."""

    def __init__(self, high: WanDiT, low: WanDiT, guidance: Guidance, **options: object) -> None:
        self._timesteps = Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0).timesteps
        self._guidance = guidance
        self._experts = ExpertPair(
            high_noise=high,
            low_noise=low,
            boundary_ratio=float(self._timesteps[3:5].float().mean()) / 1000,
            guidance_scale_high=3.5,
            guidance_scale_low=3.0,
            **options,
        )

    def render(self, *, resume: DenoiseState | None = None, stop_at: int = NUM_STEPS) -> Tensor:
        """The latents; raises ``DenoiseStopped`` when ``stop_at`` steps are done."""
        grid = LatentGrid(num_frames=5, height=48, width=80, num_memory=1)
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(grid.latent_shape, generator=generator)
        condition = torch.randn(20, *grid.latent_shape[1:], generator=generator)
        prompt = PromptEmbeds(
            prompt_LE=torch.randn(9, CONFIG.text_dim, generator=generator),
            negative_LE=torch.randn(4, CONFIG.text_dim, generator=generator),
        )
        step = 0 if resume is None else resume.step

        def should_stop() -> bool:
            nonlocal step
            step += 1
            return step > stop_at

        solver = Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0)
        return denoise(
            self._experts,
            self._guidance,
            solver,
            noise,
            condition,
            prompt,
            grid,
            device="cpu",
            fingerprint=SHOT,
            resume=resume,
            should_stop=should_stop,
        )

    def leave(self, step: int, file: Path | None) -> None:
        """Render up to ``step`` and leave the shot there, in ``file``."""
        with pytest.raises(DenoiseStopped) as stopped:
            self.render(stop_at=step)
        assert stopped.value.state.step == step
        if file is not None:
            stopped.value.state.save(file)

    def go_on(self, file: Path) -> Tensor:
        """Render what is left of the shot in ``file``."""
        return self.render(resume=DenoiseState.load(file, fingerprint=SHOT))


def one_device() -> Shot:
    return Shot(make_dit(M2V, seed=0), make_dit(M2V, seed=1), LocalGuidance())


def _in_every_layout(folder: Path, layouts: Sequence[str]) -> dict[str, dict[str, object]]:
    """In each layout: the whole shot, the shots that others and this layout left, gone on with."""
    dist.init_process_group("gloo")
    results = {}
    for name in layouts:
        settings = ParallelSettings(**LAYOUTS[name])
        with start_session(settings, num_heads=M2V.num_heads) as session:
            experts = {
                expert: parallelize(make_dit(M2V, seed=seed), session.mesh, settings)
                for seed, expert in enumerate(("high_noise", "low_noise"))
            }
            _, residency = place_experts(experts.items(), device=session.device, weights=settings.weights, swap=False)
            shot = Shot(*experts.values(), make_guidance(session.mesh), residency=residency)
            for step in STEPS:
                shot.leave(step, folder / f"{name}-{step}.safetensors" if session.is_leader else None)
            session.leader_decides(lambda: None)  # the files are there
            results[name] = {
                "whole": shot.render(),
                "own": [shot.go_on(folder / f"{name}-{step}.safetensors") for step in STEPS],
                "others": [shot.go_on(folder / f"one-{step}.safetensors") for step in STEPS],
            }
    return results


def test_left_at_every_step_a_shot_goes_on_in_another_layout(tmp_path: Path) -> None:
    shot = one_device()
    expected = shot.render()
    for step in STEPS:
        shot.leave(step, tmp_path / f"one-{step}.safetensors")
    for results in run_ranks(_in_every_layout, 2, (tmp_path, tuple(LAYOUTS))):
        for layout, result in results.items():
            for step in STEPS:
                assert torch.equal(result["own"][step], result["whole"]), f"{layout} left and resumed at step {step}"
                error = largest_error(result["others"][step], expected)
                assert error <= TOLERANCE, f"one device left at step {step}, {layout} went on: {error}"
    for layout in LAYOUTS:
        for step in STEPS:
            error = largest_error(shot.go_on(tmp_path / f"{layout}-{step}.safetensors"), expected)
            assert error <= TOLERANCE, f"{layout} left at step {step}, one device went on: {error}"


def test_what_a_step_left_behind_matters(tmp_path: Path) -> None:
    """The tolerance would notice a checkpoint whose latents or solver memory are off by a hundredth."""
    shot, file = one_device(), tmp_path / "left.safetensors"
    expected = shot.render()
    shot.leave(4, file)
    state = DenoiseState.load(file, fingerprint=SHOT)
    for changed in (
        replace(state, latents=state.latents * 1.01),
        replace(
            state,
            solver_state={k: v if k == "step_index" else v * 1.01 for k, v in state.solver_state.items()},
        ),
    ):
        assert largest_error(shot.render(resume=changed), expected) > 10 * TOLERANCE
