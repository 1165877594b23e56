"""The ``Observer`` protocol, and a stage reported as two events. Knows nothing of what observers do with events."""

import contextlib
import time
from collections.abc import Iterator, MutableMapping
from typing import Protocol

from storymem_dist.events.job_kinds import Event
from storymem_dist.events.kinds import STAGES, StageFinished, StageStarted


class Observer(Protocol):
    """Receives events. ``notify`` returns at once and never raises."""

    def notify(self, event: Event) -> None:
        """Receive ``event``."""


class NullObserver:
    """Ignores all events: for library use, tests, and ranks whose leader sends the events."""

    def notify(self, event: Event) -> None:
        """Ignore ``event``."""


@contextlib.contextmanager
def timed_stage(
    observer: Observer,
    stage: str,
    *,
    story_id: str | None = None,
    shot_id: str | None = None,
    totals: MutableMapping[str, float] | None = None,
) -> Iterator[None]:
    """Send ``StageStarted`` and, unless the body raises, ``StageFinished``; add the seconds to ``totals[stage]``."""
    assert stage in STAGES, stage
    observer.notify(StageStarted(stage=stage, story_id=story_id, shot_id=shot_id))
    began = time.perf_counter()
    yield
    elapsed = time.perf_counter() - began
    if totals is not None:
        totals[stage] = totals.get(stage, 0.0) + elapsed
    observer.notify(StageFinished(stage=stage, elapsed_seconds=elapsed, story_id=story_id, shot_id=shot_id))
