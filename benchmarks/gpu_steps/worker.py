"""Runs steps in a process that may die: an error of a GPU can spoil everything that follows in its process.

The parent sends steps, by number and time limit; the worker answers with rows and the end of each step. It ends after
an error that the device does not recover from, and is killed where a step takes too long; the next step then gets a new
worker.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu_steps.step import Bench, Row, SkippedError, Step, in_one_line, wait
from storymem_dist.hardware import set_allocator_defaults

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
_END_SECONDS = 10.0
_SPARE_SECONDS = 3.0  # between the end of what a step started and the end of its worker

Outcome = tuple[str, str]
"""How a step ended, and why."""


def work(connection: Connection, bench: Bench, steps: Sequence[Step]) -> None:
    """Run the steps whose numbers arrive, until the parent sends None or closes the connection."""
    torch.set_grad_enabled(False)
    if bench.device.type == "cuda":
        set_allocator_defaults()
        torch.cuda.set_device(bench.device)
    by_number = {step.number: step for step in steps}
    while (asked := connection.recv()) is not None:
        number, seconds = asked
        limited = replace(bench, ends_at=min(bench.ends_at, time.monotonic() + seconds - _SPARE_SECONDS))
        outcome = run_step(by_number[number].run, limited, lambda row: connection.send(("row", row)))
        usable = device_is_usable(bench.device)
        connection.send(("end", outcome, usable))
        if not usable:
            return


def run_step(run: Callable[[Bench], Iterator[Row]], bench: Bench, on_row: Callable[[Row], None]) -> Outcome:
    """Run one step here; its rows go to ``on_row`` as they come. Never raises for what the step raises."""
    try:
        for row in run(bench):
            on_row(row)
    except SkippedError as reason:
        return SKIPPED, str(reason)
    except Exception as error:
        return FAILED, in_one_line(error)
    return DONE, ""


def device_is_usable(device: torch.device) -> bool:
    """Free what a step left; False after an error that the device does not recover from."""
    gc.collect()
    torch._dynamo.reset()
    try:
        wait(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            torch.ones(8, device=device).sum().item()
    except RuntimeError:
        return False
    return True


class Worker:
    """A started worker, as its parent sees it."""

    def __init__(self, bench: Bench, steps: Sequence[Step]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: Any = context.Process(target=work, args=(theirs, bench, steps), name="gpu-check")
        self._process.start()
        theirs.close()

    def run(self, number: int, seconds: float, on_row: Callable[[Row], None]) -> tuple[Outcome, bool]:
        """Run one step for at most ``seconds``; also returns whether the worker can run another one."""
        ends_at = time.monotonic() + seconds
        try:
            self._connection.send((number, seconds))
            while self._connection.poll(max(0.0, ends_at - time.monotonic())):
                kind, *values = self._connection.recv()
                if kind == "end":
                    return values[0], values[1]
                on_row(values[0])
        except (EOFError, OSError):
            self._process.join(_END_SECONDS)
            return (FAILED, f"its process ended with code {self._process.exitcode}"), False
        return (FAILED, f"it did not end within {seconds:.0f} s"), False

    def end(self, *, at_once: bool = False) -> None:
        """End the process: in good order, where it waits for a step; or ``at_once``."""
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(0 if at_once else _END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_END_SECONDS)
        self._connection.close()


@contextmanager
def worker_for(bench: Bench, steps: Sequence[Step]) -> Iterator[Callable[[int, float, Callable[[Row], None]], Outcome]]:
    """Yield what runs one of ``steps`` by its number, with a limit in seconds, and gives its rows to a function.

    All run in one worker; a new one replaces one that cannot go on.
    """
    held: list[Worker] = []

    def run(number: int, seconds: float, on_row: Callable[[Row], None]) -> Outcome:
        if not held:
            held.append(Worker(bench, steps))
        outcome, usable = held[0].run(number, seconds, on_row)
        if not usable:
            held.pop().end(at_once=True)
        return outcome

    try:
        yield run
    finally:
        while held:
            held.pop().end()
