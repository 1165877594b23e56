"""Kills replicas at random moments and compares what comes out with an undisturbed run, byte by byte.

    python -m benchmarks.chaos                       # 20 trials: 12 stories x 8 shots, 4 replicas, one killed with -9
    python -m benchmarks.chaos --trials 5 --kills 6 --pauses 2 --json chaos.json

Each replica is a process of its own that joins the run folder, with a renderer that draws small pictures; what is
tested is everything around it. A killed one is started again, as torchrun or a batch system would. Passes when
in every trial the run ends complete; all MP4s and PNGs, and the records apart from ``timing`` and ``host``, are those
of the undisturbed run; every shot has one record and one attempt; nothing half-made is left; and no shot was begun
twice but those in flight at a kill or pause.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import print_table, write_json
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.summary import Replica
from storymem_dist.story.schema import Story
from tests.helpers.fake_renderer import finished_files, make_story
from tests.helpers.workers import begun, exit_code, has_ended, kill, start_worker


def main() -> int:
    """Run all trials, print a table and say whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=12)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--kills", type=int, default=1, help="replicas killed with -9 in each trial")
    parser.add_argument("--pauses", type=int, default=0, help="replicas paused past their lease in each trial")
    parser.add_argument("--step-seconds", type=float, default=0.02)
    parser.add_argument("--folder", type=Path, help="where to work; a shared file system is a good test")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    stories = [make_story(f"story_{number:02d}", arguments.shots) for number in range(arguments.stories)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        whole = Path(folder) / "undisturbed"
        assert exit_code(start_worker(whole, stories)) == 0
        expected = finished_files(whole)
        rows = []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.trials):
            trial = Trial(root=Path(folder) / f"trial_{seed}", stories=stories, arguments=arguments)
            rows.append(trial.run(seed, expected))
    print_table(rows)
    passed = all(row["passed"] for row in rows)
    print("all trials passed" if passed else "SOME TRIALS FAILED")
    write_json(arguments.json, {"chaos": rows}, torch.device("cpu"))
    return 0 if passed else 1


@dataclass
class Trial:
    """One run that is disturbed."""

    root: Path
    stories: list[Story]
    arguments: argparse.Namespace

    def run(self, seed: int, expected: dict[str, bytes]) -> dict[str, Any]:
        """Disturb, wait for the end, compare."""
        rng, began = random.Random(seed), time.monotonic()
        replicas, disturbances = self.arguments.replicas, self.arguments.kills + self.arguments.pauses
        num_shots = len(self.stories) * self.arguments.shots
        moments = sorted(rng.randrange(1, num_shots) for _ in range(disturbances))
        kinds = ["kill"] * self.arguments.kills + ["pause"] * self.arguments.pauses
        rng.shuffle(kinds)
        workers = [self._start(index) for index in range(replicas)]
        hit, asleep = 0, []
        for moment, kind in zip(moments, kinds, strict=True):
            while len(begun(self._log)) < moment:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 4 * self.arguments.step_seconds))
            victim = rng.randrange(replicas)
            if has_ended(workers[victim]):
                continue
            if kind == "pause":
                kill(workers[victim], signal.SIGSTOP)
                asleep.append(workers[victim])
                workers[victim] = self._start(victim)
                hit += 1
            else:
                kill(workers[victim])
                hit += exit_code(workers[victim]) == -signal.SIGKILL
                workers[victim] = self._start(victim)
        codes = [exit_code(worker) for worker in workers]
        for worker in asleep:
            kill(worker, signal.SIGCONT)
        codes += [exit_code(worker) for worker in asleep]
        return self._compare(seed, expected, codes, hit, time.monotonic() - began)

    def _compare(
        self, seed: int, expected: dict[str, bytes], codes: list[int], hit: int, elapsed: float
    ) -> dict[str, Any]:
        files = finished_files(self.root)
        different = [name for name in {*files, *expected} if files.get(name) != expected.get(name)]
        attempts = [len(list(shot.iterdir())) for shot in self.root.glob("stories/*/*/attempts")]
        records = [len(list(shot.iterdir())) for shot in self.root.glob("stories/*/*/records")]
        num_shots = len(self.stories) * self.arguments.shots
        once = attempts == records == [1] * num_shots
        twice = sum(times - 1 for times in Counter(begun(self._log)).values())
        left = [path.name for path in self.root.rglob("*") if path.name.startswith(".") or path.suffix == ".lease"]
        passed = not different and once and twice <= hit and not any(codes) and not left
        return {
            "seed": seed,
            "passed": passed,
            "hit": hit,
            "rendered twice": twice,
            "files": len(files),
            "different": len(different),
            "left behind": len(left),
            "seconds": round(elapsed, 1),
        }

    @property
    def _log(self) -> Path:
        return self.root.with_suffix(".log")

    def _start(self, index: int) -> int:
        return start_worker(
            self.root,
            self.stories,
            log=self._log,
            step_seconds=self.arguments.step_seconds,
            settings=DispatchSettings(poll_seconds=0.05, lease_seconds=5.0, checkpoint_every_steps=1),
            replica=Replica(index=index, count=self.arguments.replicas, job_id="chaos"),
        )


if __name__ == "__main__":
    sys.exit(main())
