"""What does this GPU do with our code: kernels, memory, compilation, a whole step, all in ten minutes?

    python -m benchmarks.gpu_check                                # one GPU; writes gpu_check.json and gpu_check.txt
    python -m benchmarks.gpu_check --only 1 2 3 --output check    # some steps, in a folder of your choice
    python -m benchmarks.gpu_check --dry                          # every step tiny, on the CPU: shows that it runs

Needs torch and this repository alone: no weights, no network. A step or a row whose package is missing (diffusers,
hydra, wandb, flash_attn) is skipped, and says why. Both files are written again after every step, so an interrupted run
leaves what it measured. A step that fails, hangs or kills its process costs its own results only. The steps that matter
most run first; those for which no time is left are not started. "difference" is |found - exact| / |exact|.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_steps.step import DRY, FULL, Bench, Row, Step
from benchmarks.gpu_steps.steps import STEPS
from benchmarks.gpu_steps.worker import DONE, FAILED, SKIPPED, worker_for
from benchmarks.harness import device_name, make_parser, table_lines
from storymem_dist.files import write_bytes

FORMAT = 1
_SLOW_FACTOR, _SLOW_SECONDS = 2, 30  # what a step may take: this much more than expected
_WIDEST_CELL = 70
_STATES = {DONE: "", FAILED: "FAILED: ", SKIPPED: "skipped: "}


def main() -> None:
    """Run the steps; print and write their results after each one. Exit code 1 if one failed."""
    args = parse_arguments()
    device = torch.device("cpu" if args.dry else "cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU here; --dry runs every step tiny on the CPU")
        device = torch.device("cuda", torch.cuda.current_device())
    start = time.monotonic()
    bench = Bench(device=device, sizes=DRY if args.dry else FULL, ends_at=start + args.seconds)
    check = Check(args.output, bench, start, dry=args.dry, json_file=args.json)
    only = set().union(*args.only or ())
    steps = [step for step in STEPS if not only or step.number in only]
    with worker_for(bench, steps) as run:
        for step in steps:
            left = bench.seconds_left()
            if left < (0 if args.dry else step.seconds / 2):
                check.add(step, "not started", f"about {step.seconds} s are needed, {left:.0f} s are left", [], 0.0)
                continue
            rows: list[Row] = []
            began = time.monotonic()
            longest = left if args.dry else min(left, _SLOW_FACTOR * step.seconds + _SLOW_SECONDS)
            state, reason = run(step.number, longest, rows.append)
            check.add(step, state, reason, rows, time.monotonic() - began)
    print(f"\n{check.summary()}\n{check.json_path} and {check.text_path}")
    if check.num_failed:
        raise SystemExit(1)


class Check:
    """The results so far, as a JSON file and as tables."""

    def __init__(self, folder: Path, bench: Bench, start: float, *, dry: bool, json_file: Path | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json_path, self.text_path = json_file or folder / "gpu_check.json", folder / "gpu_check.txt"
        self._start = start
        self._steps: list[dict[str, Any]] = []
        self._head: dict[str, Any] = {
            "benchmark": "gpu_check",
            "format": FORMAT,
            "device": device_name(bench.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "dry": dry,
        }
        self._text = [
            f"{self._head['device']}, torch {torch.__version__}{', dry run: no figure counts' if dry else ''}"
        ]
        print(self._text[0], flush=True)

    def add(self, step: Step, state: str, reason: str, rows: list[Row], seconds: float) -> None:
        """Print a step that ended, and write both files."""
        self._steps.append(
            {
                "step": step.number,
                "name": step.name,
                "shows": step.shows,
                "state": state,
                "reason": reason,
                "seconds": round(seconds, 3),
                "rows": rows,
            }
        )
        lines = ["", f"{step.number}. {step.name}: {step.shows} ({seconds:.0f} s)"]
        lines += table_lines([{key: _cell(value) for key, value in row.items()} for row in rows]) if rows else []
        if state != DONE:
            lines.append(f"{_STATES.get(state, f'{state}: ')}{reason}")
        print("\n".join(lines), flush=True)
        self._text += lines
        results = self._head | {"seconds": round(time.monotonic() - self._start, 3), "steps": self._steps}
        write_bytes(self.json_path, json.dumps(results, indent=2, default=str).encode() + b"\n")
        write_bytes(self.text_path, "\n".join([*self._text, "", self.summary(), ""]).encode())

    @property
    def num_failed(self) -> int:
        """Steps that failed."""
        return sum(step["state"] == FAILED for step in self._steps)

    def summary(self) -> str:
        """How many steps ended in which way."""
        states = [step["state"] for step in self._steps]
        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        return f"{len(states)} steps: {', '.join(counts)}; {time.monotonic() - self._start:.0f} s"


def _cell(value: Any) -> str:
    """A value of a table; the JSON file has it in full."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:_WIDEST_CELL]


def _steps(text: str) -> set[int]:
    """The numbers in ``text``, with commas between them."""
    known = {str(step.number): step.number for step in STEPS}
    given = text.strip(",").split(",")
    if unknown := [one for one in given if one.strip() not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no step; there are 1 to {len(known)}")
    return {known[one.strip()] for one in given}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("gpu_check", __doc__)
    parser.add_argument("--only", type=_steps, nargs="+", metavar="STEP", help="run these steps alone: 1 2 3, or 1,2,3")
    parser.add_argument("--seconds", type=float, default=570.0, help="start no step and end all after this time")
    parser.add_argument("--dry", action="store_true", help="every step tiny, on the CPU")
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="FOLDER", help="where the files go (default: here)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
