"""Compares each layout that the started ranks can form with one device. Knows no command line."""

import faulthandler
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from storymem_dist.errors import ConfigError
from storymem_dist.models.quantized_linear import LINEARS, check_linears
from storymem_dist.parallel.layout import layouts_for
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.selftest.collectives import collective_checks
from storymem_dist.selftest.reference import NUM_HEADS, TINY, Reference, one_block, vae_error
from storymem_dist.terminal.streams import print_error

TINY_TOLERANCE = 1e-5
"""Largest error of the small models in fp32, in units of the largest expected value."""

BLOCK_TOLERANCE = 2e-2
"""Largest error of the bf16 block: sums of other shapes round differently, and guidance multiplies that by 6."""

EIGHT_BIT_TOLERANCE = 5e-2
"""Tolerance for 8-bit layers: a last-bit difference can round to the next representable value."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One thing that is wrong: ``check`` (a collective with its axis, or a model) gave a wrong result on ``rank``."""

    layout: str
    check: str
    rank: int
    problem: str

    def __str__(self) -> str:
        return f"{self.layout}: {self.check}: rank {self.rank}: {self.problem}"


class SelfTest:
    """Checks all layouts; every rank runs the same checks and receives the findings of all ranks."""

    def __init__(
        self, world: Session, settings: ParallelSettings, say: Callable[[object], None], timeout_seconds: float
    ) -> None:
        self._world = world
        self._settings = settings
        self._say = say
        self._timeout_seconds = timeout_seconds
        self._verdicts: dist.ProcessGroup | None = None
        if world.world_size > 1:  # waits for the slowest rank to give up
            self._verdicts = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * timeout_seconds))
        self._findings: list[Mismatch] = []

    def run(self, block_dim: int) -> list[Mismatch]:
        """Run all checks, cheapest first; end early when a check raises, since the ranks are then out of step."""
        layouts = layouts_for(self._world.world_size, num_heads=NUM_HEADS)
        widest = [axes for axes in layouts if axes.ranks_per_replica == self._world.world_size]
        tiny = Reference(TINY, torch.float32, self._world.device, tolerance=TINY_TOLERANCE)
        try:
            for axes in layouts:
                self._run(axes, "replicated", tiny, with_collectives=True)
            for axes in widest:
                self._run(axes, "fsdp", tiny)
            self._run(widest[-1], "fsdp_offload", tiny)
            for linears in LINEARS[1:]:
                self._run_quantized(widest, linears)
            block = Reference(one_block(block_dim), torch.bfloat16, self._world.device, tolerance=BLOCK_TOLERANCE)
            for axes in widest:
                if block.config.num_heads % axes.axes[2] == 0:
                    self._run(axes, "fsdp", block)
        except _OutOfStep:
            pass
        return self._findings

    def _run(
        self, axes: ParallelSettings, weights: str, reference: "Reference", *, with_collectives: bool = False
    ) -> None:
        """Start the layout and compare its model; ``with_collectives``: check its collectives and the VAE as well."""
        settings = replace(
            self._settings, cfg=axes.cfg, ring=axes.ring, ulysses=axes.ulysses, weights=weights, across_nodes=True
        )
        with start_session(settings, num_heads=reference.config.num_heads) as session:
            layout = f"{session.layout}, {weights}"
            if with_collectives:
                for name, check in collective_checks(session):
                    self._check(layout, name, check, tolerance=0.0)
            self._check(
                layout, reference.name, lambda: reference.error_of(session, settings), tolerance=reference.tolerance
            )
            if with_collectives and session.mesh.shard.group is not None:
                self._check(layout, "VAE, float32", lambda: vae_error(session), tolerance=TINY_TOLERANCE)

    def _run_quantized(self, widest: Sequence[ParallelSettings], linears: str) -> None:
        """Check sharded 8-bit layers in the widest layouts; nothing where device or torch cannot run them."""
        device = self._world.device
        try:
            check_linears(linears, device)
        except ConfigError as error:
            self._say(f"not tested: {error}")
            return
        reference = Reference(TINY, torch.bfloat16, device, tolerance=EIGHT_BIT_TOLERANCE, linears=linears)
        try:
            for axes in widest:
                self._run(axes, "fsdp", reference)
        except ConfigError as error:  # raised on all ranks, before any message
            self._say(f"not tested: {error}")

    def _check(self, layout: str, name: str, check: Callable[[], float], *, tolerance: float) -> None:
        """Run one check on all ranks and show its line. ``check`` returns an error, to be at most ``tolerance``."""
        error, problem, raised = float("nan"), "", False
        with self._watched(f"{layout}: {name}"):
            try:
                error = check()
                if not error <= tolerance:
                    problem = f"error {error:.1e}, allowed {tolerance:.0e}"
            except RuntimeError as failure:
                problem, raised = f"{type(failure).__name__}: {str(failure).splitlines()[0]}", True
            outcomes = self._gather((error, problem, raised))
        new = [Mismatch(layout=layout, check=name, rank=rank, problem=o[1]) for rank, o in enumerate(outcomes) if o[1]]
        self._findings += new
        verdict = "FAILED" if new else f"ok, error {max(o[0] for o in outcomes):.1e}" if tolerance else "ok"
        self._say(f"{layout:<58} {name:<38} {verdict}")
        for finding in new:
            self._say(f"  FAILED {finding}")
        if any(o[2] for o in outcomes):
            self._say("  the ranks are out of step now; the remaining checks are skipped")
            raise _OutOfStep

    def _gather(self, outcome: tuple[float, str, bool]) -> list[tuple[float, str, bool]]:
        if self._verdicts is None:
            return [outcome]
        everyone = [outcome] * self._world.world_size
        dist.all_gather_object(everyone, outcome, group=self._verdicts)
        return everyone

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        """End this process and print where it hangs if the body takes much longer than a collective may."""

        def give_up() -> None:
            seconds = f"{2 * self._timeout_seconds:.0f} s"
            print_error(f"FAILED {what}: rank {self._world.rank}: no answer for {seconds}")
            faulthandler.dump_traceback()
            os._exit(1)

        timer = threading.Timer(2 * self._timeout_seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _OutOfStep(Exception):
    """A check raised on some rank: collectives of different ranks may no longer meet."""
