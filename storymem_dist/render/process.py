"""What a job may do with the process that it runs in: a command's own process, or that of another program (a guest)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.events import Observer
from storymem_dist.parallel.progress import ProgressBoard
from storymem_dist.parallel.session import Session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.watch import Watch
from storymem_dist.render.build import Engine


class Unwatched:
    """Takes the place of ``Watch`` in a guest: it has no peers, and must not end the process that it is a guest of."""

    def __enter__(self) -> "Unwatched":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def note(self, error: BaseException) -> None:
        """Ignore an error: there is nobody to report it to."""

    def among(self, ranks: Sequence[int], crew: str) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class JobProcess:
    """The defaults are those of a command, whose process is its own: it takes signals, logs, watches and prints.

    A guest has a ``device``, and does none of that. ``ask`` is called at every question whether to stop, with the
    switch that ``request`` stops; ``observed`` wraps the observer of all events. ``start_engine`` is ``Engine.start``,
    or returns an engine that is loaded already; that one outlives the job.
    """

    device: torch.device | None = None
    ask: Callable[[StopSwitch], None] = field(default=lambda stop: None)
    observed: Callable[[Observer], Observer] = field(default=lambda observer: observer)
    start_engine: Callable[..., Engine] = Engine.start

    @property
    def is_own(self) -> bool:
        """Whether the process belongs to the job."""
        return self.device is None

    def watch(
        self, session: Session, parallel: ParallelSettings, board: ProgressBoard, tell: Callable[[str], None]
    ) -> Watch | Unwatched:
        """Watch this rank while it renders."""
        return Watch(session, parallel, look=board.look, tell=tell) if self.is_own else Unwatched()
