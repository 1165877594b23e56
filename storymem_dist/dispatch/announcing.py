"""Makes the events of the batch loop. Pure functions: values in, events out; knows no observers."""

from collections.abc import Mapping

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.run_folder import FailureRecord
from storymem_dist.diffusion.denoise import DenoiseState
from storymem_dist.dispatch.gathering import Merge
from storymem_dist.dispatch.graph import ShotGraph, ShotKey, shot_key
from storymem_dist.dispatch.plan import BatchPart, PlannedShot
from storymem_dist.dispatch.protocol import ShotHistory, ShotJob
from storymem_dist.dispatch.shot_settings import shot_cost
from storymem_dist.dispatch.story_graph import StoryGraph
from storymem_dist.dispatch.summary import BatchSummary
from storymem_dist.events import (
    JobFinished,
    ShotFailed,
    ShotFinished,
    ShotResumed,
    ShotSkipped,
    ShotStarted,
    StoryFinished,
    ThroughputSampled,
)
from storymem_dist.story.modes import GIVEN, M2V

_OUTCOMES = {"done": "finished", "stopped": "stopped", "failed": "failed"}


def shot_started(
    job: ShotJob, part: BatchPart, history: ShotHistory, merge: Merge | None = None, num_devices: int = 1
) -> ShotStarted:
    """An attempt begins, by a replica of ``num_devices`` or by those of ``merge``."""
    cost = shot_cost(part.cost, job.sampler, part.sampler)
    num_memory, is_given = 0, job.kind == GIVEN
    if job.kind == M2V:
        num_given = job.needs.num_references(job.story, job.shot)
        num_memory = min(cost.max_keyframes, num_given + len(history.keyframes))
    tflop = cost.passes_per_step * cost.forward_tflop(num_memory)
    return ShotStarted(
        story_id=job.story_id,
        shot_id=job.shot_id,
        shot_index=job.index,
        mode=job.mode,
        seed=job.seed,
        attempt_id=job.attempt_id,
        prompt=job.shot.prompt,
        num_memory=num_memory,
        num_steps=0 if is_given else cost.num_inference_steps,
        num_frames=cost.num_frames,
        height=cost.height,
        width=cost.width,
        num_tokens=0 if is_given else int(cost.num_tokens(num_memory)),
        tflop_per_step=tflop if cost.is_a14b and not is_given else None,
        why=job.why,
        num_devices=num_devices * (1 if merge is None else merge.team.size),
        replicas=() if merge is None else tuple(merge.team.replicas),
    )


def shot_resumed(job: ShotJob, state: DenoiseState) -> ShotResumed:
    """An attempt continues where an earlier one stopped."""
    return ShotResumed(story_id=job.story_id, shot_id=job.shot_id, step=state.step, num_steps=state.num_steps)


def queue_sampled(graph: ShotGraph) -> ThroughputSampled:
    """How many shots are ready, and how many are being rendered."""
    return ThroughputSampled(queue_depth=graph.num_ready(), num_running=len(graph.leased()))


def shot_finished(
    record: ShotRecord, part: BatchPart, elapsed_seconds: float, stage_seconds: Mapping[str, float]
) -> ShotFinished:
    """A shot is committed."""
    root, files = part.run.root, part.run.shot(record.story_id, record.shot_id).files_of(record)
    return ShotFinished(
        story_id=record.story_id,
        shot_id=record.shot_id,
        attempt_id=record.attempt_id,
        fingerprint=record.fingerprint,
        clip=(files / record.clip).relative_to(root).as_posix(),
        keyframes=tuple((files / kept.file).relative_to(root).as_posix() for kept in record.keyframes),
        num_frames=record.num_frames,
        fps=float(record.fps),
        elapsed_seconds=elapsed_seconds,
        stage_seconds=stage_seconds,
    )


def shot_failed(failure: FailureRecord, attempt_id: str) -> ShotFailed:
    """An attempt failed; it is tried again unless the failure is final."""
    return ShotFailed(
        story_id=failure.story_id,
        shot_id=failure.shot_id,
        reason=failure.reason,
        error_type=failure.error_type,
        attempt_id=attempt_id,
        will_retry=not failure.is_final,
    )


def shot_lost(shot: PlannedShot, attempt_id: str) -> ShotFailed:
    """An attempt ended because another replica has taken the shot over."""
    reason = "taken over by another replica, because this one showed no sign of life for too long"
    return _given_up(shot, attempt_id, reason, "LeaseLost")


def shot_replaced(shot: PlannedShot, attempt_id: str) -> ShotFailed:
    """An attempt ended because the shot was planned anew on request."""
    return _given_up(shot, attempt_id, "a request asks to render it again from its first step", "RenderedAgain")


def _given_up(shot: PlannedShot, attempt_id: str, reason: str, error_type: str) -> ShotFailed:
    return ShotFailed(
        story_id=shot.story_id,
        shot_id=shot.shot_id,
        reason=reason,
        error_type=error_type,
        attempt_id=attempt_id,
        will_retry=True,
    )


def shots_blocked(story: StoryGraph, announced: set[tuple[int, str]]) -> list[ShotSkipped]:
    """Shots of ``story`` cannot be rendered, because one that they need has failed.

    Leaves out those in ``announced`` (number of the story, shot id), and adds the others to it.
    """
    blocked = [shot for shot in story.blocked if (story.number, shot.shot_id) not in announced]
    announced.update((story.number, shot.shot_id) for shot in blocked)
    return [ShotSkipped(story_id=story.story_id, shot_id=shot.shot_id, reason="predecessor failed") for shot in blocked]


def ends_of(story: StoryGraph) -> set[tuple[int, str]]:
    """Number of the story with the ids of its blocked shots, and with "" if all that could be rendered of it is."""
    names = [shot.shot_id for shot in story.blocked] + [""] * story.is_failed
    return {(story.number, name) for name in names}


def story_failed(story: StoryGraph, failures: Mapping[ShotKey, FailureRecord]) -> StoryFinished:
    """All that can be rendered of a story is, and it is not complete. ``failures`` say why."""
    reasons = [(shot.shot_id, failures.get(shot_key(shot))) for shot in story.failed]
    message = "; ".join(f"{shot_id} failed" + (f": {found.reason}" if found else "") for shot_id, found in reasons)
    return StoryFinished(story_id=story.story_id, outcome="failed", num_shots=len(story.shots), message=message)


def job_finished(summary: BatchSummary) -> JobFinished:
    """This replica has nothing left to do."""
    return JobFinished(
        outcome=_OUTCOMES[summary.state],
        num_rendered=summary.num_rendered,
        num_resumed=summary.num_resumed,
        num_skipped=summary.num_skipped,
        num_failed=summary.num_failed,
        elapsed_seconds=summary.elapsed_seconds,
        message=summary.reason,
    )
