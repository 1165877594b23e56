"""How much does observing slow a render, also when a back end is faulty?

    python -m benchmarks.observe
    python -m benchmarks.observe --events 100 --rounds 1      # quick
    python -m benchmarks.observe --faults                     # only the second table

**Cost of a step.** The microseconds that the rendering thread spends in ``notify`` for one ``StepFinished``, with each
set of back ends. Two events are 5 ms from each other, because a render sends no bursts.

**Faults.** The cost of three faulty back ends. One raises at its first event. One hangs for a minute in its first
event. One floods: it answers every event with 1,000 events, and it computes as often as it can. The benchmark renders
clips of the tiny model from noise to pixels, with the events of a real shot. In each round it renders one clip with the
event file alone and one clip with each faulty back end. Each figure compares a clip with the clip of the event file
alone in the same round, and is the median over the rounds.

On a busy machine the wall clock says little: see the quartiles. Processor times say more. One column shows how much the
processor time of the rendering thread grows. Another column shows the processor time of all other threads, as a share
of the clip's time; at worst they take this share from the render. "events lost" counts the events that the event file
lacks. The start of a render is not measured. A step of the 14B model takes at least 10 times as long as the default
step here.
"""

import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import make_parser, print_table, write_json
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.diffusion.denoise import PromptEmbeds, StepInfo
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.events import Event, JobStarted, ShotStarted, StampedEvent, StepFinished, WarningIssued, timed_stage
from storymem_dist.observe.console import LiveConsole, PlainConsole
from storymem_dist.observe.journal import JournalWriter, read_journal
from storymem_dist.observe.observers import BackEnd, Observers
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.observe.wandb.process import WandbProcess
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.build import Engine
from storymem_dist.render.clip import ClipRequest, ClipSampler
from storymem_dist.terminal.rich_console import SafeConsole
from storymem_dist.weights.bundle import open_weights, with_generated_weights
from storymem_dist.weights.settings import ModelSettings

STEP = StepFinished(
    story_id="ocean", shot_id="shot_01", step=3, num_steps=40, expert="low_noise", elapsed_seconds=6.1, timestep=876
)


class WellBehaved:
    """Listens and does nothing: it shows the cost of the fan-out itself."""

    name, tick_seconds = "well behaved", 1.0
    observers: Observers

    def handle(self, stamped: StampedEvent) -> None:
        """Do nothing."""

    def tick(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


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
        """Wait for an event that never comes."""
        threading.Event().wait(60.0)


class Flooding(WellBehaved):
    """Computes in Python as often as it can, and sends events of its own for every event that it gets."""

    name, tick_seconds = "flooding", 1e-6

    def handle(self, stamped: StampedEvent) -> None:
        """Send 1,000 events back."""
        for _ in range(1000):
            self.observers.notify(STEP)

    def tick(self) -> None:
        """Hold the interpreter for two milliseconds."""
        began = time.thread_time()
        while time.thread_time() - began < 0.002:
            pass


def main() -> None:
    """Measure, print and write."""
    parser = make_parser("observe", __doc__)
    parser.add_argument("--events", type=int, default=600, help="events for each row of the first table")
    parser.add_argument("--faults", action="store_true", help="measure only faults")
    parser.add_argument("--rounds", type=int, default=11, help="clips with each faulty back end")
    parser.add_argument("--steps", type=int, default=20, help="steps of a clip")
    parser.add_argument("--width", type=int, default=480, help="pixels of a clip; more pixels make a step longer")
    parser.add_argument("--height", type=int, default=288)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.faults:
            values["cost_of_a_step"] = [
                cost_of_a_step(name, make, Path(folder) / str(number), arguments.events)
                for number, (name, make) in enumerate(SETS.items())
            ]
            print_table(values["cost_of_a_step"])
            print()
        clip = Clip(num_steps=arguments.steps, height=arguments.height, width=arguments.width)
        values["faults"] = faults(clip, Path(folder) / "faults", arguments.rounds)
        print_table(values["faults"])
    write_json(arguments.json, "observe", values, torch.device("cpu"))


def plain(folder: Path) -> BackEnd:
    """The console as in a log, set to write every step."""
    return PlainConsole(io.StringIO(), line_interval_seconds=0.0)


def live(folder: Path) -> BackEnd:
    """The console as on a terminal."""
    return LiveConsole(SafeConsole(io.StringIO(), force_terminal=True, width=120))


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
    """Time ``notify`` alone, for events 5 ms from each other."""
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


def faults(clip: "Clip", root: Path, num_rounds: int) -> list[dict[str, object]]:
    """Render a clip with the event file alone and with each faulty back end, in turn; compare within rounds."""
    clip.render(Counting(None))
    kinds: list[type[WellBehaved] | None] = [None, Raising, Hanging, Flooding]
    rounds: list[dict[type[WellBehaved] | None, Rendered]] = []
    for number in range(num_rounds):
        order = kinds if number % 2 == 0 else kinds[::-1]
        rounds.append({kind: observed_clip(clip, kind, root / f"{number} {kind and kind.name}") for kind in order})
    rows = []
    for kind in kinds:
        wall = [one[kind].wall / one[None].wall for one in rounds]
        own = [one[kind].processor / one[None].processor for one in rounds]
        quartiles = statistics.quantiles(wall, n=4)[::2] if len(wall) > 1 else wall
        rows.append(
            {
                "back end": kind.name if kind is not None else "event file alone",
                "clip s": round(statistics.median(one[kind].wall for one in rounds), 2),
                "step ms": round(1000 * statistics.median(one[kind].step for one in rounds), 1),
                "slowdown %": round(100 * (statistics.median(wall) - 1), 2),
                "quartiles %": " to ".join(f"{100 * (q - 1):.2f}" for q in quartiles),
                "own processor time %": round(100 * (statistics.median(own) - 1), 2),
                "other threads' processor time %": round(
                    100 * statistics.median(one[kind].others for one in rounds), 2
                ),
                "events": rounds[0][kind].num_events,
                "events lost": sum(one[kind].num_lost for one in rounds),
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One clip: its seconds, those of one step, this thread's processor time, events sent, and events lost.

    ``others``: processor time of all other threads of this process, as a share of the clip's time.
    """

    wall: float
    step: float
    processor: float
    others: float
    num_events: int
    num_lost: int


def observed_clip(clip: "Clip", kind: type[WellBehaved] | None, folder: Path) -> Rendered:
    """Render a clip with the event file and, unless ``kind`` is None, with a back end of this kind."""
    back_ends = [] if kind is None else [kind()]
    observers = start(folder, list(back_ends))
    for back_end in back_ends:
        back_end.observers = observers
    time.sleep(0.3)
    counting = Counting(observers)
    all_began, own_began, began = time.process_time(), time.thread_time(), time.perf_counter()
    steps = clip.render(counting)
    wall, processor = time.perf_counter() - began, time.thread_time() - own_began
    others = time.process_time() - all_began - processor
    lost = 2 + counting.num_events - count_own(folder)
    observers.close(0.0)
    return Rendered(
        wall=wall,
        step=statistics.median(steps),
        processor=processor,
        others=max(0.0, others) / wall,
        num_events=counting.num_events,
        num_lost=lost,
    )


class Counting:
    """Counts the events that it passes on."""

    def __init__(self, observers: Observers | None) -> None:
        self._observers = observers
        self.num_events = 0

    def notify(self, event: Event) -> None:
        """Pass the event on."""
        self.num_events += 1
        if self._observers is not None:
            self._observers.notify(event)


class Clip:
    """A clip of the tiny model that can be rendered many times."""

    def __init__(self, *, num_steps: int, height: int, width: int) -> None:
        model = with_generated_weights(
            ModelSettings(generate="tiny", dtype="float32", text_encoder_dtype="float32", text_encoder_device="cpu")
        )
        sampler = SamplerSettings(num_frames=5, height=height, width=width, num_inference_steps=num_steps)
        weights = open_weights(model, ["t2v"], sampler.continuation)
        engine = Engine.start(model, weights, ParallelSettings(device="cpu"), sampler)
        texts = engine.encode_texts(["A red fox crosses a frozen lake.", sampler.negative_prompt])
        prompt, negative = texts.values()
        self._clips: ClipSampler = engine.clips
        self._request = ClipRequest(
            mode="t2v", prompt=PromptEmbeds(prompt_LE=prompt, negative_LE=negative), seed=0, sampler=sampler
        )

    def render(self, observer: Counting) -> list[float]:
        """Render it with the events of a shot; return the seconds of each step."""
        seconds = []

        def on_step(info: StepInfo) -> None:
            seconds.append(info.elapsed_seconds)
            observer.notify(
                StepFinished(
                    story_id="ocean",
                    shot_id="shot_01",
                    step=info.step,
                    num_steps=info.num_steps,
                    expert=info.expert,
                    elapsed_seconds=info.elapsed_seconds,
                    timestep=info.timestep,
                )
            )

        stage = partial(timed_stage, observer, story_id="ocean", shot_id="shot_01")
        self._clips.sample(self._request, stage=stage, on_step=on_step)
        return seconds


def count_own(root: Path) -> int:
    """Number of the render's own events in the event file, without the warnings of the fan-out."""
    return sum(not isinstance(stamped.event, WarningIssued) for stamped in read_journal(root / "events"))


if __name__ == "__main__":
    main()
