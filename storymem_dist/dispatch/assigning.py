"""Turns a claimed shot into what rendering it needs: keyframes and tail of others, and the state of an earlier attempt.

Knows the queue, the run folder and the observers; nothing of ranks or how a shot is rendered.
"""

import time

from storymem_dist.artifacts.shot_folder import new_attempt_id
from storymem_dist.dispatch import announcing
from storymem_dist.dispatch.history import DamagedHistory, read_checkpoint, read_history
from storymem_dist.dispatch.opening import why_again
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import Assignment
from storymem_dist.dispatch.queue import Claim, ShotQueue
from storymem_dist.dispatch.saving import HeldShot
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.dispatch.summary import Replica
from storymem_dist.dispatch.tail import ElasticTail
from storymem_dist.errors import RunFolderError
from storymem_dist.events import WarningIssued


def assign(
    claim: Claim, part: BatchPart, *, queue: ShotQueue, tail: ElasticTail, owner: Owner, replica: Replica
) -> tuple[Assignment, HeldShot] | None:
    """Collect what rendering the claimed shot of ``part`` needs, and announce its attempt.

    None when a record before it is damaged: the claim is then released. Raises ``OSError``.
    """
    shot = claim.shot
    part.run.shot(shot.story_id, shot.shot_id).discard_orphans(shot.fingerprint)
    part.run.write_storyboard(shot.story)

    def warn(message: str) -> None:
        part.observers.notify(WarningIssued(message=message, source="resume"))

    try:
        history = read_history(part.run, queue.graph.story_of(shot), shot)
    except DamagedHistory as damage:
        warn(f"{damage}; the shot is rendered again")
        queue.release(claim, ShotStatus.WAITING)
        queue.graph.set_state(damage.shot, ShotStatus.WAITING)
        return None
    began, attempt_id = time.monotonic(), new_attempt_id(shot.fingerprint, owner.owner_id)
    job = shot.job(attempt_id, why_again(part, shot))
    resume, from_the_start = None, ""
    try:
        resume = read_checkpoint(part.run, shot)
    except RunFolderError as error:
        from_the_start = f"{error}; the shot starts at its first step"
    merge = tail.gather(claim, queue)  # last of what may fail: those called wait for this replica
    part.observers.notify(announcing.shot_started(job, part, history, merge, replica.num_devices))
    part.observers.notify(announcing.queue_sampled(queue.graph))
    if from_the_start:
        warn(from_the_start)
    if resume is not None:
        part.observers.notify(announcing.shot_resumed(job, resume))
    return (
        Assignment(job=job, history=history, resume=resume, low_memory=claim.low_memory, merge=merge),
        HeldShot(
            claim=claim,
            attempt_id=attempt_id,
            resumed_at=None if resume is None else resume.step,
            began=began,
            merge=merge,
        ),
    )
