"""The flow-matching solvers: from a velocity at one noise level to the latents at the next.

UniPC, DPM-Solver++ 2M and Euler (diffusers' implementations) are linear: the next latents are a weighted sum of the
present latents, the velocity and a few tensors kept from earlier steps. The weights depend on the schedule only. So
diffusers' scheduler runs once, on the CPU, on unit vectors; this gives the weights of all steps. A step is then a few
fused multiply-adds on the device and never waits for it (diffusers' UniPC does: it moves scalars to the device and
solves a 2x2 system there). The state is those few tensors and a step number, so a denoise can resume in another process
bit for bit. Knows nothing about models, guidance or devices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from storymem_dist.diffusion.settings import SOLVERS, check_sigmas
from storymem_dist.errors import require_one_of

NUM_TRAIN_TIMESTEPS = 1000

# Columns of a row of weights: the present latents, the velocity, then the kept tensors.
_NUM_INPUTS = 2

# One weighted sum: (column, weight) for every weight that is not zero.
_Row: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepWeights:
    """How one step computes its results; a kept tensor that does not exist yet has no row."""

    latents: _Row
    kept: tuple[_Row | None, ...]


def flow_schedule(
    solver: str, num_steps: int, flow_shift: float, sigmas: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Timesteps int64 ``[n]`` and sigmas float32 ``[n+1]`` (final zero included) of a schedule.

    Base levels fall evenly towards 0 from 1 - 1/1000 rounded to float32 (UniPC: Wan's largest training sigma) or from
    1 (the others), and are shifted by ``s*x / (1 + (s-1)*x)``. Explicit ``sigmas`` replace these levels. A timestep is
    ``sigma * 1000`` cut to an integer, for the model and the choice of expert; the solver uses sigma.
    """
    require_one_of("sampler.solver", solver, SOLVERS)
    if len(sigmas):
        check_sigmas(list(sigmas), where="sampler.")
        levels = np.array(sigmas, dtype=np.float64)
    else:
        start = float(np.float32(1.0 - 1.0 / NUM_TRAIN_TIMESTEPS)) if solver == "unipc" else 1.0
        base = np.linspace(start, 0.0, num_steps + 1)[:-1]
        levels = flow_shift * base / (1.0 + (flow_shift - 1.0) * base)
    timesteps = (levels * NUM_TRAIN_TIMESTEPS).astype(np.int64)
    return torch.from_numpy(timesteps), torch.from_numpy(np.append(levels, 0.0).astype(np.float32))


class Solver:
    """Takes one shot through the noise levels; make a new one (or call ``reset``) for every shot.

    ``timesteps`` is int64 ``[num_steps]`` and ``sigmas`` float32 ``[num_steps + 1]``, both on the CPU. ``step_index``
    is the next step. UniPC has order 2 ("bh2") with predictor and corrector, first order on its first and last step;
    DPM++ is 2M midpoint, first order on its first and last step; Euler keeps no tensors.
    """

    def __init__(self, name: str, *, num_steps: int, flow_shift: float, sigmas: Sequence[float] = ()) -> None:
        self.name = name
        self.timesteps, self.sigmas = flow_schedule(name, num_steps, flow_shift, sigmas)
        self._weights = _tabulate(_diffusers_scheduler(name, self.timesteps, self.sigmas), self.timesteps)
        self.reset()

    @property
    def num_steps(self) -> int:
        """Number of steps of the schedule."""
        return len(self.timesteps)

    def reset(self) -> None:
        """Go back to the first step."""
        self.step_index = 0
        self._kept: list[Tensor | None] = [None] * len(self._weights[0].kept)

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """The latents after this step, float32; both inputs have one shape and lie on one device.

        ``velocity`` is the model's at ``timesteps[step_index]``, guidance included. Nothing is changed in place. The
        caller must not change ``latents`` in place afterwards: UniPC keeps a reference. Raises ``IndexError`` after the
        last step.
        """
        if self.step_index >= self.num_steps:
            raise IndexError(f"all {self.num_steps} steps are done")
        weights = self._weights[self.step_index]
        columns = (latents.float(), velocity.float(), *self._kept)
        self._kept = [None if row is None else _weighted_sum(row, columns) for row in weights.kept]
        self.step_index += 1
        return _weighted_sum(weights.latents, columns)

    def state_dict(self) -> dict[str, Tensor]:
        """The state after the steps so far: the step number (int64) and the kept tensors (float32)."""
        kept = {f"kept.{i}": tensor for i, tensor in enumerate(self._kept) if tensor is not None}
        return {"step_index": torch.tensor(self.step_index), **kept}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str | None = None) -> None:
        """Continue from ``state``, with the kept tensors on ``device`` (None: the device they are on).

        Raises ``ValueError`` when the state belongs to another solver or number of steps.
        """
        step_index = int(state["step_index"])
        if not 0 <= step_index <= self.num_steps:
            raise ValueError(f"the state is of step {step_index}; this solver has {self.num_steps} steps")
        rows = self._weights[step_index - 1].kept if step_index else (None,) * len(self._kept)
        needed = {f"kept.{i}" for i, row in enumerate(rows) if row is not None}
        if needed != state.keys() - {"step_index"}:
            raise ValueError(
                f"solver {self.name} at step {step_index} needs {sorted(needed)}; the state has {sorted(state)}"
            )
        self.step_index = step_index
        self._kept = [state[f"kept.{i}"].to(device) if row is not None else None for i, row in enumerate(rows)]


def _weighted_sum(row: _Row, columns: Sequence[Tensor | None]) -> Tensor:
    """Sum of the row's columns: one product, then in-place multiply-adds. A single column of weight 1 is returned."""
    total: Tensor | None = None
    for index, weight in row:
        column = columns[index]
        assert column is not None, "a weight names a tensor that does not exist yet"
        if len(row) == 1 and weight == 1.0:
            return column
        total = column * weight if total is None else total.add_(column, alpha=weight)
    assert total is not None, "a row of weights is empty"
    return total


def _diffusers_scheduler(name: str, timesteps: Tensor, sigmas: Tensor) -> Any:
    """The scheduler behind ``name``, on our own levels (diffusers spaces them differently), before its first step."""
    # Here, not above, so that experts can be used without diffusers.
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow: dict[str, Any] = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS, "use_flow_sigmas": True}
    scheduler: Any
    if name == "unipc":
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", solver_order=2, **flow)
    elif name == "dpmpp":
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", solver_order=2, **flow)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    scheduler.set_timesteps(len(timesteps))
    scheduler.timesteps, scheduler.sigmas = timesteps, sigmas
    scheduler.set_begin_index(0)
    return scheduler


def _tabulate(scheduler: Any, timesteps: Tensor) -> list[_StepWeights]:
    """Run a scheduler on unit vectors; its results are the weights of every step."""
    num_columns = _NUM_INPUTS + len(_kept_tensors(scheduler))
    unit = torch.eye(num_columns, dtype=torch.float64).unsqueeze(1)  # one [1, num_columns] "batch" per column
    table = []
    for timestep in timesteps:
        present = [tensor is not None for tensor in _kept_tensors(scheduler)]
        _set_kept_tensors(scheduler, [unit[_NUM_INPUTS + i] if here else None for i, here in enumerate(present)])
        latents = scheduler.step(unit[1], timestep.float(), unit[0], return_dict=False)[0]
        kept = tuple(None if tensor is None else _row(tensor) for tensor in _kept_tensors(scheduler))
        table.append(_StepWeights(latents=_row(latents), kept=kept))
    return table


def _row(vector: Tensor) -> _Row:
    weights = vector.flatten().tolist()
    if not np.isfinite(weights).all():
        raise ArithmeticError(f"a solver weight is not finite: {weights}")
    return tuple((index, weight) for index, weight in enumerate(weights) if weight != 0.0)


def _kept_tensors(scheduler: Any) -> list[Tensor | None]:
    """Tensors that a scheduler keeps between steps: UniPC's last corrected sample and the last predictions of x0."""
    kept: list[Tensor | None] = [scheduler.last_sample] if hasattr(scheduler, "last_sample") else []
    return kept + list(getattr(scheduler, "model_outputs", ()))


def _set_kept_tensors(scheduler: Any, kept: Sequence[Tensor | None]) -> None:
    rest = list(kept)
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample = rest.pop(0)
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs = rest
