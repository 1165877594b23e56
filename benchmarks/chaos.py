"""Does a batch end with the same bytes when replicas are killed at random moments?

    python -m benchmarks.chaos                       # 20 trials: 12 stories x 8 shots, 4 replicas, one kill -9 each
    python -m benchmarks.chaos --renderer drawing    # the same trials with small drawn pictures: much faster
    python -m benchmarks.chaos --renderer drawing --trials 5 --kills 6 --pauses 2 --json chaos.json

``--renderer tiny`` runs ``torchrun`` with four gloo ranks; each rank is a replica of the tiny model. A trial kills one
rank; torchrun ends the other ranks and starts all of them again. ``--renderer drawing`` starts four independent
processes that join the run folder and draw small pictures. A killed process is started again. This renderer can also
pause processes until their leases expire, and wake them at the end.

The benchmark compares every trial with an undisturbed run. A trial passes when all of this is true:

* the run is complete;
* all MP4s, PNGs and records are equal, except ``timing`` and ``host`` in the records;
* every shot has one record and one attempt;
* no unfinished file is left;
* only shots in flight were begun twice. A shot is in flight when its process is hit or ended before it commits the
  shot. One replica can have two such shots: it renders one and saves the other.

The exit code is 0 when all trials pass.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.harness import make_parser, print_table, write_json
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.summary import Replica
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import finished_files, make_story
from tests.helpers.small_job import SMALL, write_storyboard
from tests.helpers.workers import begun, begun_by, exit_code, has_ended, in_flight, kill, start_worker


def main() -> int:
    """Run all trials, print a table, and report whether all passed."""
    parser = make_parser("chaos", __doc__)
    parser.add_argument("--renderer", choices=("tiny", "drawing"), default="tiny")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=12)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--kills", type=int, default=1, help="processes killed with -9 in each trial")
    parser.add_argument("--pauses", type=int, default=0, help="processes paused past their lease (drawing only)")
    parser.add_argument("--step-seconds", type=float, default=0.02, help="length of a step (drawing only)")
    parser.add_argument("--folder", type=Path, help="folder to work in; a shared file system is a good test")
    arguments = parser.parse_args()
    if arguments.renderer == "tiny" and arguments.pauses:
        parser.error("--pauses needs --renderer drawing")

    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        stage: Stage = TinyRanks(arguments, Path(folder)) if arguments.renderer == "tiny" else Drawing(arguments)
        whole = Path(folder) / "undisturbed"
        stage.render_undisturbed(whole)
        expected = finished_files(whole)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.trials):
            rows.append(trial(stage, Path(folder) / f"trial_{seed}", seed, expected, arguments))
            print_table(rows[-1:])
    print()
    print_table(rows)
    passed = all(row["passed"] for row in rows)
    print("all trials passed" if passed else "SOME TRIALS FAILED")
    write_json(arguments.json, "chaos", {"rows": rows}, torch.device("cpu"))
    return 0 if passed else 1


class Stage(Protocol):
    """A way to run replicas and to disturb them."""

    def render_undisturbed(self, root: Path) -> None:
        """Render everything and disturb nothing."""

    def render_disturbed(self, root: Path, rng: random.Random) -> "Disturbed":
        """Render everything while killing and pausing; return when all processes have ended."""


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """The facts of a trial: exit codes, number of processes hit, shots in flight at a hit, and all shots begun."""

    codes: list[int]
    num_hit: int
    in_flight: list[str]
    begun: list[str]


def trial(
    stage: Stage, root: Path, seed: int, expected: dict[str, bytes], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run one trial and compare it with the undisturbed run."""
    began = time.monotonic()
    disturbed = stage.render_disturbed(root, random.Random(seed))
    elapsed = time.monotonic() - began
    files = finished_files(root)
    different = [name for name in {*files, *expected} if files.get(name) != expected.get(name)]
    attempts = [len(list(shot.iterdir())) for shot in root.glob("stories/*/*/attempts")]
    records = [len(list(shot.iterdir())) for shot in root.glob("stories/*/*/records")]
    once = attempts == records == [1] * arguments.stories * arguments.shots
    twice = Counter(disturbed.begun) - Counter(set(disturbed.begun))
    needless = (twice - Counter(disturbed.in_flight)).total()
    left = {*root.rglob(".tmp-*"), *(root / "leases").iterdir()}
    for path in sorted(left):
        print(f"left behind: {path.relative_to(root)}", file=sys.stderr)
    passed = not different and once and not needless and not any(disturbed.codes) and not left
    return {
        "seed": seed,
        "passed": passed,
        "hit": disturbed.num_hit,
        "rendered twice": twice.total(),
        "in flight": len(disturbed.in_flight),
        "files": len(files),
        "different": len(different),
        "left behind": len(left),
        "seconds": round(elapsed, 1),
    }


class Drawing:
    """Independent processes with a renderer that draws."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._stories: list[Story] = [
            make_story(f"story_{number:02d}", arguments.shots) for number in range(arguments.stories)
        ]

    def render_undisturbed(self, root: Path) -> None:
        """Render in one process."""
        assert exit_code(start_worker(root, self._stories)) == 0

    def render_disturbed(self, root: Path, rng: random.Random) -> Disturbed:
        """Kill and pause processes at random moments; start a new process for each."""
        arguments, log = self._arguments, root.with_suffix(".log")
        num_shots = arguments.stories * arguments.shots
        kinds = ["kill"] * arguments.kills + ["pause"] * arguments.pauses
        rng.shuffle(kinds)
        moments = sorted(rng.randrange(1, num_shots) for _ in kinds)
        workers = [self._start(root, log, index) for index in range(arguments.replicas)]
        hit, victims, asleep = 0, list[int](), list[int]()
        for moment, kind in zip(moments, kinds, strict=True):
            while len(begun(log)) < moment:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 4 * arguments.step_seconds))
            victim = rng.randrange(arguments.replicas)
            if has_ended(workers[victim]):
                continue
            if kind == "pause":
                kill(workers[victim], signal.SIGSTOP)
                asleep.append(workers[victim])
                hit += 1
            else:
                kill(workers[victim])
                hit += exit_code(workers[victim]) == -signal.SIGKILL
            victims.append(workers[victim])
            workers[victim] = self._start(root, log, victim)
        codes = [exit_code(worker) for worker in workers]
        for worker in asleep:
            kill(worker, signal.SIGCONT)
        codes += [exit_code(worker) for worker in asleep]
        lost = [shot for victim in victims for shot in in_flight(root, begun_by(log, victim), victim)]
        return Disturbed(codes=codes, num_hit=hit, in_flight=lost, begun=begun(log))

    def _start(self, root: Path, log: Path, index: int) -> int:
        return start_worker(
            root,
            self._stories,
            log=log,
            step_seconds=self._arguments.step_seconds,
            settings=DispatchSettings(poll_seconds=0.05, lease_seconds=5.0, checkpoint_every_steps=1),
            replica=Replica(index=index, count=self._arguments.replicas, job_id="chaos"),
        )


class TinyRanks:
    """torchrun with one replica of the tiny model per rank."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        cuts = [[index % 3 != 2 for index in range(arguments.shots)]]
        for number in range(arguments.stories):
            write_storyboard(folder / "boards" / f"story_{number:02d}.json", cuts)

    def render_undisturbed(self, root: Path) -> None:
        """Render with the same number of ranks and disturb none."""
        code = self._start(root).wait()
        assert code == 0, self._log_of(root).read_text()

    def render_disturbed(self, root: Path, rng: random.Random) -> Disturbed:
        """Kill one rank each time a random number of shots is committed."""
        arguments = self._arguments
        job = self._start(root)
        hit, lost = 0, list[str]()
        for moment in sorted(rng.randrange(arguments.stories * arguments.shots) for _ in range(arguments.kills)):
            while job.poll() is None and (self._num_committed(root) < moment or not self._living(root)):
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.3))
            living = self._living(root)
            if job.poll() is None and living:
                kill(rng.choice(living))
                hit += 1
                while job.poll() is None and set(self._living(root)) & set(living):
                    time.sleep(0.05)
                lost += [shot for pid in living for shot in in_flight(root, self._begun(root, pid), pid)]
        codes = [job.wait()]
        if any(codes):
            print(self._log_of(root).read_text()[-4000:], file=sys.stderr)
        return Disturbed(codes=codes, num_hit=hit, in_flight=lost, begun=self._begun(root))

    def _start(self, root: Path) -> subprocess.Popen[bytes]:
        arguments = self._arguments
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={arguments.replicas}", f"--max-restarts={arguments.kills + 2}"]
        settings = [*SMALL, "parallel=replicas", "dispatch.poll_seconds=0.2", "dispatch.lease_seconds=20"]
        paths = [f"stories.path='{self._folder / 'boards'}'", f"output='{root}'"]
        environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with self._log_of(root).open("wb") as log:
            return subprocess.Popen(
                [*launcher, "-m", "storymem_dist.cli", *settings, *paths],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @staticmethod
    def _log_of(root: Path) -> Path:
        return root.with_suffix(".log")

    @staticmethod
    def _begun(root: Path, pid: int | None = None) -> list[str]:
        """All shots that were begun, or only those of one process."""
        return [
            f"{event['story_id']}:{event['shot_id']}"
            for path in (root / "events").glob("*.jsonl")
            if pid is None or f"-{pid}-" in path.name
            for event in map(json.loads, path.read_text().splitlines())
            if event["event"] == "ShotStarted"
        ]

    @staticmethod
    def _num_committed(root: Path) -> int:
        return len(list(root.glob("stories/*/*/records/*.json")))

    @staticmethod
    def _living(root: Path) -> list[int]:
        """Process ids of the replica leaders that run. Each leader has written its id to its ``.alive`` file."""
        pids = []
        for path in sorted(root.glob("leases/*.alive")):
            try:
                pid = int(json.loads(path.read_text())["pid"])
                os.kill(pid, 0)
            except (OSError, ValueError, KeyError):
                continue
            pids.append(pid)
        return pids


if __name__ == "__main__":
    sys.exit(main())
