"""Whole runs of the original program on tiny weights, from token ids to decoded video, reproduced by our parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import ConditionBuilder
from storymem_dist.diffusion.denoise import DenoiseState, PromptEmbeds, denoise
from storymem_dist.diffusion.experts import Expert, ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.seeds import initial_noise
from storymem_dist.diffusion.solver import Solver
from storymem_dist.models.wan.vae import WanVae
from tests.helpers.golden import load_golden, strip_prefix
from tests.helpers.golden_models import golden_dit, golden_text_encoder, golden_vae, write_lora

FIRST_RELEASE, CORRECTED_RELEASE = "end_to_end", "end_to_end_memory_rope"
RUNS = [
    (fixture, run["id"]) for fixture in (FIRST_RELEASE, CORRECTED_RELEASE) for run in load_golden(fixture)[1]["runs"]
]
SOLVER_NAMES = {"unipc": "unipc", "dpm++": "dpmpp"}
RELATIVE_TOLERANCE = 1e-4


class ContiguousGrid(LatentGrid):
    """Numbers memory and clip 0, 1, 2, ... as the first release did."""

    def temporal_positions(self) -> Tensor:
        return torch.arange(self.num_latents)


class RecordingGuidance(LocalGuidance):
    """Keeps what every pass of an expert gave."""

    def __init__(self) -> None:
        self.passes: list[Tensor] = []

    def velocity(self, expert: Expert, *inputs: Any) -> Tensor:
        handle = expert.module.register_forward_hook(lambda _module, _inputs, out: self.passes.append(out[0]))
        try:
            return super().velocity(expert, *inputs)
        finally:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class GoldenRun:
    """One run of a fixture: its parameters, inputs and expected results."""

    fixture: str
    parameters: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    tolerance: dict[str, Any]

    @property
    def is_m2v(self) -> bool:
        return self.parameters["kind"] == "m2v"

    @property
    def images(self) -> dict[str, Tensor]:
        """Memory keyframes, in order, by name."""
        names = sorted(key for key in self.inputs if key.startswith("img.mem")) if self.is_m2v else []
        return {name: self.inputs[name].movedim(-1, -3) for name in names}

    @property
    def first_frame(self) -> Tensor | None:
        return self.inputs["img.first"].movedim(-1, -3) if self.parameters.get("first") else None

    @property
    def grid(self) -> LatentGrid:
        """The original takes the size of an M2V clip from an image's shape and an area."""
        if self.is_m2v:
            sized_by = next(iter(self.images.values())) if self.first_frame is None else self.first_frame
            area, ratio = self.parameters["max_area"], sized_by.shape[1] / sized_by.shape[2]
            height, width = (round(side**0.5) // 16 * 16 for side in (area * ratio, area / ratio))
        else:
            width, height = self.parameters["size"]
        grid_class = ContiguousGrid if self.fixture == FIRST_RELEASE else LatentGrid
        return grid_class(
            num_frames=self.parameters["frame_num"], height=height, width=width, num_memory=len(self.images)
        )

    def experts(self, folder: Path) -> ExpertPair:
        kind, guide = self.parameters["kind"], self.parameters["guide"]
        guide_low, guide_high = guide if isinstance(guide, list) else (guide, guide)
        modules = {}
        for noise in ("high", "low"):
            lora = write_lora(folder / f"{noise}.safetensors", strip_prefix(self.inputs, f"lora.{noise}."))
            weights = strip_prefix(self.inputs, f"{kind}.{noise}.")
            modules[noise] = golden_dit(self.config[kind], weights, lora if self.is_m2v else None)
        return ExpertPair(
            high_noise=modules["high"],
            low_noise=modules["low"],
            boundary_ratio=self.parameters["boundary"],
            guidance_scale_high=guide_high,
            guidance_scale_low=guide_low,
        )

    def prompt(self) -> PromptEmbeds:
        ids = {name: self.inputs[f"ids.{name}"].tolist() for name in ("a", "neg")}
        encoder = golden_text_encoder(strip_prefix(self.inputs, "t5."), ids)
        prompt, negative = encoder.encode(["a", "neg"])
        return PromptEmbeds(prompt_LE=prompt, negative_LE=negative)

    def condition(self, vae: WanVae) -> Tensor | None:
        if not self.is_m2v:
            return None
        builder, memory, first = ConditionBuilder(vae, "cpu"), list(self.images.values()), self.first_frame
        built = builder.build("m2v" if first is None else "mi2v", self.grid, memory, first_frame=first)
        if self.fixture == FIRST_RELEASE and self.parameters["id"] == "mi2v":
            # The first release's bug, which we do not ship: the mask marks a first frame, the latents show none.
            blank = builder.build("m2v", self.grid, memory)
            return torch.cat([built[:4], blank[4:]])
        return built

    def solver(self) -> Solver:
        name = SOLVER_NAMES[self.parameters["solver"]]
        return Solver(name, num_steps=self.parameters["steps"], flow_shift=self.parameters["shift"])

    def assert_like(self, name: str, ours: Tensor, expected: Tensor, tolerance_name: str) -> None:
        tolerance = self.tolerance[tolerance_name]
        assert ours.shape == expected.shape
        excess = (ours - expected).abs() - tolerance["atol"] - tolerance.get("rtol", 0.0) * expected.abs()
        assert excess.max() <= 0, f"{name} is {excess.max():.1e} beyond the fixture's tolerance"
        relative = ((ours - expected).norm() / expected.norm()).item()
        assert relative < RELATIVE_TOLERANCE, f"{name} has relative error {relative:.1e}"


@pytest.fixture(params=RUNS, ids="-".join)
def golden(request: pytest.FixtureRequest) -> GoldenRun:
    fixture, run_id = request.param
    inputs, inputs_manifest = load_golden(FIRST_RELEASE)
    expected, manifest = load_golden(fixture)
    return GoldenRun(
        fixture=fixture,
        parameters=next(run for run in manifest["runs"] if run["id"] == run_id),
        config=inputs_manifest["config"],
        inputs=inputs,
        expected=strip_prefix(expected, f"run.{run_id}."),
        tolerance=manifest["tolerance"],
    )


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> WanVae:
    return golden_vae(tmp_path_factory.mktemp("vae"))


def test_a_run_gives_the_originals_embeddings_condition_latents_and_video(
    golden: GoldenRun, vae: WanVae, tmp_path: Path
) -> None:
    grid, solver, prompt, condition = golden.grid, golden.solver(), golden.prompt(), golden.condition(vae)
    noise = initial_noise(golden.parameters["seed"], grid.latent_shape)
    expected, guidance = golden.expected, RecordingGuidance()
    states: list[DenoiseState] = []
    experts_used: list[str] = []

    latents = denoise(
        golden.experts(tmp_path),
        guidance,
        solver,
        noise,
        condition,
        prompt,
        grid,
        device="cpu",
        on_step=lambda info: experts_used.append(info.expert),
        checkpoint_every_steps=1,
        on_checkpoint=states.append,
    )

    golden.assert_like("context", prompt.prompt_LE, expected["context"], "context")
    golden.assert_like("negative context", prompt.negative_LE, expected["context_null"], "context")
    assert torch.equal(noise, expected["noise"])
    assert torch.equal(solver.timesteps, expected["timesteps"])
    assert [name == "high_noise" for name in experts_used] == expected["expert_is_high"].bool().tolist()
    assert grid.num_tokens == expected["seq_len"].item()
    if condition is not None:
        golden.assert_like("condition", condition, expected["y"], "y")
    for name, passes in (("cond", guidance.passes[0::2]), ("uncond", guidance.passes[1::2])):
        if name in expected:
            golden.assert_like(name, torch.stack(passes), expected[name], "cond/uncond")
    trajectory = torch.stack([*(state.latents for state in states), latents])
    golden.assert_like("latents", trajectory, expected["latents"], "latents")
    video = vae.decode(grid.clip_latents(latents))
    golden.assert_like("video", video, expected["video"], "video")


def test_the_two_temporal_numberings_are_distinguished_by_the_fixtures() -> None:
    first, _ = load_golden(FIRST_RELEASE)
    corrected, _ = load_golden(CORRECTED_RELEASE)
    difference = first["run.m2v.latents"][-1] - corrected["run.m2v.latents"][-1]
    assert difference.norm() / corrected["run.m2v.latents"][-1].norm() > 100 * RELATIVE_TOLERANCE
