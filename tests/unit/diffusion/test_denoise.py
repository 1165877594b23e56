"""The denoise loop: its steps, stopping and resuming bit for bit, and its failures."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped, StepInfo, denoise
from storymem_dist.diffusion.experts import Expert, ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.settings import SOLVERS
from storymem_dist.diffusion.solver import Solver
from storymem_dist.errors import MachineError, RunFolderError, ShotError
from tests.helpers.fake_experts import fake_experts, fake_shot

NUM_STEPS = 8


def render(solver_name: str = "unipc", **options: Any) -> Tensor:
    grid, noise, condition, prompt = fake_shot()
    solver = Solver(solver_name, num_steps=NUM_STEPS, flow_shift=4.0)
    experts: ExpertPair = options.pop("experts", None) or fake_experts()
    guidance = options.pop("guidance", LocalGuidance())
    return denoise(
        experts, guidance, solver, noise, condition, prompt, grid, device="cpu", fingerprint="shot-a", **options
    )


def stop_before(step: int) -> Callable[[], bool]:
    """Returns true when called before ``step`` (counted from 0)."""
    asked = iter(range(NUM_STEPS))
    return lambda: next(asked) == step


def stopped_state(step: int, solver_name: str = "unipc") -> DenoiseState:
    with pytest.raises(DenoiseStopped) as stopped:
        render(solver_name, should_stop=stop_before(step))
    return stopped.value.state


class PoisonGuidance(LocalGuidance):
    """Puts a NaN into the velocity of one step."""

    def __init__(self, timestep: int, value: float = float("nan")) -> None:
        self._timestep, self._value = timestep, value

    def velocity(self, expert: Expert, x_BCTHW: Tensor, timestep_B: Tensor, *rest: Any) -> Tensor:
        velocity = super().velocity(expert, x_BCTHW, timestep_B, *rest)
        if int(timestep_B) == self._timestep:
            velocity[0, 3, 1, 0, 0] = self._value
        return velocity


def timestep_of(step: int) -> int:
    return int(Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0).timesteps[step])


def test_the_loop_is_solver_guidance_and_condition_put_together() -> None:
    grid, noise, condition, prompt = fake_shot()
    pair, solver, latents = fake_experts(), Solver("unipc", num_steps=NUM_STEPS, flow_shift=4.0), noise
    for timestep in solver.timesteps.tolist():
        module = pair.select(timestep).module
        x = torch.cat([latents, condition])[None]
        cond, uncond = (
            module(x, torch.tensor([timestep]), context[None], grid.temporal_positions())
            for context in (prompt.prompt_LE, prompt.negative_LE)
        )
        latents = solver.step((uncond + 3.5 * (cond - uncond))[0], latents)
    torch.testing.assert_close(render(), latents)


def test_a_text_to_video_shot_has_no_condition_channels() -> None:
    grid, noise, condition, prompt = fake_shot(num_memory=0)
    assert condition is None
    seen: list[tuple[int, ...]] = []
    pair = fake_experts()
    for timestep in (999, 0):
        pair.select(timestep).module.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
    solver = Solver("euler", num_steps=2, flow_shift=4.0)
    latents = denoise(pair, LocalGuidance(), solver, noise, None, prompt, grid, device="cpu")
    assert latents.shape == noise.shape
    assert set(seen) == {(1, *grid.latent_shape)}


def test_every_step_is_reported_with_its_expert() -> None:
    infos: list[StepInfo] = []
    render(on_step=infos.append)
    assert [info.step for info in infos] == list(range(1, NUM_STEPS + 1))
    assert [info.timestep for info in infos] == [timestep_of(step) for step in range(NUM_STEPS)]
    assert [info.expert for info in infos] == ["high_noise" if info.timestep >= 900 else "low_noise" for info in infos]
    assert {info.expert for info in infos} == {"high_noise", "low_noise"}
    assert all(info.elapsed_seconds > 0 and info.num_steps == NUM_STEPS for info in infos)


@pytest.mark.parametrize("solver_name", SOLVERS)
def test_a_shot_stopped_before_any_step_goes_on_to_the_same_latents(solver_name: str, tmp_path: Path) -> None:
    uninterrupted = render(solver_name)
    for step in range(NUM_STEPS):
        state = stopped_state(step, solver_name)
        assert state.step == step
        state.save(tmp_path / "state.safetensors")
        loaded = DenoiseState.load(tmp_path / "state.safetensors", fingerprint="shot-a")
        steps: list[int] = []
        resumed = render(solver_name, resume=loaded, on_step=lambda info, steps=steps: steps.append(info.step))
        assert torch.equal(resumed, uninterrupted)
        assert steps == list(range(step + 1, NUM_STEPS + 1))


def test_a_shot_goes_on_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    for step in range(NUM_STEPS):
        stopped_state(step).save(tmp_path / f"{step}.safetensors")
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from storymem_dist.diffusion.denoise import DenoiseState\n"
        "from tests.unit.diffusion.test_denoise import NUM_STEPS, render\n"
        "torch.set_num_threads(1)\n"
        "folder = Path(sys.argv[1])\n"
        "states = [DenoiseState.load(folder / f'{n}.safetensors', fingerprint='shot-a') for n in range(NUM_STEPS)]\n"
        "save_file({str(n): render(resume=s) for n, s in enumerate(states)}, folder / 'resumed.safetensors')\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root, timeout=120)
    resumed, uninterrupted = load_file(tmp_path / "resumed.safetensors"), render()
    assert len(resumed) == NUM_STEPS
    assert all(torch.equal(latents, uninterrupted) for latents in resumed.values())


def test_checkpoints_come_at_their_interval_but_not_after_the_last_step() -> None:
    states: list[DenoiseState] = []
    latents = render(checkpoint_every_steps=2, on_checkpoint=states.append)
    assert [state.step for state in states] == [2, 4, 6]
    assert all(torch.equal(render(resume=state), latents) for state in states)


def test_a_stop_that_is_not_asked_for_changes_nothing() -> None:
    assert torch.equal(render(should_stop=lambda: False), render())


@pytest.mark.parametrize("step", range(NUM_STEPS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_fail_the_shot_naming_step_and_expert(step: int, value: float) -> None:
    with pytest.raises(ShotError) as failed:
        render(guidance=PoisonGuidance(timestep_of(step), value))
    expert = "high_noise" if timestep_of(step) >= 900 else "low_noise"
    assert f"after step {step + 1} of 8, timestep {timestep_of(step)}, {expert} expert" in str(failed.value)


def test_latents_that_are_not_finite_are_never_handed_out() -> None:
    poison = PoisonGuidance(timestep_of(2))
    states: list[DenoiseState] = []
    with pytest.raises(ShotError, match="after step 3 of 8"):
        render(guidance=poison, checkpoint_every_steps=1, on_checkpoint=states.append)
    assert [state.step for state in states] == [1, 2]
    with pytest.raises(ShotError, match="after step 3 of 8"):
        render(guidance=poison, should_stop=stop_before(5))


def test_a_long_shot_fails_within_eight_steps_of_the_first_nan() -> None:
    grid, noise, condition, prompt = fake_shot()
    solver, steps = Solver("euler", num_steps=100, flow_shift=4.0), []
    poison = PoisonGuidance(int(solver.timesteps[10]))
    with pytest.raises(ShotError, match="after step 11 of 100"):
        denoise(fake_experts(), poison, solver, noise, condition, prompt, grid, device="cpu", on_step=steps.append)
    assert len(steps) < 11 + 8


def test_a_state_of_another_shot_is_refused(tmp_path: Path) -> None:
    state = stopped_state(3)
    state.save(tmp_path / "state.safetensors")
    with pytest.raises(RunFolderError, match=r"is of another shot or other settings .*'shot-a', expected 'shot-b'"):
        DenoiseState.load(tmp_path / "state.safetensors", fingerprint="shot-b")
    for other in (
        replace(state, fingerprint="shot-b"),
        replace(state, solver_name="dpmpp"),
        replace(state, num_steps=40),
        replace(state, latents=state.latents[:, 1:]),
    ):
        with pytest.raises(RunFolderError, match="does not belong to this shot"):
            render(resume=other)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign"])
def test_a_state_file_that_is_damaged_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    if damage == "foreign":
        save_file({"x": torch.ones(1)}, path)
    elif damage != "missing":
        stopped_state(3).save(path)
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -100])
    with pytest.raises(RunFolderError, match=r"state\.safetensors"):
        DenoiseState.load(path, fingerprint="shot-a")


@pytest.mark.parametrize("seed", range(30))
def test_a_changed_bit_of_a_state_file_is_found(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    stopped_state(3).save(path)
    data, random = bytearray(path.read_bytes()), Random(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    place = random.randrange(*((0, header), (header, len(data)))[seed % 2])
    data[place] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    try:
        state = DenoiseState.load(path, fingerprint="shot-a")
    except RunFolderError as error:
        assert "state.safetensors" in str(error)
    else:  # the name of the checksum itself has changed
        assert b'"sha256"' not in data
        assert torch.equal(state.latents, stopped_state(3).latents)


@pytest.mark.parametrize(
    ("changes", "tensors", "words"),
    [
        ({"fingerprint": None}, {}, "damaged: 'fingerprint'"),
        ({"solver_name": None}, {}, "damaged: 'solver_name'"),
        ({"num_steps": "many"}, {}, "damaged: .*'many'"),
        ({"num_steps": "2"}, {}, "its step is none"),
        ({}, {"latents": None}, "damaged: 'latents'"),
        ({}, {"solver.step_index": None}, "damaged: 'step_index'"),
        ({}, {"solver.step_index": torch.tensor([3])}, "its step is none"),
        ({}, {"solver.step_index": torch.tensor(-1)}, "its step is none"),
        ({}, {"latents": torch.full((16, 1, 2, 2), torch.nan)}, "no finite float32 tensor"),
        ({}, {"solver.kept.0": torch.zeros(3)}, "kept.0 is no finite float32 tensor of the shape of the latents"),
    ],
)
def test_a_state_file_with_parts_that_no_shot_has_is_refused(
    changes: dict[str, str | None], tensors: dict[str, torch.Tensor | None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    stopped_state(3).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"} | changes
    save_file(
        {key: value for key, value in (load_file(path) | tensors).items() if value is not None},
        path,
        {key: value for key, value in metadata.items() if value is not None},
    )
    with pytest.raises(RunFolderError, match=rf"state\.safetensors is damaged: .*{words.removeprefix('damaged: ')}"):
        DenoiseState.load(path, fingerprint="shot-a")


def test_a_state_that_cannot_be_written_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    state = stopped_state(2)
    with pytest.raises(MachineError, match="cannot be written"):
        state.save(tmp_path / "missing" / "state.safetensors")
    (tmp_path / "state.safetensors").mkdir()
    with pytest.raises(MachineError, match="cannot be written"):
        state.save(tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_newer_state_replaces_an_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for step in (2, 5):
        stopped_state(step).save(path)
    assert DenoiseState.load(path, fingerprint="shot-a").step == 5
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("part", ["noise", "condition"])
def test_inputs_of_another_size_than_the_grids_are_refused(part: str) -> None:
    grid, noise, condition, prompt = fake_shot()
    noise, condition = (noise[:, 1:], condition) if part == "noise" else (noise, condition[:, 1:])
    with pytest.raises(ValueError, match=f"{part} has shape"):
        denoise(
            fake_experts(),
            LocalGuidance(),
            Solver("euler", num_steps=1, flow_shift=4.0),
            noise,
            condition,
            prompt,
            grid,
            device="cpu",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("solver_name", SOLVERS)
def test_nothing_inside_a_step_waits_for_the_device(solver_name: str) -> None:
    grid, noise, condition, prompt = fake_shot()
    solver = Solver(solver_name, num_steps=7, flow_shift=4.0)
    experts = fake_experts()
    for timestep in (999, 0):
        experts.select(timestep).module.cuda().forward = lambda x, *_: x[:, :16] * 0.5

    def make_waiting_an_error_until_the_last_step(info: StepInfo) -> None:
        torch.cuda.set_sync_debug_mode("error" if info.step < 7 else "default")

    try:
        latents = denoise(
            experts,
            LocalGuidance(),
            solver,
            noise,
            condition,
            prompt,
            grid,
            device="cuda",
            on_step=make_waiting_an_error_until_the_last_step,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latents.is_cuda
