"""The command ``python -m storymem_dist.selftest``. Knows options and exit codes; the checks are in ``layouts``."""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from storymem_dist.errors import StoryMemError
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.ending import end_within
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import BACKENDS, DEVICES, ParallelSettings
from storymem_dist.selftest.layouts import SelfTest
from storymem_dist.terminal.program import Parser, program
from storymem_dist.terminal.streams import print_error, print_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the self-test on every started rank; returns the exit code."""
    with program("selftest"):
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
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
            say = print_line if session.rank == 0 else _nothing
            say(
                f"ranks: {session.world_size}, {session.device.type} ({session.backend or 'no process group'}), "
                f"torch {torch.__version__}"
            )
            findings = SelfTest(session, settings, say, options.timeout_seconds).run(options.block_dim)
            if findings and session.end_may_hang:
                end_within()
    except StoryMemError as error:
        print_error(error)
        return error.exit_code
    verdict = f"{len(findings)} FAILED" if findings else "all equal to one device"
    say(f"{verdict}, {time.monotonic() - started:.0f} s")
    return 1 if findings else 0


def _nothing(line: object) -> None:
    """Print nothing: the first rank prints for all."""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    full = WAN22_A14B.t2v
    parser = Parser(prog="python -m storymem_dist.selftest", description="Compare layouts with one device.")
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
