"""Follows the request log of each part while a batch is rendered, and changes the graph of shots as it asks.

Every replica leader does this by itself: the same log leads to the same graph. Looks for a new request before each
claim, and from time to time while a shot is rendered. Knows logs, plans and the graph; nothing of ranks.
"""

import contextlib
import time
from collections.abc import Callable, Sequence

from storymem_dist.artifacts.records import DamagedRecord, ShotRecord
from storymem_dist.artifacts.requests import QueueState, Request, RequestLog
from storymem_dist.dispatch.graph import shot_key
from storymem_dist.dispatch.plan import BatchPart, PlannedShot, plan_stories
from storymem_dist.dispatch.queue import ShotQueue
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.dispatch.summary import Replica
from storymem_dist.errors import StoryboardError, StoryMemError
from storymem_dist.events import RequestApplied, StoryStarted, WarningIssued

_REPORTED_AT_START = 1000  # the newest ones; earlier ones have most likely been reported by the jobs before
_EFFECTS = {
    "skip": "no shot of it begins, and a running one stops after its step",
    "unskip": "its shots begin again",
    "first": "its shots come before all others",
}


class QueueRequests:
    """The requests to the queue of each part, as one replica has applied them.

    ``read`` comes first, before shots are planned: ``states`` then says what earlier requests ask for. ``follow``
    applies what is new to the queue's graph. ``stop``: the request that ends this job. ``not_added``: part and id of
    the stories that were to be added and that this job cannot render. ``has_planned_again``: shots of the plan with
    which the batch opened have been replaced. ``look_seconds``: shortest time between two looks while a shot is
    rendered. ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        parts: Sequence[BatchPart],
        replica: Replica,
        *,
        look_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._replica = replica
        self._look_seconds = look_seconds
        self._clock = clock
        self._logs = [RequestLog(part.run.root) for part in parts]
        self.states = [QueueState() for _ in parts]
        self._to_add: list[list[Request]] = [[] for _ in parts]
        self._next_look = -float("inf")
        self.stop: Request | None = None
        self.not_added: set[tuple[int, str]] = set()
        self.has_planned_again = False

    def read(self) -> None:
        """Read what was asked before the batch opened. Raises ``OSError``."""
        for part, log, state, to_add in zip(self._parts, self._logs, self.states, self._to_add, strict=True):
            found = log.read_new()
            before = log.number if part.requests_before is None else part.requests_before
            for request in found:
                state.apply(request)
                if request.number > before and request.action == "stop":
                    self.stop = request
                if request.action == "add" and request.number > (part.requests_before or 0):
                    to_add.append(request)

    def begin(self, queue: ShotQueue) -> None:
        """Apply what was read to the graph of a batch that opens. Raises ``OSError``."""
        for part_index, to_add in enumerate(self._to_add):
            state, warnings, effects = self.states[part_index], [], dict[int, str]()
            for request in to_add:
                effects[request.number], is_added = self._add(part_index, request, queue)
                if not is_added:
                    warnings.append(f"{request.story_id}: {effects[request.number]}")
            if state.paused is not None:
                by = state.paused.who
                warnings.append(f"the queue is paused by {by}: no shot begins until storymem-queue resume")
            self._settle(part_index, queue)
            if self._replica.index == 0:
                observers = self._parts[part_index].observers
                for message in warnings:
                    observers.notify(WarningIssued(message=message, source="queue"))
                for request in state.requests[-_REPORTED_AT_START:]:
                    effect = effects.get(request.number) or request.problem or _effect_at_start(request, self.stop)
                    shots = self._left_of(part_index, request, queue)
                    observers.notify(_applied(request, effect, shots, at_start=True))

    def is_wanted(self, shot: PlannedShot, queue: ShotQueue) -> bool:
        """Whether ``shot``, which this replica renders, is still to be rendered. Thread-safe."""
        entry = queue.graph.find(shot_key(shot))
        return entry is not None and not entry[0].is_skipped

    def follow(self, queue: ShotQueue, *, in_shot: bool = False) -> None:
        """Apply what was asked since the last call. Raises ``OSError``.

        ``in_shot``: look only if the last look was long enough ago.
        """
        now = self._clock()
        if in_shot and now < self._next_look:
            return
        self._next_look = now + queue.pace.seconds(self._look_seconds, len(self._logs))
        for part_index, log in enumerate(self._logs):
            if applied := [self._apply(part_index, request, queue) for request in log.read_new()]:
                self._settle(part_index, queue)
                for event in applied:
                    self._parts[part_index].observers.notify(event)

    def note_committed(self, shot: PlannedShot, queue: ShotQueue) -> None:
        """Follow up on ``shot``, which this replica has just committed. Never raises.

        If it was planned anew meanwhile, people see its newest render again. If it was rendered again alone, and its
        keyframes or last frames have changed, a warning names the committed shots that were made from the earlier ones.
        """
        part, entry = self._parts[shot.part], queue.graph.find(shot_key(shot))
        if entry is None and (story := queue.graph.story(shot.part, shot.story_id)) is not None:
            _show([one for one in story.shots if one.shot_id == shot.shot_id], queue)
        asked, for_others = self.states[shot.part].again(shot.story_id, shot.shot_id)
        if asked == for_others or entry is None:
            return
        folder, story = part.run.shot(shot.story_id, shot.shot_id), entry[0]
        try:
            new = folder.read_record(shot.fingerprint, set_aside=False)
            old = folder.newest_other_record(shot.fingerprint)
        except (OSError, DamagedRecord):
            return  # the next reader reports it
        users = [
            other.shot_id
            for other, state in zip(story.shots, story.states, strict=True)
            if state is ShotStatus.COMMITTED and other.needs.uses(shot.index, by=other.index)
        ]
        if users and new is not None and old is not None and _seen_by_others(new) != _seen_by_others(old):
            message = (
                f"{shot.story_id}:{shot.shot_id} was rendered again alone, and its keyframes or last frames have "
                f"changed: {', '.join(users)} and the shots that need them show the earlier ones; a request to "
                f"rerender {shot.story_id}:{users[0]} brings them up to date"
            )
            part.observers.notify(WarningIssued(message=message, source="queue"))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _apply(self, part_index: int, request: Request, queue: ShotQueue) -> RequestApplied:
        """Apply a request, up to ``_settle``; return the event that says its effect."""
        state = self.states[part_index]
        was_paused = state.paused
        state.apply(request)
        shots: Sequence[str] = ()
        match request.action:
            case "add":
                message, _ = self._add(part_index, request, queue)
            case "rerender":
                message, shots = self._plan_again(part_index, request, queue)
            case "pause":
                message = "no other shot begins" if was_paused is None else f"it was paused by {was_paused.who} already"
            case "resume":
                message = "shots begin again" if was_paused is not None else "it was not paused"
            case "stop":
                self.stop = request
                message = "this job ends after the running " + ("step" if request.now else "shots")
            case "skip" | "unskip" | "first" if (story := queue.graph.story(part_index, request.story_id)) is not None:
                message = _EFFECTS[request.action] if not story.is_over else "nothing of it is left to be rendered"
            case _:
                message = request.problem or f"this job has no story {request.story_id}"
        return _applied(request, message, shots)

    def _left_of(self, part_index: int, request: Request, queue: ShotQueue) -> list[str]:
        """The shots that a job which begins will render for a request to rerender."""
        story = queue.graph.story(part_index, request.story_id)
        if request.action != "rerender" or story is None or queue.shares_looks:  # then it does not know all commits
            return []
        states = zip(story.shots, story.states, strict=True)
        return [shot.shot_id for shot, state in states if state is not ShotStatus.COMMITTED]

    def _settle(self, part_index: int, queue: ShotQueue) -> None:
        """Bring priorities, skipped stories and a pause of a part up to date."""
        state, graph = self.states[part_index], queue.graph
        for story_id, priority in state.first.items():
            if (story := graph.story(part_index, story_id)) is not None:
                graph.set_priority(story, priority)
        for story in graph.stories_of(part_index):
            graph.set_skipped(story, story.story_id in state.skipped)
        graph.set_held(part_index, state.paused is not None)

    def _add(self, part_index: int, request: Request, queue: ShotQueue) -> tuple[str, bool]:
        """Add a story to the graph; return the effect in words, and whether the story is part of the batch."""
        part, graph, key = self._parts[part_index], queue.graph, (part_index, request.story_id)
        if graph.story(*key) is not None:
            return "this job has a story of that id already", True
        self.not_added.add(key)
        if request.story is None:
            return f"not added: {request.problem}", False
        try:
            story = part.admit(request.story)
            ((story, planned),) = plan_stories(part_index, part, [story], self.states[part_index])
            if isinstance(planned, StoryboardError):
                raise planned
        except StoryMemError as error:
            return f"not added by this job: {error}", False
        self.not_added.discard(key)
        added = graph.add_story(planned)
        queue.look_at(added)
        if added.number % self._replica.count == self._replica.index:
            part.observers.notify(
                StoryStarted(
                    story_id=story.story_id,
                    name=story.name,
                    num_shots=len(planned),
                    waits_for=tuple(shot.waits_for for shot in planned),
                    priority=added.priority,
                )
            )
        return f"added: {len(planned)} of its shots are part of this job", True

    def _plan_again(self, part_index: int, request: Request, queue: ShotQueue) -> tuple[str, Sequence[str]]:
        """Plan a story anew; return the effect in words, and the shots that are rendered again."""
        part, story = self._parts[part_index], queue.graph.story(part_index, request.story_id)
        if story is None:
            return f"this job has no story {request.story_id}", ()
        ((_, planned),) = plan_stories(part_index, part, [story.shots[0].story], self.states[part_index])
        if isinstance(planned, StoryboardError):
            return f"not rendered again: {planned}", ()
        before = {shot.shot_id: shot.fingerprint for shot in story.shots}
        changed = [shot for shot in planned if shot.fingerprint != before[shot.shot_id]]
        queue.replace(story, planned)
        self.has_planned_again = True
        _show(changed, queue)
        names = [shot.shot_id for shot in changed]
        return f"to be rendered again: {', '.join(names) or 'nothing'}", names


def _effect_at_start(request: Request, stop: Request | None) -> str:
    """What a request means for a job that begins."""
    if request.action != "stop":
        return "part of the plan of a job that began"
    return "the job that began ends" if stop is not None and stop.number == request.number else "for an earlier job"


def _applied(request: Request, message: str, shots: Sequence[str], *, at_start: bool = False) -> RequestApplied:
    """The event that says the effect of a request."""
    return RequestApplied(
        number=request.number,
        action=request.action,
        story_id=request.story_id,
        shots=tuple(shots) if at_start else tuple(shots or request.shots),
        who=request.who,
        asked_at=request.when,
        message=message,
        at_start=at_start,
    )


def _show(shots: Sequence[PlannedShot], queue: ShotQueue) -> None:
    """Let people see those of the newest ``shots`` that another replica has committed: this one may have committed an
    earlier render of them after that. Never raises.
    """
    for shot in shots:
        if queue.graph.state(shot) is ShotStatus.COMMITTED:
            with contextlib.suppress(OSError):  # the next job shows them
                queue.finish_commit(shot)


def _seen_by_others(record: ShotRecord) -> list[object]:
    """What later shots see of a shot: its keyframes and its last frames, by their contents."""
    keyframes = [(kept.slot, kept.frame_index, record.files[kept.file].sha256) for kept in record.keyframes]
    return [keyframes, [record.files[name].sha256 for name in record.tail]]
