"""How a replica's share of a batch ended. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from storymem_dist.artifacts.run_folder import Failure
from storymem_dist.errors import ShotFailed

DONE = "done"
STOPPED = "stopped"
FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """Which replica of the job this is.

    ``num_devices`` counts its ranks. ``job_id`` is common to all replicas and restarts of the job; empty: a job of one
    replica that makes up an id at each start.
    """

    index: int = 0
    count: int = 1
    num_devices: int = 1
    job_id: str = ""


@dataclass(kw_only=True, slots=True)
class Tally:
    """What a replica counts while it works; ``stage_seconds`` sums the stages of all its shots."""

    num_rendered: int = 0
    num_resumed: int = 0
    num_skipped: int = 0
    waited_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def add_stages(self, stage_seconds: Mapping[str, float]) -> None:
        """Add the seconds of one shot's stages."""
        for stage, seconds in stage_seconds.items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """How the batch stands when this replica ends. Stories and failures are those of the whole batch.

    ``state``: ``done`` (everything is rendered), ``stopped`` (on request; the same command goes on), ``failed`` (some
    shots could not be rendered, see ``failures``). Counts of shots are this replica's own: ``num_rendered`` committed,
    ``num_resumed`` of them continued from a step checkpoint, ``num_skipped`` found committed at the start.
    ``num_blocked`` counts shots of the batch that cannot be rendered because one before them failed.
    """

    state: str
    reason: str
    num_stories: int
    num_stories_done: int
    num_rendered: int
    num_resumed: int
    num_skipped: int
    num_failed: int
    num_blocked: int
    elapsed_seconds: float
    waited_seconds: float
    stage_seconds: Mapping[str, float]
    failures: tuple[Failure, ...]

    @property
    def exit_code(self) -> int:
        """0 when done or stopped; that of ``ShotFailed`` when something failed."""
        return ShotFailed.exit_code if self.state == FAILED else 0

    def clips_per_device_hour(self, num_devices: int) -> float:
        """Clips this replica rendered, per hour and device."""
        return 3600 * self.num_rendered / max(self.elapsed_seconds * num_devices, 1e-9)
