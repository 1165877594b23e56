"""What observing costs a render.

    python benchmarks/observe.py                      # both tables, about two minutes
    python benchmarks/observe.py --json observe.json

**Cost of a step.** Microseconds that the rendering thread spends in ``notify`` for one ``StepFinished`` (median over
batches, events spaced as in a render rather than in a burst), with each set of back ends.

**Slowdown.** A stand-in for a render: steps of ``--step-ms`` of matrix products on one thread, an event after each.
Rounds of such steps are timed with no observers and with a back end that behaves badly, in turn; the slowdown is the
median over the rounds (on a machine that does other things too, look at the quartiles). Processor times are not
disturbed by others: by how much that of the rendering thread grows, and how much of the time the back end's thread
computes, which it can at worst take from the render. The events lost are those missing from the event file. Starting up
is left out. The default step is as long as one of the tiny model on a CPU; one of the 14B model is 10 times longer or
more.
"""

import argparse
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import print_table, write_json
from rich.console import Console

from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.observe.console import LiveConsole, PlainConsole
from storymem_dist.observe.events import JobStarted, ShotStarted, StampedEvent, StepFinished
from storymem_dist.observe.feeder import WandbProcess
from storymem_dist.observe.journal import JournalWriter, read_journal
from storymem_dist.observe.observers import BackEnd, Observers
from storymem_dist.observe.settings import WandbSettings

STEPS_PER_ROUND = 20

STEP = StepFinished(
    story_id="ocean", shot_id="shot_01", step=3, num_steps=40, expert="low_noise", elapsed_seconds=6.1, timestep=876
)


class WellBehaved:
    """Listens and does nothing: what the fan-out itself costs."""

    name, tick_seconds = "well behaved", 1.0
    observers: Observers

    def handle(self, stamped: StampedEvent) -> None:
        """Nothing."""

    def tick(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Raising(WellBehaved):
    """Fails at its first event."""

    name = "raising"

    def handle(self, stamped: StampedEvent) -> None:
        """Fail."""
        raise RuntimeError("on purpose")


class Hanging(WellBehaved):
    """Hangs for a minute in its first event."""

    name = "hanging"

    def handle(self, stamped: StampedEvent) -> None:
        """Wait for something that does not come."""
        threading.Event().wait(60.0)


class Flooding(WellBehaved):
    """Computes in Python whenever it is let, and sends events of its own for every event it gets."""

    name, tick_seconds = "flooding", 1e-6

    def handle(self, stamped: StampedEvent) -> None:
        """Send a thousand events back."""
        for _ in range(1000):
            self.observers.notify(STEP)

    def tick(self) -> None:
        """Hold the interpreter for two milliseconds."""
        began = time.thread_time()
        while time.thread_time() - began < 0.002:
            pass


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=600, help="steps for the cost of a step, for each set")
    parser.add_argument("--rounds", type=int, default=8, help=f"rounds of {STEPS_PER_ROUND} steps for the slowdown")
    parser.add_argument("--step-ms", type=float, default=100.0, help="processor time of a step")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        costs = [
            cost_of_a_step(name, make, Path(folder) / str(number), arguments.events)
            for number, (name, make) in enumerate(SETS.items())
        ]
        print_table(costs)
        print()
        products = calibrate(arguments.step_ms / 1000.0)
        slowdowns = [
            slowdown(make, Path(folder) / make.name, arguments.rounds, products)
            for make in (WellBehaved, Raising, Hanging, Flooding)
        ]
        print_table(slowdowns)
    if arguments.json:
        values = {"cost_of_a_step": costs, "slowdown": slowdowns}
        write_json(arguments.json, values, torch.device("cpu"))


def plain(folder: Path) -> BackEnd:
    """The console as in a log, with the interval that makes it write every step."""
    return PlainConsole(io.StringIO(), line_interval_seconds=0.0)


def live(folder: Path) -> BackEnd:
    """The console as on a terminal."""
    return LiveConsole(Console(file=io.StringIO(), force_terminal=True, width=120))


def feeder(folder: Path) -> BackEnd:
    """Weights & Biases, offline."""
    return WandbProcess(folder, WandbSettings(mode="offline", poll_interval_seconds=0.5))


SETS: dict[str, Callable[[Path], list[BackEnd]]] = {
    "event file": lambda folder: [],
    "+ plain console": lambda folder: [plain(folder)],
    "+ live console": lambda folder: [live(folder)],
    "+ W&B": lambda folder: [feeder(folder)],
    "all": lambda folder: [live(folder), feeder(folder)],
}


def start(root: Path, back_ends: list[BackEnd]) -> Observers:
    """Observers of a run folder in which a shot has begun."""
    RunFolder(root).open()
    observers = Observers(
        back_ends, journal=JournalWriter(root / "events", "w"), writer="w", report_line=lambda line: None
    )
    observers.notify(JobStarted(num_stories=1, num_shots=10))
    observers.notify(ShotStarted(story_id="ocean", shot_id="shot_01", num_steps=40))
    return observers


def cost_of_a_step(name: str, make: Callable[[Path], list[BackEnd]], root: Path, num_events: int) -> dict[str, object]:
    """Time ``notify`` alone, 5 ms apart."""
    RunFolder(root).open()
    observers = start(root, make(root))
    time.sleep(0.2)
    seconds = []
    for _ in range(num_events):
        began = time.perf_counter()
        observers.notify(STEP)
        seconds.append(time.perf_counter() - began)
        time.sleep(0.005)
    observers.close(60.0)
    ordered = sorted(seconds)
    return {
        "back ends": name,
        "median us": round(statistics.median(seconds) * 1e6, 1),
        "mean us": round(statistics.fmean(seconds) * 1e6, 1),
        "99th percentile us": round(ordered[int(0.99 * len(ordered))] * 1e6, 1),
        "events lost": 2 + num_events - count_own(root),
    }


def slowdown(make: type[WellBehaved], root: Path, num_rounds: int, products: int) -> dict[str, object]:
    """Time rounds of steps with no observers at all and with a badly behaved one, in turn; compare within rounds."""
    lost = 0
    ratios, seconds, own_ratios, other_ratios = [], [], [], []
    for number in range(num_rounds):
        folder = root / str(number)
        bare = timed_steps(products, None)
        back_end = make()
        observers = back_end.observers = start(folder, [back_end])
        time.sleep(0.3)
        observed = timed_steps(products, observers)
        lost += 2 + STEPS_PER_ROUND - count_own(folder)
        observers.close(0.0)
        ratios.append(observed.wall / bare.wall)
        own_ratios.append(observed.processor / bare.processor)
        other_ratios.append(observed.others)
        seconds.append(bare.wall)
    return {
        "back end": make.name,
        "step ms": round(statistics.median(seconds) * 1000, 2),
        "slowdown %": round(100 * (statistics.median(ratios) - 1), 2),
        "quartiles %": " to ".join(f"{100 * (q - 1):.2f}" for q in statistics.quantiles(ratios, n=4)[::2]),
        "own processor time %": round(100 * (statistics.median(own_ratios) - 1), 2),
        "back end's processor time %": round(100 * statistics.median(other_ratios), 2),
        "events lost": lost,
    }


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A round of steps: median seconds of one by the clock, and of this thread's processor time.

    ``others``: processor time of all other threads of this process, as a share of the round's time.
    """

    wall: float
    processor: float
    others: float


def timed_steps(products: int, observers: Observers | None) -> Steps:
    """Do a round of steps, with an event after each if there are observers."""
    wall, processor = [], []
    work(products)
    all_began, own_began = time.process_time(), time.thread_time()
    for _ in range(STEPS_PER_ROUND):
        began, busy_began = time.perf_counter(), time.thread_time()
        work(products)
        if observers is not None:
            observers.notify(STEP)
        wall.append(time.perf_counter() - began)
        processor.append(time.thread_time() - busy_began)
    others = (time.process_time() - all_began) - (time.thread_time() - own_began)
    return Steps(
        wall=statistics.median(wall), processor=statistics.median(processor), others=max(0.0, others) / sum(wall)
    )


def count_own(root: Path) -> int:
    """Events of the render in the event file, the warnings of the fan-out left out."""
    return sum(type(stamped.event).__name__ != "WarningIssued" for stamped in read_journal(root / "events"))


MATRIX = torch.randn(256, 256)


def work(products: int) -> None:
    """Keep one core busy as a render keeps its device: in torch, outside the interpreter's lock."""
    matrix = MATRIX
    for _ in range(products):
        matrix = torch.mm(matrix, MATRIX).tanh_()


def calibrate(seconds: float) -> int:
    """How many products take about ``seconds`` of processor time."""
    work(20)
    began = time.thread_time()
    work(50)
    return max(1, round(50 * seconds / (time.thread_time() - began)))


if __name__ == "__main__":
    main()
