"""Steps 12 and 13: the self-test and a whole render, as a person starts them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_steps.step import Bench, Row, require_package

_RENDER_PACKAGES = ("hydra", "omegaconf", "wandb", "diffusers", "transformers", "accelerate", "peft", "av", "rich")
_STORY = {
    "story_name": "GPU check",
    "story_overview": "Two shots.",
    "scenes": [{"scene_num": 1, "video_prompts": ["A red kite rises.", "It dives."], "cut": [True, False]}],
}
_GRACE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Done:
    """A program that ended: its exit code, seconds, and what it wrote."""

    exit_code: int
    seconds: float
    output: str


def run_program(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Done:
    """Run a program in a process group of its own; after ``seconds``, end that group and raise ``TimeoutError``."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=environment,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        _end_group(process)
        raise TimeoutError(f"{' '.join(command[1:4])} did not end within {seconds:.0f} s") from None
    return Done(exit_code=process.returncode, seconds=time.perf_counter() - start, output=output)


def _end_group(process: "subprocess.Popen[str]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.communicate(timeout=_GRACE_SECONDS)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_selftest(bench: Bench) -> Iterator[Row]:
    """``python -m storymem_dist.selftest`` on one rank: every layout that one rank forms, and both 8-bit formats."""
    require_package("diffusers")
    device = ["--device", bench.device.type, "--block-dim", str(bench.sizes.selftest_block_dim)]
    yield _row_of(run_program([sys.executable, "-m", "storymem_dist.selftest", *device], bench.seconds_left()))


def run_render(bench: Bench) -> Iterator[Row]:
    """A story of two shots of the tiny model, with ranks started by torchrun."""
    require_package(*_RENDER_PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        story = Path(folder) / "story.json"
        story.write_text(json.dumps(_STORY))
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "storymem_dist", "model=tiny", f"stories={story}", f"output={output}"]
        command += ["launch=torchrun", "launch.processes_per_node=1", f"parallel.device={bench.device.type}"]
        command += ["tracking=none"]
        done = run_program(command, bench.seconds_left(), {**os.environ, "STORYMEM_CACHE": f"{folder}/cache"})
        clips = sorted(path.name for path in output.glob("stories/*/*.mp4"))
        yield _row_of(done) | {"clips": ", ".join(clips)}


def _row_of(done: Done) -> Row:
    lines = done.output.strip().splitlines()
    row: Row = {"exit code": done.exit_code, "s": done.seconds, "last line": lines[-1][:160] if lines else ""}
    return row | ({"error": " / ".join(lines[-6:])[:600]} if done.exit_code else {})
