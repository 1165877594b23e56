"""The loop that both trainings share: streams of batches, ranks, optimizers, averaged weights, a state to go on from.

A step averages the gradients of ``NUM_STREAMS`` batches. Each batch is drawn from a generator of its own, seeded by
seed, step and stream. So a training that was killed goes on exactly as if it had not been, and one or two ranks see
the same batches.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from storymem_dist.files import replacing

NUM_STREAMS = 2
_MOMENTUM = 0.95


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together, as torchrun started them."""

    rank: int = 0
    size: int = 1

    @classmethod
    def start(cls) -> "Ranks":
        """Join the process group that ``RANK`` and ``WORLD_SIZE`` describe; one process needs none."""
        ranks = cls(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)))
        if NUM_STREAMS % ranks.size:
            raise SystemExit(
                f"{ranks.size} ranks cannot share {NUM_STREAMS} streams of batches; use 1 or {NUM_STREAMS}"
            )
        if ranks.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        return ranks

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients in place over all ranks."""
        if self.size == 1:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.flatten().cpu() for part in parts])
        dist.all_reduce(flat)
        for p, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = values.view(p.shape).to(p.device).contiguous()


class Muon:
    """Momentum, orthogonalized by Newton-Schulz iterations, for matrices and filters (Jordan et al. 2024).

    Weights of one shape are stepped together.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._groups: dict[torch.Size, list[Tensor]] = {}
        for p in parameters:
            self._groups.setdefault(p.shape, []).append(p)
        self.momentum = [torch.zeros(len(ps), *shape, device=ps[0].device) for shape, ps in self._groups.items()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all weights from their gradients."""
        for momentum, (shape, parameters) in zip(self.momentum, self._groups.items(), strict=True):
            grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]).contiguous()
            momentum.lerp_(grad, 1 - _MOMENTUM)
            x = grad.lerp(momentum, _MOMENTUM).flatten(2).bfloat16()
            rows, columns = x.shape[1:]
            x = x.mT if rows > columns else x
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
            for _ in range(5):
                s = x @ x.mT
                x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
            x = (x.mT if rows > columns else x).float() * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(parameters, list(x.reshape(len(parameters), *shape).unbind(0)), alpha=-lr)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rates: a warm-up, full until the share ``hold`` of the steps, then a line down to ``least`` of them."""

    steps: int
    lr: float
    muon_lr: float
    warm_up: int
    hold: float
    least: float

    def scale(self, step: int) -> float:
        """The factor of both learning rates at a step."""
        share = step / self.steps
        fall = 1.0 if share < self.hold else self.least + (1 - self.least) * (1 - share) / (1 - self.hold)
        return min(1.0, (step + 1) / self.warm_up) * fall


class Training:
    """Weights in training, with what a run needs to go on: optimizers, averaged weights, number of steps done."""

    def __init__(
        self,
        model: nn.Module,
        muon: Callable[[str, nn.Parameter], bool],
        schedule: Schedule,
        *,
        average: float,
        clip_all: bool,
        extra: dict[str, Any],
    ) -> None:
        """``muon`` says which weights Muon takes; ``average`` is the decay of averaged weights; ``extra`` is kept."""
        self.model, self.schedule, self.extra = model, schedule, extra
        named = dict(model.named_parameters())
        self.parameters = list(named.values())
        others = [p for name, p in named.items() if not muon(name, p)]
        self._clipped = self.parameters if clip_all else others
        self._muon = Muon([p for name, p in named.items() if muon(name, p)])
        self._adam = torch.optim.AdamW(others, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self._average = average
        self.averaged = {name: p.detach().clone() for name, p in named.items()}
        self.step = 0

    def go_on_from(self, path: Path) -> None:
        """Take up the state at ``path``, if there is one."""
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self._adam.load_state_dict(state["adam"])
            self._muon.momentum = state["momentum"]
            self.averaged, self.step, self.extra = state["averaged"], state["step"], state["extra"]

    def save(self, path: Path) -> None:
        """Write the state; a killed process leaves the state before it."""
        state = {
            "model": self.model.state_dict(),
            "adam": self._adam.state_dict(),
            "momentum": self._muon.momentum,
            "averaged": self.averaged,
            "step": self.step,
            "extra": self.extra,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def run(
        self,
        loss_of: Callable[[int, torch.Generator], Tensor],
        *,
        ranks: Ranks,
        seed: int,
        state: Path,
        save_every: float,
    ) -> None:
        """Train to the last step of the schedule. ``loss_of(step, generator)`` is the loss of one batch.

        Rank 0 writes ``state`` every ``save_every`` seconds and at the end.
        """
        started = last_saved = time.monotonic()
        while self.step < self.schedule.steps:
            self.model.zero_grad(set_to_none=True)
            losses = []
            for stream in range(ranks.rank, NUM_STREAMS, ranks.size):
                g = torch.Generator().manual_seed((seed * 1_000_003 + self.step) * NUM_STREAMS + stream)
                loss = loss_of(self.step, g) / NUM_STREAMS
                loss.backward()
                losses.append(loss.detach())
            ranks.add_gradients(self.parameters)
            self._update()
            self.step += 1
            now = time.monotonic()
            if ranks.rank == 0 and (self.step % 50 == 0 or self.step == self.schedule.steps):
                mean = float(sum(losses)) * NUM_STREAMS / len(losses)
                print(
                    f"{state.stem}: step {self.step} of {self.schedule.steps}, {now - started:.0f} s, loss {mean:.4f}",
                    flush=True,
                )
            if ranks.rank == 0 and now - last_saved > save_every:
                last_saved = now
                self.save(state)
        if ranks.rank == 0:
            self.save(state)
        ranks.wait()

    def _update(self) -> None:
        scale = self.schedule.scale(self.step)
        torch.nn.utils.clip_grad_norm_(self._clipped, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = self.schedule.lr * scale
        self._adam.step()
        self._muon.step(self.schedule.muon_lr * scale)
        kept = min(self._average, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.values()), list[Tensor](self.parameters), 1 - kept)
