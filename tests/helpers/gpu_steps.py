"""Steps for the runner of ``benchmarks.gpu_check`` that fail in every way. Imports little: each worker imports it."""

import os
import time
from collections.abc import Iterator

from benchmarks.gpu_steps.step import Bench, Row, SkippedError, Step


def good(_bench: Bench) -> Iterator[Row]:
    yield {"pid": os.getpid()}


def failing(_bench: Bench) -> Iterator[Row]:
    yield {"measured": 1}
    raise ValueError("wrong")


def dying(_bench: Bench) -> Iterator[Row]:
    yield {"measured": 2}
    os._exit(9)


def hanging(_bench: Bench) -> Iterator[Row]:
    yield {"measured": 3}
    time.sleep(600)


def skipping(_bench: Bench) -> Iterator[Row]:
    yield from ()
    raise SkippedError("not installed: x")


FAKE = tuple(
    Step(number=number, name=run.__name__, shows="", seconds=1, run=run)
    for number, run in enumerate((good, failing, good, dying, good, skipping, hanging))
)
