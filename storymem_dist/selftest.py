"""Does every parallel layout compute on *this* machine what one device computes?

    python -m storymem_dist.selftest                                  one rank
    torchrun --nproc_per_node 8 -m storymem_dist.selftest             every layout that 8 ranks can hold

First each collective of a layout is tried by itself with numbers whose result is known, then a small transformer with
guidance and a small VAE in fp32, then the transformer with layers in eight bits (where the device can multiply them)
and one block of A14B's width in bf16, all against the same computation on one device. What differs is named: layout,
collective or model, axis, and rank. The exit code is 1 if anything differs, fails or hangs. Needs no weights and no
settings; it is how NCCL is proved on a user's machine.
"""

import argparse
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from rich.console import Console
from torch import Tensor

from storymem_dist.diffusion.experts import Expert
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.models.loading import StateDictSource, load_dit_weights
from storymem_dist.models.quantized_linear import LINEARS, check_linears, quantize_linears
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.layout import layouts_for
from storymem_dist.parallel.loading import OFFLOADED, local_part
from storymem_dist.parallel.mesh import Axis
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import BACKENDS, DEVICES, ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae

NUM_HEADS = WAN22_A14B.t2v.num_heads
TINY = DiTConfig(
    dim=8 * NUM_HEADS, ffn_dim=384, freq_dim=32, num_heads=NUM_HEADS, num_layers=2, in_dim=16, text_dim=24, text_len=12
)
TINY_TOLERANCE = 1e-5
"""Largest error of the small models in fp32, in units of the largest expected value."""

BLOCK_TOLERANCE = 2e-2
"""Largest error of the bf16 block: sums of other shapes round differently, and guidance multiplies that by 6."""

EIGHT_BIT_TOLERANCE = 5e-2
"""Largest error of layers in eight bits: what differs in the last bit may be rounded to another of few values."""

MESSAGE_ELEMENTS = 2**18
"""Numbers that each rank sends to each other one in the collectives that are tried by themselves (1 MiB)."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: ``check`` (a collective with its axis, or a model) gave a wrong result on ``rank``."""

    layout: str
    check: str
    rank: int
    problem: str

    def __str__(self) -> str:
        return f"{self.layout}: {self.check}: rank {self.rank}: {self.problem}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the self-test on every started rank; returns the exit code."""
    options = _parse(arguments)
    settings = ParallelSettings(
        device=options.device, backend=options.backend, collective_timeout_seconds=options.timeout_seconds
    )
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    started = time.monotonic()
    try:
        with start_session(settings) as session:
            console = Console(quiet=session.rank != 0, highlight=False, soft_wrap=True)
            console.print(
                f"ranks: {session.world_size}, {session.device.type} ({session.backend or 'no process group'}), "
                f"torch {torch.__version__}"
            )
            findings = _SelfTest(session, settings, console, options.timeout_seconds).run(options.block_dim)
    except StoryMemError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(str(error), markup=False)
        return error.exit_code
    verdict = f"{len(findings)} FAILED" if findings else "all equal to one device"
    console.print(f"{verdict}, {time.monotonic() - started:.0f} s")
    return 1 if findings else 0


class _SelfTest:
    """Walks through the layouts; every rank runs the same checks and learns of everyone's findings."""

    def __init__(self, world: Session, settings: ParallelSettings, console: Console, timeout_seconds: float) -> None:
        self._world = world
        self._settings = settings
        self._console = console
        self._timeout_seconds = timeout_seconds
        self._verdicts: dist.ProcessGroup | None = None
        if world.world_size > 1:  # waits for the slowest rank to give up
            self._verdicts = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * timeout_seconds))
        self._findings: list[Finding] = []

    def run(self, block_dim: int) -> list[Finding]:
        """All checks, cheapest first; ends early when a check raises, since the ranks are then out of step."""
        layouts = layouts_for(self._world.world_size, num_heads=NUM_HEADS)
        widest = [axes for axes in layouts if axes.ranks_per_replica == self._world.world_size]
        tiny = _Reference(TINY, torch.float32, self._world.device, tolerance=TINY_TOLERANCE)
        try:
            for axes in layouts:
                self._run(axes, "replicated", tiny, with_collectives=True)
            for axes in widest:
                self._run(axes, "fsdp", tiny)
            self._run(widest[-1], "fsdp_offload", tiny)
            for linears in LINEARS[1:]:
                self._run_quantized(widest, linears)
            block = _Reference(_one_block(block_dim), torch.bfloat16, self._world.device, tolerance=BLOCK_TOLERANCE)
            for axes in widest:
                if block.config.num_heads % axes.ulysses == 0:
                    self._run(axes, "fsdp", block)
        except _OutOfStep:
            pass
        return self._findings

    def _run(
        self, axes: ParallelSettings, weights: str, reference: "_Reference", *, with_collectives: bool = False
    ) -> None:
        """Start the layout and compare its model; ``with_collectives`` tries its collectives and the VAE as well."""
        settings = replace(
            self._settings, cfg=axes.cfg, ring=axes.ring, ulysses=axes.ulysses, weights=weights, across_nodes=True
        )
        with start_session(settings, num_heads=reference.config.num_heads) as session:
            layout = f"{session.layout}, {weights}"
            if with_collectives:
                for name, check in _collective_checks(session):
                    self._check(layout, name, check, tolerance=0.0)
            self._check(
                layout, reference.name, lambda: reference.error_of(session, settings), tolerance=reference.tolerance
            )
            if with_collectives and session.mesh.shard.group is not None:
                self._check(layout, "VAE, float32", lambda: _vae_error(session), tolerance=TINY_TOLERANCE)

    def _run_quantized(self, widest: Sequence[ParallelSettings], linears: str) -> None:
        """Sharded layers in eight bits, in the widest layouts; nothing where device or torch cannot do it."""
        device = self._world.device
        try:
            check_linears(linears, device)
        except ConfigError as error:
            self._console.print(f"not tested: {error}", markup=False)
            return
        reference = _Reference(TINY, torch.bfloat16, device, tolerance=EIGHT_BIT_TOLERANCE, linears=linears)
        try:
            for axes in widest:
                self._run(axes, "fsdp", reference)
        except ConfigError as error:  # raised by all ranks alike, before they have sent anything
            self._console.print(f"not tested: {error}", markup=False)

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
        new = [Finding(layout=layout, check=name, rank=rank, problem=o[1]) for rank, o in enumerate(outcomes) if o[1]]
        self._findings += new
        verdict = "FAILED" if new else f"ok, error {max(o[0] for o in outcomes):.1e}" if tolerance else "ok"
        self._console.print(f"{layout:<58} {name:<38} {verdict}", markup=False)
        for finding in new:
            self._console.print(f"  FAILED {finding}", markup=False)
        if any(o[2] for o in outcomes):
            self._console.print("  the ranks are out of step now: what follows is not tested", markup=False)
            raise _OutOfStep

    def _gather(self, outcome: tuple[float, str, bool]) -> list[tuple[float, str, bool]]:
        if self._verdicts is None:
            return [outcome]
        everyone = [outcome] * self._world.world_size
        dist.all_gather_object(everyone, outcome, group=self._verdicts)
        return everyone

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        """End this process, saying where it hangs, if the body takes much longer than a collective may."""

        def give_up() -> None:
            seconds = f"{2 * self._timeout_seconds:.0f} s"
            sys.stderr.write(f"FAILED {what}: rank {self._world.rank}: no answer for {seconds}\n")
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


def _collective_checks(session: Session) -> Iterator[tuple[str, Callable[[], float]]]:
    """The collectives that this layout uses, by name and axis; each returns its largest error (0 is right)."""
    mesh, device = session.mesh, session.device
    if mesh.ulysses.group is not None:
        yield "all_to_all over ulysses", lambda: _all_to_all_error(mesh.ulysses, device)
    if mesh.ring.group is not None:
        yield "send/receive over ring", lambda: _send_receive_error(mesh.ring, device)
    for axis in (mesh.sequence, mesh.cfg, mesh.shard):
        if axis.group is not None:
            yield f"all_gather over {axis.name}", partial(_all_gather_error, axis, device)
    if mesh.shard.group is not None:
        yield "all_to_all of neighbours over shard", partial(_neighbours_error, mesh.shard, device)
    if session.readers_group is not None:
        yield "broadcast over readers", lambda: _broadcast_error(session)
    if session.team.control is not None:
        yield "leader_decides over replica", lambda: _leader_error(session)


def _all_to_all_error(axis: Axis, device: torch.device) -> float:
    """Rank r sends r * size + s to rank s."""
    places = torch.arange(axis.size, device=device, dtype=torch.float32)[:, None].expand(-1, MESSAGE_ELEMENTS)
    sent = (axis.rank * axis.size + places).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return _distance(received, places * axis.size + axis.rank)


def _neighbours_error(axis: Axis, device: torch.device) -> float:
    """Each rank sends its place to the one before and the one after it, and nothing to others, as the VAE does."""
    lengths = [MESSAGE_ELEMENTS if abs(place - axis.rank) == 1 else 0 for place in range(axis.size)]
    sent = torch.full((sum(lengths),), float(axis.rank), device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, lengths, lengths, group=axis.group)
    parts = zip(torch.split(received, lengths), range(axis.size), strict=True)
    return max(_distance(part, torch.full_like(part, float(place))) for part, place in parts if part.numel())


def _send_receive_error(axis: Axis, device: torch.device) -> float:
    sent = torch.full((MESSAGE_ELEMENTS,), float(axis.rank), device=device)
    received = torch.empty_like(sent)
    following, previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    ops = [
        dist.P2POp(dist.isend, sent, group=axis.group, group_peer=following),
        dist.P2POp(dist.irecv, received, group=axis.group, group_peer=previous),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return _distance(received, torch.full_like(received, float(previous)))


def _all_gather_error(axis: Axis, device: torch.device) -> float:
    sent = torch.full((MESSAGE_ELEMENTS,), float(axis.rank), device=device)
    received = [torch.empty_like(sent) for _ in range(axis.size)]
    dist.all_gather(received, sent, group=axis.group)
    return max(_distance(part, torch.full_like(part, float(place))) for place, part in enumerate(received))


def _broadcast_error(session: Session) -> float:
    tensor = torch.full((MESSAGE_ELEMENTS,), float(session.readers.rank + 1), device=session.device)
    dist.broadcast(tensor, group=session.readers_group, group_src=0)
    return _distance(tensor, torch.ones_like(tensor))


def _leader_error(session: Session) -> float:
    leader = session.leader_decides(lambda: session.rank)
    return float(abs(leader - session.layout.ranks_of_replica(session.replica)[0]))


class _Reference:
    """A guided velocity computed on one device, the same on every rank, to compare layouts with."""

    def __init__(
        self,
        config: DiTConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tolerance: float,
        linears: str = "exact",
    ) -> None:
        self.config = config
        self.tolerance = tolerance
        number_format = str(dtype).removeprefix("torch.") if linears == "exact" else linears
        self.name = f"transformer {config.num_layers} x {config.dim}, {number_format}"
        self._dtype = dtype
        self._linears = linears
        torch.manual_seed(0)
        self._single = WanDiT(config, dtype=dtype).eval().requires_grad_(False)
        if linears != "exact":
            weights = StateDictSource("selftest", self._single.state_dict())
            quantize_linears(self._single.blocks, linears)
            load_dit_weights(self._single, weights)
        self._single.to(device)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, config.in_dim, 3, 6, 10, generator=generator).to(device)  # 45 tokens: few sizes divide them
        cond, uncond = torch.randn(2, 1, 7, config.text_dim, generator=generator).to(device)
        timestep, positions = torch.tensor([500], device=device), torch.tensor([-5, 0, 1], device=device)
        self._inputs = (x, timestep, cond, uncond, positions)
        self._expected = LocalGuidance().velocity(self._expert(self._single), *self._inputs)

    def error_of(self, session: Session, settings: ParallelSettings) -> float:
        """Largest error on this rank with tokens, guidance and weights split as the layout says."""
        with torch.device("meta"):
            many = WanDiT(self.config, dtype=self._dtype)
        quantize_linears(many.blocks, self._linears)
        parallelize(many, session.mesh, settings)
        many.to_empty(device="cpu" if settings.weights in OFFLOADED else session.device)
        weights = self._single.state_dict()
        for name, parameter in many.named_parameters():
            part = local_part(name, parameter)
            part.tensor.copy_(weights[name][part.row_offset : part.row_offset + part.num_rows])
        found = make_guidance(session.mesh).velocity(self._expert(many), *self._inputs)
        return _distance(found, self._expected) / self._expected.abs().max().item()

    @staticmethod
    def _expert(module: WanDiT) -> Expert:
        return Expert(name="selftest", module=module, guidance_scale=3.5)


def _vae_error(session: Session) -> float:
    """Error of encoding and decoding a clip, split over the replica, against one device; larger of the two."""
    torch.manual_seed(2)
    vae = WanVae(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).to(session.device))
    clip = torch.rand(3, 5, 32, 16 * session.layout.ranks_per_replica + 8, device=session.device) * 2 - 1
    latents = vae.encode(clip)
    pixels = vae.decode(latents)
    assert session.mesh.shard.group is not None
    parallelize_vae(vae, session.mesh.shard.group)
    encode_error = _distance(vae.encode(clip), latents) / latents.abs().max().item()
    return max(encode_error, _distance(vae.decode(latents), pixels) / pixels.abs().max().item())


def _one_block(dim: int) -> DiTConfig:
    """One block of A14B, or of another width with heads of the same size."""
    full = WAN22_A14B.t2v
    return replace(
        full,
        num_layers=1,
        dim=dim,
        num_heads=dim // full.head_dim,
        ffn_dim=full.ffn_dim * dim // full.dim,
    )


def _distance(found: Tensor, expected: Tensor) -> float:
    return (found.float() - expected.float()).abs().max().item()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    full = WAN22_A14B.t2v
    parser = argparse.ArgumentParser(
        prog="python -m storymem_dist.selftest", description="Compare layouts with one device."
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument(
        "--block-dim",
        type=int,
        default=full.dim,
        help=f"width of the bf16 block, a multiple of {full.head_dim} (default: A14B's {full.dim}; less for slow CPUs)",
    )
    parser.add_argument("--timeout-seconds", type=float, default=50.0, help="longest time for one collective")
    options = parser.parse_args(arguments)
    if options.block_dim < full.head_dim or options.block_dim % full.head_dim:
        parser.error(f"--block-dim {options.block_dim} is not a positive multiple of {full.head_dim}")
    return options


if __name__ == "__main__":
    sys.exit(main())
