"""The solvers: the original's schedules and steps, order of convergence, resuming bit for bit."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from storymem_dist.diffusion.settings import SOLVERS
from storymem_dist.diffusion.solver import Solver, flow_schedule
from storymem_dist.errors import ConfigError
from tests.helpers.golden import load_golden

GOLDEN_NAMES = {"unipc": "unipc", "dpm++": "dpmpp"}
TENSORS, MANIFEST = load_golden("scheduler")


def velocity_at(latents: Tensor, timestep: int) -> Tensor:
    return torch.sin(latents) * (timestep / 1000) + 0.1 * latents


def walk(solver: Solver, latents: Tensor) -> list[Tensor]:
    """The latents after each of the remaining steps."""
    states = []
    for timestep in solver.timesteps.tolist()[solver.step_index :]:
        latents = solver.step(velocity_at(latents, timestep), latents)
        states.append(latents)
    return states


@pytest.mark.parametrize("table", MANIFEST["tables"], ids=lambda table: table["key"])
def test_timesteps_and_sigmas_are_the_originals(table: dict) -> None:
    solver = Solver(GOLDEN_NAMES[table["solver"]], num_steps=table["steps"], flow_shift=table["shift"])
    assert solver.timesteps.dtype == torch.int64
    assert solver.timesteps.tolist() == table["timesteps"]
    torch.testing.assert_close(solver.sigmas, TENSORS[f"table.{table['key']}.sigmas"], atol=1e-7, rtol=0)
    for boundary, count in table["high_noise_steps"].items():
        assert sum(timestep >= float(boundary) * 1000 for timestep in solver.timesteps.tolist()) == count


@pytest.mark.parametrize("trajectory", MANIFEST["trajectories"], ids=lambda trajectory: trajectory["id"])
def test_a_walk_is_the_originals(trajectory: dict) -> None:
    expected = {key: TENSORS[f"traj.{trajectory['id']}.{key}"] for key in ("noise", "timesteps", "v", "latents")}
    solver = Solver(GOLDEN_NAMES[trajectory["solver"]], num_steps=trajectory["steps"], flow_shift=trajectory["shift"])
    assert torch.equal(solver.timesteps, expected["timesteps"])
    states = torch.stack(walk(solver, expected["noise"]))
    torch.testing.assert_close(states, expected["latents"], **MANIFEST["tolerance"]["latents"])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 14, 15, 40])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_walk_is_that_of_diffusers_own_scheduler(name: str, num_steps: int) -> None:
    solver = Solver(name, num_steps=num_steps, flow_shift=5.0)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = {
        "unipc": lambda: UniPCMultistepScheduler(**flow),
        "dpmpp": lambda: DPMSolverMultistepScheduler(**flow),
        "euler": FlowMatchEulerDiscreteScheduler,
    }[name]()
    scheduler.set_timesteps(num_steps)
    scheduler.timesteps, scheduler.sigmas = solver.timesteps.float(), solver.sigmas
    scheduler.set_begin_index(0)
    ours = theirs = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    for timestep in scheduler.timesteps:
        ours = solver.step(velocity_at(ours, int(timestep)), ours)
        theirs = scheduler.step(velocity_at(theirs, int(timestep)), timestep, theirs, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


def test_the_second_order_solvers_come_nearer_to_the_exact_solution_than_euler() -> None:
    """For v = x the flow dx/dsigma = x ends, from sigma_0, at x * exp(-sigma_0)."""
    start = torch.ones(1, 1, dtype=torch.float32)
    errors = {}
    for name in ("unipc", "dpmpp", "euler"):
        solver = Solver(name, num_steps=20, flow_shift=1.0)
        latents = start
        for _ in range(20):
            latents = solver.step(latents, latents)
        errors[name] = abs(latents.item() - np.exp(-solver.sigmas[0].item()))
    assert errors["euler"] < 0.02
    assert max(errors["unipc"], errors["dpmpp"]) < 0.1 * errors["euler"]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_walk_goes_on_from_any_state_bit_for_bit(name: str) -> None:
    noise = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    solver = Solver(name, num_steps=8, flow_shift=4.0)
    latents, states = noise, [(solver.state_dict(), noise)]
    for timestep in solver.timesteps.tolist():
        latents = solver.step(velocity_at(latents, timestep), latents)
        states.append((solver.state_dict(), latents))
    for state, latents_then in states[:-1]:
        other = Solver(name, num_steps=8, flow_shift=4.0)
        other.load_state_dict(state)
        assert torch.equal(walk(other, latents_then)[-1], latents)


def test_a_state_is_not_changed_by_the_steps_after_it() -> None:
    solver = Solver("unipc", num_steps=6, flow_shift=4.0)
    latents = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for timestep in solver.timesteps.tolist()[:3]:
        latents = solver.step(velocity_at(latents, timestep), latents)
    state = solver.state_dict()
    copy = {key: value.clone() for key, value in state.items()}
    walk(solver, latents)
    assert all(torch.equal(state[key], copy[key]) for key in copy)


def test_a_reset_solver_walks_as_a_new_one() -> None:
    noise = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    solver = Solver("unipc", num_steps=5, flow_shift=4.0)
    first = walk(solver, noise)[-1]
    solver.reset()
    assert torch.equal(walk(solver, noise)[-1], first)


def test_a_state_of_another_solver_or_length_is_refused() -> None:
    solver = Solver("unipc", num_steps=4, flow_shift=4.0)
    walk(solver, torch.ones(1, 1))
    state = solver.state_dict()
    with pytest.raises(ValueError, match="solver euler at step 4 needs"):
        Solver("euler", num_steps=4, flow_shift=4.0).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of step 4; this solver has 3 steps"):
        Solver("unipc", num_steps=3, flow_shift=4.0).load_state_dict(state)


def test_a_finished_walk_has_no_further_step() -> None:
    solver = Solver("euler", num_steps=1, flow_shift=4.0)
    walk(solver, torch.ones(1))
    with pytest.raises(IndexError, match="all 1 steps are done"):
        solver.step(torch.ones(1), torch.ones(1))


def test_given_sigmas_are_taken_as_they_are() -> None:
    sigmas = [1.0, 0.9375, 0.8333, 0.625]
    timesteps, found = flow_schedule("euler", 4, 7.0, sigmas)
    assert timesteps.tolist() == [1000, 937, 833, 625]
    torch.testing.assert_close(found, torch.tensor([*sigmas, 0.0]))
    solver = Solver("euler", num_steps=4, flow_shift=7.0, sigmas=sigmas)
    moved = solver.step(torch.full((2,), 2.0), torch.zeros(2))
    torch.testing.assert_close(moved, torch.full((2,), 2.0 * (0.9375 - 1.0)))


def test_evenly_spaced_euler_levels_under_shift_5_are_those_of_four_step_distillation() -> None:
    timesteps, sigmas = flow_schedule("euler", 4, 5.0)
    assert timesteps.tolist() == [1000, 937, 833, 625]
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 15 / 16, 5 / 6, 5 / 8, 0.0]))


def test_an_unknown_solver_and_rising_sigmas_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.solver='heun' is not allowed"):
        Solver("heun", num_steps=4, flow_shift=4.0)
    with pytest.raises(ConfigError, match=r"sampler\.sigmas=\[0\.5, 0\.6\]"):
        Solver("euler", num_steps=2, flow_shift=4.0, sigmas=[0.5, 0.6])


@pytest.mark.parametrize("num_steps", [1, 2, 40, 1000])
@pytest.mark.parametrize("flow_shift", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("name", ["unipc", "dpmpp"])
def test_every_allowed_schedule_ends_at_the_prediction_of_a_constant_velocity(
    name: str, flow_shift: float, num_steps: int
) -> None:
    """With v constant, x0 = x - sigma*v is the same at every step, whatever the solver's order."""
    solver = Solver(name, num_steps=num_steps, flow_shift=flow_shift)
    latents, velocity = torch.tensor([0.7, -1.2]), torch.tensor([0.3, 2.0])
    expected = latents - solver.sigmas[0] * velocity
    for _ in range(num_steps):
        latents = solver.step(velocity, latents)
    torch.testing.assert_close(latents, expected, atol=2e-4, rtol=2e-4)
