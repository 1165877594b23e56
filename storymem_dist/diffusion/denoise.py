"""The denoise loop of one shot: from noise to latents. It can stop between steps and resume later.

Knows solver, experts and guidance by their interfaces only; knows nothing about ranks or run folders. Every rank of a
replica runs the same loop on the same full latents. Nothing inside a step waits for the device: the check for NaN runs
on the device, and the host reads its results every few steps.

Legend: C channels, K+T latent times of memory and clip, h/w latent size, L text tokens, E text width.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import Guidance
from storymem_dist.diffusion.latent_grid import LATENT_CHANNELS, LatentGrid
from storymem_dist.diffusion.solver import Solver
from storymem_dist.errors import RunFolderError, ShotError
from storymem_dist.files import canonical_json, read_limited, safetensors_metadata, write_bytes
from storymem_dist.hardware import machine_fault

_STATE_FORMAT = "storymem-denoise-state-1"
_MAX_STATE_BYTES = 4 * 2**30
_CHECK_FINITE_EVERY = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEmbeds:
    """Text encoder outputs cut to their length: ``prompt_LE``, and ``negative_LE`` unless guidance is off (scale 1)."""

    prompt_LE: Tensor
    negative_LE: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInfo:
    """One finished step. ``step`` counts from 1; ``reused``: the step cache skipped most of its work.

    ``elapsed_seconds`` is the host's time since the end of the previous step; an asynchronous device may lag behind by
    less than a step.
    """

    step: int
    num_steps: int
    timestep: int
    expert: str
    elapsed_seconds: float
    reused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseState:
    """A shot between two steps: all that is needed to resume it, bit for bit, in this process or another.

    The solvers are deterministic, so there is no random state. ``fingerprint`` identifies the shot and all settings
    that change its pixels.
    """

    latents: Tensor
    solver_state: dict[str, Tensor]
    solver_name: str
    num_steps: int
    fingerprint: str

    @property
    def step(self) -> int:
        """Number of finished steps, which is also the index of the next step."""
        return int(self.solver_state["step_index"])

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically and durably. Raises ``MachineError`` when that fails."""
        tensors = {"latents": self.latents} | {f"solver.{key}": value for key, value in self.solver_state.items()}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        metadata = {
            "format": _STATE_FORMAT,
            "fingerprint": self.fingerprint,
            "solver_name": self.solver_name,
            "num_steps": str(self.num_steps),
        }
        try:
            write_bytes(path, save(tensors, metadata | {"sha256": _checksum(tensors, metadata)}))
        except OSError as error:
            what = f"the step checkpoint {path} cannot be written: {error.strerror or error}"
            raise machine_fault(error, while_writing=True, what=what) or RunFolderError(what) from error

    @classmethod
    def load(cls, path: Path, *, fingerprint: str) -> "DenoiseState":
        """Read a state back (tensors on the CPU).

        Raises ``RunFolderError`` when the file is missing, damaged, or belongs to another shot or other settings.
        """
        try:
            data = read_limited(path, _MAX_STATE_BYTES)
            tensors, metadata = load(data), safetensors_metadata(data)
        except (OSError, SafetensorError) as error:
            raise RunFolderError(f"the step checkpoint {path} cannot be read: {error}") from error
        if metadata.get("format") != _STATE_FORMAT:
            raise RunFolderError(f"{path} is not a step checkpoint (format {metadata.get('format')!r})")
        checksum = metadata.pop("sha256", None)
        if checksum is not None and checksum != _checksum(tensors, metadata):  # a version before this one wrote none
            raise RunFolderError(f"the step checkpoint {path} is damaged: its checksum does not match")
        try:
            state = cls(
                latents=tensors.pop("latents"),
                solver_state={key.removeprefix("solver."): value for key, value in tensors.items()},
                solver_name=metadata["solver_name"],
                num_steps=int(metadata["num_steps"]),
                fingerprint=metadata["fingerprint"],
            )
            state._check_parts()
        except (KeyError, ValueError) as error:
            raise RunFolderError(f"the step checkpoint {path} is damaged: {error}") from error
        if state.fingerprint != fingerprint:
            raise RunFolderError(
                f"the step checkpoint {path} is of another shot or other settings (fingerprint "
                f"{state.fingerprint!r}, expected {fingerprint!r}); remove it to start the shot again"
            )
        return state

    def _check_parts(self) -> None:
        """Raise ``KeyError`` or ``ValueError`` where a part is not what ``denoise`` makes."""
        step = self.solver_state["step_index"]
        if step.shape or step.dtype != torch.int64 or not 0 <= int(step) <= self.num_steps:
            raise ValueError("its step is none of the shot's")
        for key, tensor in {**self.solver_state, "latents": self.latents}.items():
            is_like_latents = tensor.dtype == torch.float32 and tensor.shape == self.latents.shape
            if key != "step_index" and not (is_like_latents and bool(torch.isfinite(tensor).all())):
                raise ValueError(f"{key} is no finite float32 tensor of the shape of the latents")


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all parts of a state file, in hex digits."""
    digest = hashlib.sha256(canonical_json(dict(metadata)))
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class DenoiseStopped(Exception):
    """Not an error: ``should_stop`` ended the loop between two steps; ``state`` resumes it."""

    def __init__(self, state: DenoiseState) -> None:
        super().__init__(f"stopped after {state.step} of {state.num_steps} steps")
        self.state = state


@torch.no_grad()
def denoise(
    experts: ExpertPair,
    guidance: Guidance,
    solver: Solver,
    noise: Tensor,
    condition: Tensor | None,
    prompt: PromptEmbeds,
    grid: LatentGrid,
    *,
    device: torch.device | str,
    fingerprint: str = "",
    resume: DenoiseState | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    checkpoint_every_steps: int = 0,
    on_checkpoint: Callable[[DenoiseState], None] | None = None,
    checkpoint_last: bool = False,
    guided_steps: range | None = None,
) -> Tensor:
    """Denoised latents of memory and clip, float32 ``[16, K+T, h, w]`` on ``device``.

    ``noise`` is ``[16, K+T, h, w]``; ``condition`` is ``[20, K+T, h, w]`` (mask, then latents), or None for T2V. Memory
    positions are denoised like the rest (``grid.clip_latents`` drops them). The solver starts at its first step, or at
    the step of ``resume``. A resumed shot gives the same bits as an uninterrupted one, unless steps are reused: the
    contents of a step cache are not saved (gigabytes), so the first step after a resume is computed in full.

    Steps whose index is not in ``guided_steps`` (None: all are) run as with a guidance scale of 1.

    ``should_stop`` is called before every step. ``on_checkpoint`` receives the state after every
    ``checkpoint_every_steps`` steps (0: never); after the last one if ``checkpoint_last``, else not. A state never
    holds NaN or infinity. One after the last step resumes to its latents.

    Raises ``DenoiseStopped`` with the state when ``should_stop`` is true, ``ShotError`` naming step and expert when
    latents are not finite, ``RunFolderError`` when ``resume`` does not belong to this shot, ``ValueError`` for a wrong
    shape of ``noise`` or ``condition``.
    """
    device = torch.device(device)
    experts.begin_shot()
    latents = _start(solver, noise, grid, device, resume, fingerprint)
    x_BCTHW = _model_input(condition, grid, device)
    cond_BSE = prompt.prompt_LE.to(device)[None]
    uncond_BSE = None if prompt.negative_LE is None else prompt.negative_LE.to(device)[None]
    positions_T = grid.temporal_positions().to(device)
    timesteps: list[int] = solver.timesteps.tolist()
    finite = _FiniteWatch(experts, timesteps, device)

    def state() -> DenoiseState:
        finite.check()
        return DenoiseState(
            latents=latents,
            solver_state=solver.state_dict(),
            solver_name=solver.name,
            num_steps=solver.num_steps,
            fingerprint=fingerprint,
        )

    clock = time.perf_counter()
    for index in range(solver.step_index, solver.num_steps):
        if should_stop is not None and should_stop():
            raise DenoiseStopped(state())
        expert = experts.select(timesteps[index])
        if guided_steps is not None and index not in guided_steps:
            expert = replace(expert, guidance_scale=1.0)
        x_BCTHW[0, :LATENT_CHANNELS] = latents
        timestep_B = torch.full((1,), timesteps[index], dtype=torch.int64, device=device)
        velocity = guidance.velocity(expert, x_BCTHW, timestep_B, cond_BSE, uncond_BSE, positions_T)
        latents = solver.step(velocity[0], latents)
        finite.note(index, latents)
        done = index + 1
        is_due = checkpoint_last if done == solver.num_steps else done % (checkpoint_every_steps or done + 1) == 0
        if on_checkpoint and checkpoint_every_steps and is_due:
            on_checkpoint(state())
        now = time.perf_counter()
        info = StepInfo(
            step=done,
            num_steps=solver.num_steps,
            timestep=timesteps[index],
            expert=expert.name,
            elapsed_seconds=now - clock,
            reused=expert.reused,
        )
        clock = now
        if on_step is not None:
            on_step(info)
    finite.check()
    return latents


class _FiniteWatch:
    """Records on the device after every step whether latents are finite; the host reads it every few steps."""

    def __init__(self, experts: ExpertPair, timesteps: list[int], device: torch.device) -> None:
        self._experts = experts
        self._timesteps = timesteps
        self._finite = torch.ones(len(timesteps), dtype=torch.bool, device=device)

    def note(self, index: int, latents: Tensor) -> None:
        self._finite[index] = torch.isfinite(latents).all()
        if index % _CHECK_FINITE_EVERY == _CHECK_FINITE_EVERY - 1:
            self.check()

    def check(self) -> None:
        finite = self._finite.tolist()
        if not all(finite):
            index = finite.index(False)
            raise ShotError(
                f"latents are not finite (NaN or infinity) after step {index + 1} of {len(finite)}, timestep "
                f"{self._timesteps[index]}, {self._experts.name_at(self._timesteps[index])} expert"
            )


def _start(
    solver: Solver,
    noise: Tensor,
    grid: LatentGrid,
    device: torch.device,
    resume: DenoiseState | None,
    fingerprint: str,
) -> Tensor:
    """Set the solver to the first step or that of ``resume``; return the latents of that step."""
    if tuple(noise.shape) != grid.latent_shape:
        raise ValueError(f"noise has shape {list(noise.shape)}; expected {list(grid.latent_shape)}")
    if resume is None:
        solver.reset()
        return noise.to(device=device, dtype=torch.float32)
    found = (resume.fingerprint, resume.solver_name, resume.num_steps, tuple(resume.latents.shape))
    expected = (fingerprint, solver.name, solver.num_steps, grid.latent_shape)
    if found != expected:
        raise RunFolderError(
            "the step checkpoint does not belong to this shot: (fingerprint, solver, steps, latent shape) is "
            f"{found}, expected {expected}"
        )
    solver.load_state_dict(resume.solver_state, device)
    return resume.latents.to(device)


def _model_input(condition: Tensor | None, grid: LatentGrid, device: torch.device) -> Tensor:
    """The DiT's input ``[1, 16 or 36, K+T, h, w]``; the first 16 channels are not filled yet."""
    if condition is None:
        return torch.empty((1, *grid.latent_shape), device=device)
    if condition.shape[1:] != grid.latent_shape[1:]:
        raise ValueError(
            f"condition has shape {list(condition.shape)}; expected [20, {', '.join(map(str, grid.latent_shape[1:]))}]"
        )
    noise_part = torch.empty(grid.latent_shape, device=device)
    return torch.cat([noise_part, condition.to(device=device, dtype=torch.float32)])[None]
