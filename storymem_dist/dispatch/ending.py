"""The end of a batch on one replica: ``stop.json`` of every part, the last events, and the summary of the whole batch.

Knows the planned shots, what is committed, and who else works; starts and releases nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from storymem_dist.dispatch import announcing
from storymem_dist.dispatch.opening import OpenBatch
from storymem_dist.dispatch.owners import Owner
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import End
from storymem_dist.dispatch.summary import DONE, FAILED, BatchSummary, Tally, summarize
from storymem_dist.errors import MachineError
from storymem_dist.events import WarningIssued
from storymem_dist.hardware import machine_fault

_PEERS_SECONDS = 60.0  # the wait for other replicas that finish their step
_PEERS_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How this replica ends. ``began``: when it began, in seconds on the monotonic clock."""

    parts: Sequence[BatchPart]
    batch: OpenBatch
    end: End
    tally: Tally
    began: float

    def report(self, owner: Owner) -> MachineError | None:
        """Write ``stop.json`` of all parts and notify the observers; return why a file could not be written."""
        self.batch.queue.find_committed()
        summary, fault = self.summary(), None
        for part_index, part in enumerate(self.parts):
            of_part = self.summary(part_index)
            details = {
                "reason": self.end.reason,
                "job_id": owner.job_id,
                "replica": owner.replica,
                "num_stories": of_part.num_stories,
                "num_stories_done": of_part.num_stories_done,
                "num_failed": of_part.num_failed,
                "num_blocked": of_part.num_blocked,
                "num_refused": of_part.num_refused,
            }
            try:
                part.run.write_outcome(of_part.state, **details)
            except OSError as error:
                message = f"stop.json cannot be written: {error}"
                part.observers.notify(WarningIssued(message=message, source="save"))
                fault = fault or unusable(error)
            part.observers.notify(announcing.job_finished(summary))
        return fault

    def wait_for_peers(self) -> None:
        """Wait until no other replica of this job works any more, for a limited time, and count what they finished."""
        until = time.monotonic() + _PEERS_SECONDS
        while time.monotonic() < until and any(leases.has_peers() for leases in self.batch.leases):
            time.sleep(_PEERS_POLL_SECONDS)
        self.batch.queue.find_committed()

    def summary(self, part_index: int | None = None) -> BatchSummary:
        """Summary of the batch, or of one part of it; the tally is this replica's in both cases."""
        queue, parts = self.batch.queue, self.parts if part_index is None else [self.parts[part_index]]
        return summarize(
            self.end.state,
            self.end.reason,
            stories=queue.graph.stories if part_index is None else queue.graph.stories_of(part_index),
            rejected=[failure for index, failure in self.batch.rejected if part_index in (None, index)],
            failures=[failure for key, failure in queue.failures.items() if part_index in (None, key[0])],
            tally=self.tally,
            elapsed_seconds=time.monotonic() - self.began,
            is_whole=part_index is None,
            num_refused=sum(part.num_refused for part in parts),
            num_finished_before=self.batch.num_finished_before,
        )


def outcome_of(batch: OpenBatch) -> End:
    """Return how a batch ends whose shots have all been rendered or cannot be."""
    stories = batch.queue.graph.stories
    num_failed = sum(story.is_failed for story in stories) + len(batch.rejected)
    if not num_failed:
        num_skipped = sum(story.is_skipped and not story.is_complete for story in stories)
        left_out = {"skipped on request": num_skipped, "left to another job": len(batch.requests.not_added)}
        return End(state=DONE, reason=", ".join(f"{number} {what}" for what, number in left_out.items() if number))
    return End(state=FAILED, reason=f"{num_failed} stories could not be rendered completely")


def unusable(error: OSError) -> MachineError:
    """Return the error that ends a job because its run folder cannot be used."""
    return machine_fault(error, while_writing=True) or MachineError(f"the run folder can no longer be used: {error}")
