"""The queue of a run folder as ``storymem-queue`` lists it: every story with its state, place, shots and time left.

Read from the requests, the event files and the heartbeats; from the folders only stories that no event names.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import storymem_dist.events as ev
from storymem_dist.artifacts.requests import QueueState, Request
from storymem_dist.observe.journal import JournalTail
from storymem_dist.observe.queue.jobs import RunningReplica, running_replicas
from storymem_dist.observe.queue.known import own_names, read_requests
from storymem_dist.observe.queue.order import queue_order
from storymem_dist.observe.run.files import RunFiles
from storymem_dist.observe.run.rates import rates
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import AppliedRequest

EVENTS_OF_A_QUEUE = (
    ev.JobStarted,
    ev.JobFinished,
    ev.StoryStarted,
    ev.StoryFinished,
    ev.ShotStarted,
    ev.ShotFinished,
    ev.ShotFailed,
    ev.ShotResumed,
    ev.ShotSkipped,
    ev.RequestApplied,
)
"""What the list needs of the event files."""

STATES = ("running", "waiting", "paused", "added", "skipped", "failed", "finished")
"""States of a story. ``paused``: it waits, and so does the queue. ``added``: no job has taken it yet."""


_MOST_DONE = 0.9
"""Part of a running shot that counts as done when it takes longer than others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedStory:
    """One story. ``place``: 1 for the one that is rendered next or now; None where nothing of it will be.

    ``priority``: that of the list or of ``--priority``. ``is_first``: somebody moved it to the front. ``seconds_left``
    until it is complete, if the replicas that run now go on; None: not known. ``message``: why it failed or was not
    taken, or by whom it is skipped. The texts are those of storyboards and people: escape them.
    """

    story_id: str
    state: str
    place: int | None
    shots_done: int
    shots_total: int
    seconds_left: float | None
    priority: int
    is_first: bool
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueView:
    """The queue: stories by place, then those without one. ``pending``: requests that no job has applied yet."""

    stories: tuple[QueuedStory, ...]
    replicas: tuple[RunningReplica, ...]
    paused: Request | None
    pending: tuple[Request, ...]
    damaged: tuple[Request, ...]
    shots_done: int
    shots_total: int
    seconds_left: float | None

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "stories": [asdict(story) for story in self.stories],
            "replicas": [asdict(replica) for replica in self.replicas],
            "paused": None if self.paused is None else request_json(self.paused),
            "pending": [request_json(request) for request in self.pending],
            "damaged": [request_json(request) for request in self.damaged],
            "shots_done": self.shots_done,
            "shots_total": self.shots_total,
            "seconds_left": self.seconds_left,
        }


def request_json(request: Request) -> dict[str, Any]:
    """A request as JSON values, without the story that it adds."""
    keys = ("number", "action", "story_id", "only", "seed", "now", "who", "when", "via", "problem")
    return {key: getattr(request, key) for key in keys} | {"shots": list(request.shots)}


@dataclass(kw_only=True, slots=True)
class _Story:
    """A story while the queue is put together. ``done``: shots that are committed, ``path``: shots left in a row."""

    story_id: str
    state: str
    done: int
    total: int
    path: float
    running_since: float = 0.0
    priority: int = 0
    message: str = ""
    place: int | None = None
    seconds_left: float | None = None


def read_queue(root: Path, *, now: float | None = None) -> QueueView:
    """Return the queue of the run folder ``root``; ``now`` (seconds since the epoch) decides which replicas run.

    Raises ``RunFolderError`` when ``root`` is not a run folder, and ``OSError`` when its requests cannot be read.
    """
    files = RunFiles(root)
    queue, state = read_requests(root)[1], RunState()
    tail = JournalTail(files.events_folder, only=EVENTS_OF_A_QUEUE)
    while events := tail.poll():
        for stamped in events:
            state.apply(stamped)
    moment = time.time() if now is None else now
    replicas = running_replicas(root, now=moment)
    seconds_per_clip = rates(state).seconds_per_clip
    stories = _stories(files, state, queue, is_live=bool(replicas))
    for one in stories:
        if one.state == "running" and seconds_per_clip:
            one.path -= min(_MOST_DONE, max(0.0, moment - one.running_since) / seconds_per_clip)
    order = queue_order(state, queue)
    stories.sort(key=lambda one: order(one.story_id, one.state == "running"))
    left = [one for one in stories if one.state in ("running", "waiting", "paused", "added")]
    for place, one in enumerate(left, start=1):
        one.place = place
    _add_times(left, seconds_per_clip, num_replicas=sum(one.is_working for one in replicas))
    times = [one.seconds_left for one in left]
    return QueueView(
        stories=tuple(
            QueuedStory(
                story_id=one.story_id,
                state=one.state,
                place=one.place,
                shots_done=one.done,
                shots_total=one.total,
                seconds_left=one.seconds_left,
                priority=one.priority,
                is_first=one.story_id in queue.first and one.place is not None,
                message=one.message,
            )
            for one in sorted(stories, key=lambda one: (one.place is None, one.place or 0, STATES.index(one.state)))
        ),
        replicas=tuple(replicas),
        paused=queue.paused,
        pending=tuple(one for one in pending_requests(queue, state) if replicas or one.action != "stop"),
        damaged=tuple(one for one in queue.requests if one.problem),
        shots_done=sum(one.done for one in stories),
        shots_total=sum(one.total for one in stories),
        seconds_left=None if None in times else max((time for time in times if time is not None), default=0.0),
    )


def pending_requests(queue: QueueState, state: RunState) -> list[Request]:
    """The requests that no job has applied: no replica reports it, and none began a job or a shot after them."""
    starts = [start.start for row in state.rows.values() for start in row.starts]
    begun = max(starts + [attempt.start for attempt in state.attempts()], default=0.0)
    return [
        request
        for request in queue.requests
        if request.number not in state.requests and request.when >= begun and not request.problem
    ]


def _stories(files: RunFiles, state: RunState, queue: QueueState, *, is_live: bool) -> list[_Story]:
    again = {one.story_id: one for one in pending_requests(queue, state) if one.action == "rerender"}
    found = {name: _announced(state, name, is_live=is_live, again=again.get(name)) for name in state.stories}
    answers = {one.request.story_id: "; ".join(one.messages) for one in state.requests.values() if _adds(one)}
    for story_id, story in queue.added.items():
        if story_id not in found:
            found[story_id] = _Story(
                story_id=story_id,
                state="added",
                done=0,
                total=len(story.shots),
                path=len(story.shots),
                priority=story.priority,
                message=answers.get(story_id, ""),
            )
    for story_id in files.story_ids():
        if story_id not in found:
            done = len(files.story(story_id).records)
            total = max(len(own_names(files, story_id)), done)
            name = "waiting" if done < total or story_id in again else "finished"
            found[story_id] = _Story(story_id=story_id, state=name, done=done, total=total, path=total - done)
    for asked in queue.requests:
        if asked.action == "add" and asked.problem and asked.story_id not in found:
            found[asked.story_id] = _Story(
                story_id=asked.story_id, state="failed", done=0, total=0, path=0, message=asked.problem
            )
    for one in found.values():
        skipped = queue.skipped.get(one.story_id)
        if one.state in ("waiting", "added") and skipped is not None:
            one.state, one.message = "skipped", f"by {skipped.who}"
        elif one.state == "waiting" and queue.paused is not None:
            one.state = "paused"
    return list(found.values())


def _adds(one: AppliedRequest) -> bool:
    return one.request.action == "add"


def _announced(state: RunState, story_id: str, *, is_live: bool, again: Request | None) -> _Story:
    """A story that a job announced. ``is_live``: a replica runs, so what events call running may be true.

    ``again``: a request to render shots of it again that no job has applied.
    """
    story = state.stories[story_id]
    total, done = max(story.num_shots, len(story.shots)), story.num_finished
    running = [shot.last for shot in story.shots.values() if shot.status == "running"] if is_live else []
    found = _Story(
        story_id=story_id,
        state="waiting",
        done=done,
        total=total,
        path=max(0, story.longest_left),
        priority=story.priority,
    )
    if running:
        found.state = "running"
        found.running_since = min((one.start for one in running if one is not None), default=state.last_time)
    elif again is not None:
        found.path = max(found.path, len(again.shots) or total)
    elif done >= total > 0:
        found.state = "finished"
    elif story.outcome == "failed" or not story.num_left:
        found.state, found.message = "failed", story.message
    return found


def _add_times(stories: Sequence[_Story], seconds_per_clip: float | None, *, num_replicas: int) -> None:
    """Estimate when each of ``stories``, in order, is complete: every replica takes the next one when it is free."""
    if seconds_per_clip is None or not num_replicas:
        return
    free = [0.0] * num_replicas
    for one in stories:
        one.seconds_left = heapq.heappop(free) + one.path * seconds_per_clip
        heapq.heappush(free, one.seconds_left)
