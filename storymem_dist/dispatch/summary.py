"""How a batch ended, as one replica reports it: plain values and one pure function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from storymem_dist.artifacts.run_folder import FailureRecord
from storymem_dist.dispatch.story_graph import ShotStatus, StoryGraph
from storymem_dist.errors import ShotError

DONE = "done"
STOPPED = "stopped"
FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """Which replica of the job this is.

    ``num_devices`` counts its ranks. ``job_id`` is common to all replicas and restarts of the job; empty: a job of one
    replica, with a new id at each start.
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
    """The state of the batch when this replica ends. Stories and failures are those of the whole batch.

    ``state``: ``done`` (everything is rendered), ``stopped`` (on request; the same command continues), ``failed`` (some
    shots could not be rendered, see ``failures``). Counts of shots are this replica's own: ``num_rendered`` committed,
    ``num_resumed`` of them continued from a step checkpoint, ``num_skipped`` found committed at the start.
    ``num_blocked`` counts shots of the batch that cannot be rendered because one that they need failed, ``num_refused``
    storyboard files that could not be read. ``num_finished`` shots of the batch are committed, by whichever replica or
    job; ``num_finished_before`` of them were when this replica began.
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
    failures: tuple[FailureRecord, ...]
    num_refused: int
    num_finished: int
    num_finished_before: int

    @property
    def exit_code(self) -> int:
        """0 when done or stopped; that of ``ShotError`` when something failed."""
        return ShotError.exit_code if self.state == FAILED else 0


def summarize(
    state: str,
    reason: str,
    *,
    stories: Sequence[StoryGraph],
    rejected: Sequence[FailureRecord],
    failures: Sequence[FailureRecord],
    tally: Tally,
    elapsed_seconds: float,
    is_whole: bool,
    num_refused: int = 0,
    num_finished_before: int = 0,
) -> BatchSummary:
    """Summarize the given stories: of the whole batch (``is_whole``) or of one part.

    ``state`` is that of the whole batch. A part may be done although another failed. A part that is not done and has no
    failure is stopped: the same command continues it.
    """
    final = [failure for failure in failures if failure.is_final]
    num_done = sum(story.is_complete for story in stories)
    if not is_whole:
        if stories and all(story.is_complete or story.is_skipped for story in stories) and not rejected:
            state = DONE
        elif state == FAILED and not (final or rejected):
            state = STOPPED
    return BatchSummary(
        state=state,
        reason=reason,
        num_stories=len(stories) + len(rejected),
        num_stories_done=num_done,
        num_rendered=tally.num_rendered,
        num_resumed=tally.num_resumed,
        num_skipped=tally.num_skipped,
        num_failed=len(final) + len(rejected),
        num_blocked=sum(len(story.blocked) for story in stories),
        elapsed_seconds=elapsed_seconds,
        waited_seconds=tally.waited_seconds,
        stage_seconds=dict(tally.stage_seconds),
        failures=(*rejected, *final),
        num_refused=num_refused,
        num_finished=sum(state is ShotStatus.COMMITTED for story in stories for state in story.states),
        num_finished_before=num_finished_before,
    )
